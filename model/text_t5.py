"""Flan-T5 features, as the released models were trained on (section 3)."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from kinetok.errors import UserError, missing_package

MAX_TOKENS, MAX_FEATURES = 512, 150


class FlanT5:
    """The encoder half of a T5, fp32, from a local directory or a hub id; the end-of-sentence token is kept.

    local: only what is on this machine already. Raises ``UserError`` when transformers is missing or the model cannot be
    read.
    """

    def __init__(self, name: str, *, local: bool = False, device: str = "cpu") -> None:
        try:
            from transformers import AutoTokenizer, T5EncoderModel
        except ImportError as error:
            raise missing_package("transformers", "text", "the Flan-T5 text encoder") from error
        # The checkpoint holds the decoder half too; a list of its unused keys is no news.
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
            self.model = T5EncoderModel.from_pretrained(name, dtype=torch.float32, local_files_only=local)
            torch.nn.Module.to(self.model, device).eval()  # transformers' own wrapper of it has no types
        except (OSError, ValueError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(f"text encoder {name!r}: expected a T5 directory or hub id, but {detail}") from error
        self.name, self.dim = name, int(self.model.config.d_model)

    def ids(self, text: str) -> list[int]:
        """The text's ids with the end token last, at most 512 of them."""
        return list(self.tokenizer(text, truncation=True, max_length=MAX_TOKENS).input_ids)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Last hidden states fp32 ``[L_i, d]``, L_i <= 150, of each text on its own (truncated at 512 tokens)."""
        features = []
        for text in texts:
            ids = torch.tensor([self.ids(text)], device=self.model.device)
            states = self.model(input_ids=ids).last_hidden_state
            features.append(states[0, :MAX_FEATURES].float())
        return features
