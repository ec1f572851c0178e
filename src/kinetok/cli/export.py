"""``kinetok export`` and ``kinetok verify``."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import SMALL, example
from kinetok.errors import UserError

MODEL = Annotated[
    str | None, typer.Argument(help="Model directory or hub id; 'default' or nothing: the default model.")
]
OUT = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; an older bundle there is replaced.")]

export = typer.Typer(help="A model for programs without Python.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(export, name="export")
    app.command(epilog=example("kinetok verify bundle"))(verify)


@export.command(
    "onnx",
    epilog=example("kinetok export onnx --out bundle", "kinetok export onnx models/mine --out bundle --dtype int8"),
)
def onnx(
    model: MODEL = None,
    out: OUT = Path("bundle"),
    dtype: Annotated[str, typer.Option(help="fp32, fp16, int8 or int4 (weights).")] = "fp32",
    kv: Annotated[str | None, typer.Option(help="Cache: fp32 or fp16; as the activations without.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset: 23, or 18 for older readers.")] = 23,
    text: Annotated[bool, typer.Option(help="With the text encoder; a bundle without takes banked prompts.")] = True,
) -> None:
    """Write a bundle: ONNX graphs, weights, prompt bank and golden fixtures, checked against the model."""
    from kinetok.export.bundle import export_bundle
    from kinetok.model.pretrained import load_pretrained

    began = time.perf_counter()
    bundle = load_pretrained(None if model == "default" else model, "cpu", "float32")
    _few_threads(sum(value.numel() for value in bundle.decoder.parameters()))
    export_bundle(bundle, out, dtype=dtype, kv=kv, opset=opset, text=text)
    for path in sorted(out.iterdir()):
        print(f"wrote {path}  {path.stat().st_size / 1e6:.2f} MB")
    print(f"golden fixtures replayed and agreed; {time.perf_counter() - began:.1f} s")


def verify(
    bundle: Annotated[Path, typer.Argument(help="A folder that kinetok export onnx wrote.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Replay a bundle's golden fixtures here; exit code 1 and the first divergence where one disagrees."""
    from kinetok.export.replay import replay

    weights = bundle / "weights.bin"
    _few_threads(weights.stat().st_size // 4 if weights.is_file() else 0)
    report = replay(bundle, device)
    print(report)
    sys.exit(0 if report.passed else 1)


def exported(model: Path, dtype: str) -> str:
    """The backend's name for a bundle of ``model`` that is made now and removed when the program ends."""
    import atexit
    import shutil
    import tempfile

    from kinetok.export.bundle import export_bundle
    from kinetok.model.pretrained import load_pretrained

    if dtype not in ("auto", "float32", "float16"):
        raise UserError(f"--dtype: backend onnx has float32 and float16, got {dtype!r}")
    folder = Path(tempfile.mkdtemp(prefix="kinetok-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    bundle = load_pretrained(model, "cpu", "float32")
    _few_threads(sum(value.numel() for value in bundle.decoder.parameters()))
    precision = "fp16" if dtype == "float16" else "fp32"
    return f"onnx:{export_bundle(bundle, folder / 'bundle', dtype=precision, text=False, check=False)}"


def _few_threads(parameters: int) -> None:
    import torch

    if parameters < SMALL:
        torch.set_num_threads(1)
