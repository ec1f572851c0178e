"""``kinetok export`` and ``kinetok verify``."""

import importlib.util
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import SMALL, bar, example
from kinetok.errors import UserError, missing_package

MODEL = Annotated[
    str | None, typer.Argument(help="Model directory or hub id; 'default' or nothing: the default model.")
]
OUT = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; an older export there is replaced.")]

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
    opset: Annotated[int, typer.Option(help="ONNX opset: 23, 24, or 18 for older readers.")] = 23,
    text: Annotated[bool, typer.Option(help="With the text encoder; a bundle without takes banked prompts.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Write a bundle that is too far from the model all the same.")
    ] = False,
) -> None:
    """Write a bundle: ONNX graphs, weights, prompt bank and golden fixtures, checked against the model.

    Another precision than fp32 is compared with the model as kinetok quantize does, and refused where it changes too much.
    """
    from kinetok.cli.quantize import report_text
    from kinetok.export.bundle import export_bundle
    from kinetok.model.pretrained import load_pretrained
    from kinetok.runtime.manifest import read_manifest

    _stop_like_ctrl_c()
    began = time.perf_counter()
    bundle = load_pretrained(None if model == "default" else model, "cpu", "float32")
    _few_threads(sum(value.numel() for value in bundle.decoder.parameters()))
    export_bundle(bundle, out, dtype=dtype, kv=kv, opset=opset, text=text, compared=True, force=force)
    manifest = read_manifest(out)
    for path in sorted(out.iterdir()):
        print(f"wrote {path}  {path.stat().st_size / 1e6:.2f} MB")
    for name, why in manifest["absent"].items():
        print(f"no {name}: {why}")
    if manifest["agreement"] is not None:
        print(report_text(manifest["agreement"]))
    print(f"golden fixtures replayed and agreed; {time.perf_counter() - began:.1f} s")


BATCHES = Annotated[str, typer.Option(help="Optimisation profiles: the largest batch of each, a comma list.")]
POSITIONS = Annotated[
    int | None, typer.Option(help="Length of the cache, text and motion together; the model's limit without.")
]
ENGINE_DTYPE = Annotated[str, typer.Option(help="fp32, fp16, bf16, or int8 or int4 weights with fp16 activations.")]


@export.command("tensorrt", epilog=example("kinetok export tensorrt --out engines --dtype fp16"))
def tensorrt(
    model: MODEL = None,
    out: OUT = Path("engines"),
    dtype: ENGINE_DTYPE = "fp16",
    batches: BATCHES = "1,8,64",
    positions: POSITIONS = None,
) -> None:
    """Build TensorRT engines for the GPU of this machine. What an older build into the same folder timed is kept."""
    _engines("tensorrt", model, out, dtype, "", batches, positions)


@export.command(
    "tensorrt-rtx", epilog=example("kinetok export tensorrt-rtx --out engines --targets sm_86,sm_89,sm_120")
)
def tensorrt_rtx(
    model: MODEL = None,
    out: OUT = Path("engines"),
    dtype: ENGINE_DTYPE = "fp16",
    targets: Annotated[str, typer.Option(help="GPUs to build for, a comma list such as sm_86,sm_89,sm_120.")] = "",
    batches: BATCHES = "1,8,64",
    positions: POSITIONS = None,
) -> None:
    """Build TensorRT-RTX engines, for GPUs that need not be here."""
    _engines("tensorrt-rtx", model, out, dtype, targets, batches, positions)


def _engines(
    kind: str, model: str | None, out: Path, dtype: str, targets: str, batches: str, positions: int | None
) -> None:
    from kinetok.export.tensorrt import export_engines
    from kinetok.model.pretrained import load_pretrained

    try:
        sizes = [int(part) for part in batches.split(",")]
    except ValueError as error:
        raise UserError(f"--batches: expected numbers such as 1,8,64, got {batches!r}") from error
    _stop_like_ctrl_c()
    began = time.perf_counter()
    loaded = load_pretrained(None if model == "default" else model, "cpu", "float32")
    names = [part.strip() for part in targets.split(",") if part.strip()]
    with bar("building", shown=True) as update:
        manifest = export_engines(
            loaded,
            out,
            kind=kind,
            dtype=dtype,
            targets=names,
            batches=sizes,
            positions=positions,
            progress=lambda done, of, what: update(done, of, what),
        )
    for path in sorted(out.iterdir()):
        print(f"wrote {path}  {path.stat().st_size / 1e6:.2f} MB")
    if (cache := manifest["timing_cache"]) is not None:
        print(f"timing cache: {cache['bytes'] / 1e3:.1f} kB, {cache['reused_bytes'] / 1e3:.1f} kB of it from before")
    print(f"built for {', '.join(manifest['targets'])}, not run; {time.perf_counter() - began:.1f} s")


def verify(
    bundle: Annotated[Path, typer.Argument(help="A folder that kinetok export wrote.")],
    device: Annotated[str, typer.Option(help="cpu or cuda, for a bundle.")] = "cpu",
) -> None:
    """Replay a bundle's golden fixtures here; exit code 1 and the first divergence where one disagrees.

    Of engines: whether their files are whole, were built for this machine's GPU and library, and run.
    """
    from kinetok.runtime.engines import ENGINES, read_engines

    if (bundle / ENGINES).is_file():
        import torch

        from kinetok.runtime.backends.tensorrt import open_engines

        backend = open_engines(read_engines(bundle), 1, 2, torch.device("cuda"))
        print(
            f"{bundle}: whole, built for this GPU and library, and they run; compiled kernels: {backend.compiled.state}"
        )
        return
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(package, "onnx", "verifying a bundle")
    from kinetok.export.replay import replay

    weights = bundle / "weights.bin"
    _few_threads(weights.stat().st_size // 4 if weights.is_file() else 0)
    report = replay(bundle, device)
    print(report)
    if report.divergence is not None:
        print(f"first divergence: {report.divergence.name}: {report.divergence.text}")
    sys.exit(0 if report.passed else 1)


def _stop_like_ctrl_c() -> None:
    """Who ends an export of gigabytes with SIGTERM finds none of them left beside ``--out``."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _few_threads(parameters: int) -> None:
    import torch

    if parameters < SMALL:
        torch.set_num_threads(1)
