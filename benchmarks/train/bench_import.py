"""Importing many clips, and drawing them again: ``python benchmarks/train/bench_import.py --clips 200000 --json FILE``.

The source is MotionMillion's layout: folders of 500 clips of 30 frames, 32.8 kB each, with their captions, all of them links
to one folder, so that the source takes no room. The import runs in processes of its own, of a fiftieth of the clips and of
all, whose peak memory is compared; from the smaller store one process draws training items (tokens and text features; windows
of 30 frames) as the trainings do.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinetok.files import whole_file
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.bench.machine import machine
from kinetok.train.data import sequences
from kinetok.train.data.shard_import import import_shards, summary
from kinetok.train.data.shards import SHARDS, ClipStore
from kinetok.train.decoder import load_tokenizer
from kinetok.train.scale_recipes import scale_recipe

DIFFERENT, FRAMES = 500, 30
TOKENIZER = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)


def make_source(folder: Path, clips: int) -> None:
    rng = np.random.default_rng(0)
    motions, texts = folder / "motion_data/vector_272", folder / "texts"
    lists = folder / "split/version1/t2m_60_300"
    real = {".npy": folder / "real_motions", ".txt": folder / "real_texts"}
    for path in (motions, texts, lists, *real.values()):
        path.mkdir(parents=True)
    for number in range(DIFFERENT):
        np.save(real[".npy"] / f"{number}.npy", rng.standard_normal((FRAMES, 272)).astype(np.float32))
        (real[".txt"] / f"{number}.txt").write_text(f"a person does number {number}\n")
    names: dict[str, list[str]] = {"train": [], "val": []}
    for part in range(-(-clips // DIFFERENT)):
        for place, suffix in ((motions, ".npy"), (texts, ".txt")):
            (place / f"{part:04d}").symlink_to(real[suffix])
        for number in range(DIFFERENT):
            names["val" if number % 20 == 0 else "train"].append(f"{part:04d}/{number}")
    for split, given in names.items():
        (lists / f"{split}.txt").write_text("\n".join(given) + "\n")


def child(source: Path, out: Path) -> None:
    """The import alone, for its time and peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    report = summary(import_shards(source, out))
    after = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "clips": report["clips"],
        "left_out": report["left_out"],
        "shards": report["shards"],
        "seconds": time.perf_counter() - began,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "memory_before_mb": before.ru_maxrss / 1024,
        "peak_memory_mb": after.ru_maxrss / 1024,
    }
    print(json.dumps(result))


def imported(folder: Path, clips: int) -> dict[str, Any]:
    source = folder / f"source{clips}"
    make_source(source, clips)
    command = [sys.executable, __file__, "--child", str(source), str(folder / f"store{clips}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(source)
    return json.loads(done.stdout.splitlines()[-1])


class Encoder:
    dim, name = 384, "synthetic"

    def encode(self, texts: Any) -> list[torch.Tensor]:
        return [torch.zeros(12, self.dim) for _ in texts]


def loading(folder: Path, store: Path, seconds: float) -> dict[str, Any]:
    """Samples a second of one process: items of the decoder's training, windows of the tokenizer's."""
    torch.manual_seed(0)
    state = {"config": asdict(TOKENIZER), "model": MotionTokenizer(TOKENIZER).state_dict()}
    path = folder / "tokenizer.pt"
    torch.save({**state, "mean": torch.zeros(272).double(), "std": torch.ones(272).double()}, path)
    clips = ClipStore(store)
    began = time.perf_counter()
    sequences.write_tokens(clips, path, *load_tokenizer(path))
    tokens_seconds = time.perf_counter() - began
    sequences.text_encoder = lambda spec: Encoder()  # type: ignore[assignment,return-value]
    sequences.write_text(clips, {"type": "none"})
    data = sequences.Sequences(store, tokenizer=path)
    rng = np.random.default_rng(0)
    pick = random.Random(0)

    def item() -> None:
        clip = pick.randrange(len(data.lengths))
        data.tokens(clip)
        data.text(int(data.caption(np.array([clip]), rng.random(1))[0]))

    rates = {}
    for name, call in (("sequences", item), ("windows", lambda: clips.read(pick.randrange(len(clips))))):
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(100):
                call()
            count += 100
        rates[f"{name}_per_second"] = count / (time.perf_counter() - began)
    recipe = scale_recipe("motionmillion-7b")
    return {
        **rates,
        "tokens_seconds": tokens_seconds,
        "demand_sequences_per_step": recipe.batch,
        "demand_sequences_per_step_and_process": recipe.batch / 40,
        "steps_per_second_that_one_worker_feeds": rates["sequences_per_second"] / (recipe.batch / 40),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each loader")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the clips are written and removed again")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        few = imported(folder, options.clips // 50)
        print(json.dumps(few), flush=True)
        loaded = loading(folder, folder / f"store{options.clips // 50}", options.seconds)
        print(json.dumps(loaded), flush=True)
        shutil.rmtree(folder / f"store{options.clips // 50}")
        all_of_them = imported(folder, options.clips)
        store = folder / f"store{options.clips}"
        size = sum(path.stat().st_size for path in (store / SHARDS).iterdir())
        result = {
            "machine": machine(torch.device("cpu")),
            "frames_per_clip": FRAMES,
            "fiftieth": few,
            "all": all_of_them,
            "clips_per_second": all_of_them["clips"] / all_of_them["seconds"],
            "clips_per_cpu_second": all_of_them["clips"] / all_of_them["cpu_seconds"],
            "memory_growth_mb": all_of_them["peak_memory_mb"] - few["peak_memory_mb"],
            "bytes_per_clip_of_growth": (all_of_them["peak_memory_mb"] - few["peak_memory_mb"])
            * 2**20
            / (options.clips * 0.98),
            "shard_bytes": size,
            "loading": loaded,
        }
    print(json.dumps(result, indent=1))
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
