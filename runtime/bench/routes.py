"""The ways to write a clip's tokens that ``kinetok bench decode`` compares.

Each is greedy over the motion tokens (the end token is banned, so that all write as many), takes text features
``[B, L, D]``, calls ``mark`` after each token, and returns tokens ``[B, n]``. The rows' texts are equally long.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kinetok.errors import UserError, missing_package
from kinetok.kernels.norm import rms_norm
from kinetok.kernels.rotary import apply_rotary
from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import build
from kinetok.runtime.backends import Backend
from kinetok.runtime.backends.torch import TorchBackend

Mark = Callable[[], None]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CannotRun(Exception):
    """Why a peer does not run here; the results carry the sentence."""


def random_decoder(config: DecoderConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> MotionDecoder:
    """A decoder with random weights made on the device, in its dtype: products keep the size of what goes in."""
    decoder = build(lambda: MotionDecoder(config), device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, value in decoder.named_parameters():
            if value.ndim == 1:
                value.fill_(0 if name.endswith("bias") else 1)
            else:
                value.normal_(0, 1 if name == "embed.weight" else value.shape[1] ** -0.5, generator=generator)
    return decoder


def _pick(logits: Tensor, config: DecoderConfig) -> Tensor:
    return logits[..., : config.codebook].argmax(-1)


class Uncached:
    """The authors' algorithm: the whole sequence anew for each token, logits of all positions, fp32 as released."""

    name: ClassVar[str] = "uncached"

    def __init__(self, decoder: MotionDecoder) -> None:
        self.decoder = decoder
        if decoder.embed.weight.dtype != torch.float32:
            self.decoder = build(lambda: MotionDecoder(decoder.config), decoder.embed.weight.device, torch.float32)
            self.decoder.load_state_dict(decoder.state_dict())

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        config = self.decoder.config
        rows = torch.full(features.shape[:2], config.pad_id, device=features.device)
        mask = torch.ones(features.shape[:2], device=features.device)
        for _ in range(count):
            token = _pick(self.decoder(rows, features, mask)[:, -1], config)
            rows = torch.cat((rows, token[:, None]), 1)
            mark()
        return rows[:, features.shape[1] :]


class Backended:
    """kinetok as an engine runs it: prefill and steps of a backend, all characters at once, without sampling."""

    def __init__(self, backend: Backend, config: DecoderConfig) -> None:
        self.backend, self.config = backend, config

    @classmethod
    def ours(cls, decoder: MotionDecoder, batch: int, capacity: int) -> "Backended":
        """The fused kernels on a GPU, torch on a CPU."""
        if decoder.embed.weight.is_cuda:
            from kinetok.runtime.backends.fused import FusedBackend

            return cls(FusedBackend(decoder, batch, capacity), decoder.config)
        # The backend lays weights out anew, which peers must neither gain nor lose by.
        return cls(TorchBackend(copy.deepcopy(decoder), batch, capacity), decoder.config)

    @classmethod
    def onnx(cls, folder: str, decoder: MotionDecoder, batch: int, capacity: int) -> "Backended":
        """A bundle of the same weights in ONNX Runtime."""
        from kinetok.runtime.backends.onnx import OnnxBackend
        from kinetok.runtime.bundle import read_bundle

        if not folder:
            raise CannotRun("there is no ONNX export of these weights: kinetok export onnx, then --onnx DIR")
        try:
            bundle = read_bundle(folder)
            bundle.check_decoder(decoder.config)
            return cls(OnnxBackend(bundle, batch, capacity, decoder.embed.weight.device), decoder.config)
        except UserError as error:
            raise CannotRun(str(error)) from error

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        backend, config = self.backend, self.config
        slots = range(len(features))
        logits = torch.stack([backend.prefill(slot, features[slot]) for slot in slots])
        tokens = [_pick(logits, config)]
        mark()
        while len(tokens) < count:
            tokens.append(_pick(backend.decode(slots, tokens[-1]), config))
            mark()
        return torch.stack(tokens, 1)


class PlainStep:
    """One step in plain torch on static shapes, whose token and position live on the device: what a CUDA graph can hold.

    The recipe of a good hand-written loop: library products, attention over the whole cache under a mask.
    """

    def __init__(self, decoder: MotionDecoder, batch: int, capacity: int) -> None:
        self.decoder = decoder
        weight = decoder.embed.weight
        self.cache = decoder.new_cache(batch, capacity)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.keys = torch.arange(capacity, device=weight.device)
        self.table = decoder.rotary()

    def __call__(self) -> None:
        decoder, position = self.decoder, self.position
        x = F.embedding(self.tokens, decoder.embed.weight)[:, None]
        table = self.table[position][None]
        visible = (self.keys <= position)[None, None, None]
        for at, block in enumerate(decoder.blocks):
            qkv = F.linear(rms_norm(x, block.attn_norm.scale), block.qkv.weight)
            q, k, v = qkv.unflatten(-1, (3, block.heads, -1)).unbind(2)
            keys, values = self.cache.slab[0, at], self.cache.slab[1, at]
            keys.index_copy_(2, position, apply_rotary(k, table).transpose(1, 2))
            values.index_copy_(2, position, v.transpose(1, 2))
            q = apply_rotary(q, table).transpose(1, 2)
            x = x + block.mix(F.scaled_dot_product_attention(q, keys, values, attn_mask=visible))
            x = x + block.mlp(x)
        logits = decoder.head(decoder.norm(x[:, 0]))
        self.tokens.copy_(_pick(logits, decoder.config))
        position += 1


class Graph:
    """``PlainStep`` captured in a CUDA graph."""

    name: ClassVar[str] = "graph"

    def __init__(self, decoder: MotionDecoder, batch: int, capacity: int, *, capture: bool = True) -> None:
        if capture and decoder.embed.weight.device.type != "cuda":
            raise CannotRun("a CUDA graph needs a CUDA device")
        self.step = PlainStep(decoder, batch, capacity)
        self.replay: Callable[[], Any] = self.step
        if capture:
            with torch.inference_mode():
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self.step()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step()
            self.replay = graph.replay

    @torch.inference_mode()
    def run(self, features: Tensor, count: int, mark: Mark) -> Tensor:
        step, decoder = self.step, self.step.decoder
        logits = decoder.prefill(list(features), step.cache)
        step.tokens.copy_(_pick(logits, decoder.config))
        step.position.fill_(features.shape[1])
        tokens = [step.tokens.clone()]
        mark()
        while len(tokens) < count:
            self.replay()
            tokens.append(step.tokens.clone())
            mark()
        return torch.stack(tokens, 1)


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

    name: ClassVar[str] = "hf"

    def __init__(self, decoder: MotionDecoder, *, compiled: bool = False) -> None:
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise CannotRun(str(missing_package("transformers", "text", "this peer"))) from error
        config, weight = decoder.config, decoder.embed.weight
        if config.rope != "fp32":
            raise CannotRun("Llama has no rotary table in bf16")
        self.decoder = decoder
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

    name: ClassVar[str] = "compile"

    def __init__(self, decoder: MotionDecoder) -> None:
        super().__init__(decoder, compiled=True)


def fits(config: DecoderConfig, text: int, count: int) -> None:
    """``UserError`` when a clip of ``count`` tokens does not fit behind ``text`` positions."""
    if text + count - 1 > config.block_size:
        raise UserError(
            f"tokens: {text} text positions and {count} tokens need {text + count - 1} positions, "
            f"but this model has {config.block_size}"
        )
