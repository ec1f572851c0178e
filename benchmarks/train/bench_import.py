"""Importing many clips, and drawing them again: ``python benchmarks/train/bench_import.py --clips 200000 --json FILE``.

The source is MotionMillion's layout: folders of 500 clips of 30 frames, 32.8 kB each, with their captions, all of them links
to one folder, so that the source takes no room. A quarter of the clips and all of them are imported, each by a process of
its own, whose peak memory is compared. From the smaller store the trainings' steps are drawn (packed tokens and text
features of a 2,048 wide encoder, as a process of forty of the 7B's recipe takes them; and windows, which the tokenizer
takes), by the training process itself and by workers, the threads that prepare steps ahead.

Beside the samples a second of a worker stands what a GPU of each recipe takes at the speed that we aim at, 46 % of the 989
TFLOP/s of an H100 in bf16: a bound by arithmetic, not a measurement.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinetok.files import whole_file
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.runtime.bench.machine import machine
from kinetok.train.data import sequences
from kinetok.train.data.loading import load
from kinetok.train.data.shard_import import import_shards, summary
from kinetok.train.data.shards import SHARDS, ClipStore
from kinetok.train.decoder import load_tokenizer
from kinetok.train.feed import Feed
from kinetok.train.rates import rates_of
from kinetok.train.scale_recipes import GOAL, H100, scale_recipe, step_flop

DIFFERENT, FRAMES = 500, 30
TOKENIZER = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)
PROCESSES, POSITIONS = 40, 16_384
TEXT, MOTION = 24, 91  # features and tokens (with the end) of a mean clip of 2 to 10 s, as bench_train.py has them


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


def peak_mb() -> float:
    """The most memory that this program has held; unlike getrusage's, not that of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def child(source: Path, out: Path) -> None:
    """The import alone, for its time and peak memory."""
    before = peak_mb()
    began, began_cpu = time.perf_counter(), time.process_time()
    report = summary(import_shards(source, out))
    result = {name: report[name] for name in ("clips", "left_out", "shards")}
    result |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
    print(json.dumps({**result, "memory_before_mb": before, "peak_memory_mb": peak_mb()}))


def imported(folder: Path, clips: int) -> dict[str, Any]:
    source = folder / f"source{clips}"
    make_source(source, clips)
    command = [sys.executable, __file__, "--child", str(source), str(folder / f"store{clips}")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(source)
    return json.loads(done.stdout.splitlines()[-1])


class Encoder:
    dim, name = 2048, "synthetic"

    def encode(self, texts: Any) -> list[torch.Tensor]:
        return [torch.zeros(8 + sum(text.encode()) % 33, self.dim) for text in texts]


def loading(folder: Path, store: Path, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    state = {"config": asdict(TOKENIZER), "model": MotionTokenizer(TOKENIZER).state_dict()}
    path = folder / "tokenizer.pt"
    torch.save({**state, "mean": torch.zeros(272).double(), "std": torch.ones(272).double()}, path)
    clips = ClipStore(store)
    began = time.perf_counter()
    sequences.write_tokens(clips, path, *load_tokenizer(path))
    tokens_seconds = time.perf_counter() - began
    sequences.text_encoder = lambda spec, device: Encoder()  # type: ignore[assignment,return-value]
    sequences.write_text(clips, {"type": "none"})
    data = sequences.Sequences(store, tokenizer=path)
    recipe = replace(scale_recipe("motionmillion-7b"), min_tokens=1)
    feed = Feed(recipe, data, np.flatnonzero(data.splits == "train"), pass_positions=POSITIONS, world=PROCESSES)
    windows = recipe.batch // PROCESSES

    def window(step: int) -> torch.Tensor:
        pick = random.Random(step)
        return torch.stack([torch.from_numpy(clips.read(pick.randrange(len(clips)))) for _ in range(windows)])

    rates = []
    for workers in (0, 1, 2):
        row: dict[str, Any] = {"workers": workers}
        for name, make in (("sequences", feed.step), ("windows", window)):
            whole, cpu = rates_of(load(make, 0, 10**9, workers), windows, seconds)
            row[f"{name}_per_second"] = whole
            row[f"{name}_per_second_and_worker"] = whole / max(1, workers)
            row[f"{name}_per_cpu_second"] = cpu
        rates.append(row)
    demands = []
    for size in ("44m", "111m", "343m", "775m", "1b", "3b", "7b"):
        chosen = scale_recipe(f"motionmillion-{size}")
        demand = GOAL * H100 / step_flop(chosen.model, 1, TEXT, MOTION)
        demands.append(
            {
                "recipe": f"motionmillion-{size}",
                "sequences_per_second_and_gpu": demand,
                "workers_per_gpu": demand / rates[1]["sequences_per_second"],
                "cores_per_gpu": demand / rates[0]["sequences_per_cpu_second"],
            }
        )
    return {"tokens_seconds": tokens_seconds, "rates": rates, "demand_at_46_percent_of_989_tflops": demands}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        quarter = imported(folder, options.clips // 4)
        print(json.dumps(quarter), flush=True)
        loaded = loading(folder, folder / f"store{options.clips // 4}", options.seconds)
        print(json.dumps(loaded, indent=1), flush=True)
        shutil.rmtree(folder / f"store{options.clips // 4}")
        every = imported(folder, options.clips)
        store = folder / f"store{options.clips}"
        result = {
            "machine": machine(torch.device("cpu")),
            "frames_per_clip": FRAMES,
            "quarter": quarter,
            "all": every,
            "clips_per_second": every["clips"] / every["seconds"],
            "clips_per_cpu_second": every["clips"] / every["cpu_seconds"],
            "memory_growth_mb": every["peak_memory_mb"] - quarter["peak_memory_mb"],
            "shard_bytes": sum(path.stat().st_size for path in (store / SHARDS).iterdir()),
            "loading": loaded,
        }
    print(json.dumps(result, indent=1))
    if options.json:
        with whole_file(options.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
