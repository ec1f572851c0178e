"""The two ends of the tokenizer's decoder: tokens to its first layer, its last layer to frames."""

from kinetok.kernels.detokenizer.op import conv_idwt, fsq_conv
from kinetok.kernels.detokenizer.reference import conv, fold_projection

__all__ = ["conv", "conv_idwt", "fold_projection", "fsq_conv"]
