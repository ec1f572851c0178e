"""Which backend a model runs on when nobody says."""

import importlib
from typing import NamedTuple

import torch
from torch import nn

from kinetok.model.decoder import MotionDecoder
from kinetok.runtime.memory import bytes_available


class Chosen(NamedTuple):
    """A backend's name, and why it is this one."""

    name: str
    reason: str


def choose_backend(decoder: MotionDecoder) -> Chosen:
    """On a GPU torch; on a CPU ONNX Runtime where it can run the decoder, for it was 1.7 to 5.2 times as fast
    as torch (benchmarks/results/onnx_cpu.json), otherwise torch."""
    weight = decoder.embed.weight
    if weight.device.type != "cpu":
        return Chosen("torch", "the fused kernels have not been measured on a GPU yet: ask for the backend fused")
    if not isinstance(decoder.blocks[0].qkv, nn.Linear):
        return Chosen("torch", "the memory to unpack the weights is not there, so they are unpacked at every step")
    if weight.dtype != torch.float32:
        return Chosen("torch", f"ONNX Runtime's live graph is fp32, and these weights are {weight.dtype}")
    for package in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == package
            why = "is not installed" if absent else f"cannot be imported ({' '.join(str(error).split())[:200]})"
            return Chosen("torch", f"{package} {why}; a CPU is faster with it: pip install 'kinetok[onnx]'")
    # ONNX Runtime lays the weights out once more, for its own products, and needs both while it does so.
    need, free = 2 * sum(value.numel() * 4 for value in decoder.parameters()), bytes_available(weight.device)
    if free is not None and need > free:
        return Chosen(
            "torch", f"ONNX Runtime's copy of the weights needs {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        )
    return Chosen("onnx", "faster than torch on a CPU")
