"""One clip of each probe row as a small picture in docs/images/probes."""

import argparse
import io
from pathlib import Path

import torch
from PIL import Image

import kinetok
from kinetok.files import whole_file
from kinetok.train.probes import PROBES, SECONDS

WIDTH = 900
COLOURS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model directory; the default model without it")
    parser.add_argument("--out", type=Path, default=Path("docs/images/probes"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = kinetok.load(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for probe in PROBES:
        motion = engine.generate(probe.prompt, seed=arguments.seed, seconds=SECONDS)[0]
        name = probe.name.replace(" ", "-")
        target = arguments.out / f"{name}.png"
        motion.save(target)
        with Image.open(target) as picture:
            small = picture.convert("RGB").resize((WIDTH, round(WIDTH * picture.height / picture.width)), Image.LANCZOS)
        buffer = io.BytesIO()
        small.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        with whole_file(target) as temporary:
            temporary.write_bytes(buffer.getvalue())
        passed = probe.passes(motion.joints)
        print(f"{target}  {len(buffer.getvalue()) // 1024} KB  {'passes' if passed else 'does not pass'}")


if __name__ == "__main__":
    main()
