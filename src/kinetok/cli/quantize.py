"""``kinetok quantize``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kinetok.cli.common import example, print_json
from kinetok.errors import UserError


def register(app: typer.Typer) -> None:
    lines = "kinetok quantize default --to int8 -o small", "kinetok quantize mymodel --to int4 --group 64 -o smaller"
    app.command(epilog=example(*lines))(quantize)


def quantize(
    model: Annotated[str, typer.Argument(help="Model directory or hub id; default for the default model.")],
    to: Annotated[str, typer.Option(help="int8, int4 or fp8.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the quantised model.")],
    group: Annotated[int | None, typer.Option(help="Columns that share a scale: int4 64 (the default) or 128.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write a model that fails its bounds all the same.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model it is compared with: auto, float32, bfloat16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """A model directory with 8- or 4-bit weights, after a report on what that changed; refused where it changed too much.

    It takes less disk everywhere and less memory and time on a GPU; a CPU unpacks it at load and runs it like the original.
    """
    from kinetok.model.packed import Quantisation
    from kinetok.model.pretrained import check_target, save_pretrained
    from kinetok.runtime import load
    from kinetok.runtime import quantize as gate

    quantisation = Quantisation(kind=to, group=group if group is not None else 64 if to == "int4" else 0)
    check_target(out)
    original = load(None if model == "default" else model, device, dtype).model
    made, report = gate.quantize(original, quantisation)
    failed = gate.failures(report)
    if as_json:
        print_json({**report, "failed": failed})
    else:
        print(report_text(report))
    if failed and not force:
        raise UserError(
            f"{to} changes this model too much: {'; '.join(failed)}; nothing was written (--force writes it)"
        )
    save_pretrained(
        out,
        tokenizer=made.tokenizer,
        decoder=made.decoder,
        mean=made.mean,
        std=made.std,
        skeleton_offsets=made.offsets,
        text_encoder=made.text_encoder,
        sampling=made.sampling,
        provenance={**made.provenance, "quantisation": {**report, "failed": failed}},
        licence=made.licence,
        bank=made.bank,
        quantisation=quantisation,
    )
    if not as_json:
        print(f"wrote {out}")


def report_text(report: dict[str, Any]) -> str:
    """A report of ``kinetok.runtime.quantize`` in five lines."""
    from kinetok.runtime.quantize import BOUNDS

    return "\n".join(
        (
            f"{report['positions']} positions of {report['prompts']} prompts, {report['near_ties']} near ties apart:",
            f"  same greedy token  {report['agreement']:.4f} (at least {BOUNDS.agreement})",
            f"  logit error        {report['logit_error']:.4f} (at most {BOUNDS.logit_error})",
            f"  MPJPE              {report['mpjpe_mm']:.1f} mm (at most {BOUNDS.mpjpe_mm:g})",
            f"  jerk               {report['jerk_ratio']:.2f} times the model's (within {BOUNDS.jerk:g} of 1)",
        )
    )
