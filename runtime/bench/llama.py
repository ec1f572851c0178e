"""The peers ``hf`` and ``compile``: Hugging Face's Llama on the decoder's weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetok.errors import missing_package
from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.bench.routes import CannotRun, Mark


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head from interleaved pairs (2m, 2m + 1) to halves (m, m + hd / 2): the other rotary layout."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@dataclass
class _Timed:
    """A logits processor that only marks: it is called once a token."""

    mark: Mark

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.mark()
        return scores


class HuggingFace:
    """``LlamaForCausalLM.generate`` on the same weights and embeddings, with a static cache; compiled if asked."""

    def __init__(self, decoder: MotionDecoder, *, compiled: bool = False) -> None:
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise CannotRun(str(missing_package("transformers", "text", "this peer"))) from error
        config, weight = decoder.config, decoder.embed.weight
        if config.rope != "fp32":
            raise CannotRun("Llama has no rotary table in bf16")
        self.decoder, self.kv = decoder, weight.dtype
        llama = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_head,
            max_position_embeddings=config.block_size,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=config.pad_id,
        )
        # Base 10000 is Llama's own. The frequencies are a buffer that is in no state: it must be made, and in fp32.
        with torch.device("meta"):
            model = LlamaForCausalLM._from_config(llama, attn_implementation="sdpa")
        with weight.device:
            rotary = type(model.model.rotary_emb)(llama)
        model.load_state_dict(self._state(decoder), assign=True, strict=False)
        model.model.rotary_emb = rotary
        missing = [name for name, value in model.named_parameters() if value.is_meta]
        if missing:
            raise CannotRun(f"this version of transformers names Llama's weights otherwise: {missing[:3]}")
        self.model = model.eval()
        step = model.model.forward
        if compiled:
            step = torch.compile(step, mode="reduce-overhead" if weight.is_cuda else None, fullgraph=True)

        def forward(*, inputs_embeds: Tensor | None = None, **keywords: Any) -> Any:
            if inputs_embeds is None:
                return step(inputs_embeds=None, **keywords)
            # The text sees itself in both directions, which a Llama must be told; and it is not what is compiled.
            batch, length, _ = inputs_embeds.shape
            mask = torch.zeros(batch, 1, length, keywords["past_key_values"].layers[0].max_cache_len, dtype=torch.bool)
            mask[..., :length] = True
            keywords["attention_mask"] = mask.to(inputs_embeds.device)
            return type(model.model).forward(model.model, inputs_embeds=inputs_embeds, **keywords)

        model.model.forward = forward

    @staticmethod
    def _state(decoder: MotionDecoder) -> dict[str, Tensor]:
        head = decoder.head.weight.detach()
        # The pad's row of a head of its own is banned below, whatever stands in it.
        head = F.pad(head, (0, 0, 0, decoder.config.vocab_size - len(head)))
        state = {
            "model.embed_tokens.weight": decoder.embed.weight.detach(),
            "model.norm.weight": decoder.norm.scale.detach(),
            "lm_head.weight": head,
        }
        for at, block in enumerate(decoder.blocks):
            q, k, v = block.qkv.weight.detach().chunk(3)
            gate, up = block.gate_up.weight.detach().chunk(2)
            layer = {
                "input_layernorm": block.attn_norm.scale.detach(),
                "self_attn.q_proj": _halves(q, block.heads),
                "self_attn.k_proj": _halves(k, block.heads),
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.attn_out.weight.detach(),
                "post_attention_layernorm": block.mlp_norm.scale.detach(),
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.down.weight.detach(),
            }
            state |= {f"model.layers.{at}.{name}.weight": value for name, value in layer.items()}
        return state

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        config = self.decoder.config
        embedded = self.decoder.text_proj(features.to(self.decoder.text_proj.weight.dtype))
        found = self.model.generate(
            inputs_embeds=embedded,
            attention_mask=torch.ones(features.shape[:2], dtype=torch.int64, device=features.device),
            max_new_tokens=count,
            min_new_tokens=None,
            do_sample=False,
            cache_implementation="static",
            suppress_tokens=[config.end_id, config.pad_id],
            logits_processor=[_Timed(mark)],
            disable_compile=True,
        )
        return found[:, -count:]


class Compiled(HuggingFace):
    """``HuggingFace`` with a compiled forward pass."""

    def __init__(self, decoder: MotionDecoder) -> None:
        super().__init__(decoder, compiled=True)
