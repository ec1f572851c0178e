"""``kinetok embed``."""

from pathlib import Path
from typing import Annotated

import typer

from kinetok.cli.common import bar, example


def register(app: typer.Typer) -> None:
    app.command(epilog=example("kinetok embed prompts.txt -o bank.safetensors"))(embed)


def embed(
    prompts: Annotated[Path, typer.Argument(help="A UTF-8 file with one sentence a line.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The bank to write.")],
    model: Annotated[str | None, typer.Option(help="The model whose text encoder to use.")] = None,
) -> None:
    """Compute text features ahead of time, so that generating needs no text encoder."""
    from kinetok.files import check_file
    from kinetok.model.bank import PromptBank
    from kinetok.model.pretrained import read_text_encoder
    from kinetok.model.text import read_prompts, text_encoder

    check_file(out)
    texts = read_prompts(prompts)
    encoder = text_encoder(read_text_encoder(model))
    with bar("embedding", shown=True) as update:
        bank = PromptBank.build(texts, encoder, update)
    bank.save(out)
    print(f"wrote {out}  ({len(bank.prompts)} prompts of {encoder.name})")
