"""A toy that the training loop fits, and a small folder in MotionMillion's layout."""

import importlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.train.data.recordings import Recording, write_recordings
from kinetok.train.data.store import Entry
from kinetok.train.optim import LoopConfig
from kinetok.train.scale_recipes import ScaleRecipe
from kinetok.train.tokenizer import save_tokenizer

ROOT = Path(__file__).parents[2]

CONFIG = LoopConfig(steps=40, lr=0.05, warmup=4, validate_every=10, save_every=10, ema=0.9)


class Line:
    """Fits y = 2 x + noise; ``stop`` interrupts after that many draws."""

    def __init__(self, stop: int = 10**9, bad: bool = False) -> None:
        torch.manual_seed(1)
        self.module: nn.Module = nn.Linear(1, 1)
        self.stop, self.bad = stop, bad

    def loss(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        if step >= self.stop:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((8, 1))).float()
        loss = (self.module(x) - 2 * x + 0.01 * torch.randn(8, 1)).square().mean()
        return {"loss": loss * (torch.nan if self.bad else 1)}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> Mapping[str, float]:
        return {"loss": float((module(torch.ones(1, 1)) - 2).abs().sum())}


@pytest.fixture
def line() -> type[Line]:
    return Line


@pytest.fixture
def config() -> LoopConfig:
    return CONFIG


@pytest.fixture
def names() -> list[str]:
    """The clips of ``motionmillion``."""
    return [f"part{i % 3}/clip.{i}" for i in range(25)]


def features(name: str) -> np.ndarray:
    """Those of the clip in ``motionmillion``: 40, 42, 44 or 46 frames."""
    number = int(name.split(".")[-1])
    return np.random.default_rng(len(name) + number).standard_normal((40 + 2 * (number % 4), 272)).astype(np.float32)


@pytest.fixture
def motionmillion(tmp_path: Path, names: list[str]) -> Path:
    """MotionMillion's layout with 25 clips, every fifth in val; each has a caption of its own and one that all share."""
    folder = tmp_path / "MotionMillion"
    motions, texts = folder / "motion_data/vector_272", folder / "texts"
    lists = folder / "split/version1/t2m_60_300"
    for name in names:
        (motions / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(motions / f"{name}.npy", features(name))
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / f"{name}.txt").write_text(f"a person walks {name}\n\na person walks\n")
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(n for i, n in enumerate(names) if i % 5) + "\n")
    (lists / "val.txt").write_text("\n".join(names[::5]) + "\n")
    return folder


@pytest.fixture
def clip_features() -> Callable[[str], np.ndarray]:
    return features


class TrainedStore:
    """A folder with a clip store of 40 clips, 33 of them for training, and the tokenizer of its tokens; and a recipe."""

    def __init__(self, folder: Path) -> None:
        self.store, self.tokenizer = folder / "store", folder / "tokenizer.pt"
        config = TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)
        model = DecoderConfig(n_layer=2, n_head=2, n_embd=16, codebook=config.codebook, text_dim=6, block_size=80)
        loop = LoopConfig(steps=6, lr=3e-3, warmup=2, validate_every=3, save_every=2, log_every=1, ema=0.9)
        self.recipe = ScaleRecipe(model=model, loop=loop, batch=8, min_tokens=5, max_tokens=60, bf16=False)
        torch.manual_seed(0)
        mean, std = torch.zeros(272, dtype=torch.float64), torch.ones(272, dtype=torch.float64)
        save_tokenizer(self.tokenizer, MotionTokenizer(config), mean, std, {})


@pytest.fixture(scope="session")
def trained_store(tmp_path_factory: pytest.TempPathFactory) -> TrainedStore:
    """Clips of 30 to 68 frames with tokens and text features of width 6."""
    pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
    from kinetok.train.data import sequences
    from kinetok.train.data.shard_import import import_shards
    from kinetok.train.data.shards import ClipStore
    from kinetok.train.decoder import load_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    source = folder / "MotionMillion"
    rng = np.random.default_rng(0)
    for kind in ("motion_data/vector_272", "texts", "split/version1/t2m_60_300"):
        (source / kind).mkdir(parents=True)
    for number in range(40):
        frames = rng.standard_normal((30 + 2 * (number % 20), 272)).astype(np.float32)
        np.save(source / "motion_data/vector_272" / f"{number}.npy", frames)
        (source / "texts" / f"{number}.txt").write_text(f"a person does {number}\n" * (1 + number % 2))
    lists = source / "split/version1/t2m_60_300"
    (lists / "train.txt").write_text("\n".join(map(str, range(33))))
    (lists / "val.txt").write_text("\n".join(map(str, range(33, 40))))
    import_shards(source, folder / "store", clips=16)
    found = TrainedStore(folder)
    clips = ClipStore(found.store)
    sequences.write_tokens(clips, found.tokenizer, *load_tokenizer(found.tokenizer))

    class Encoder:
        dim, name = 6, "numbers"

        def encode(self, texts: list[str]) -> list[Tensor]:
            return [torch.linspace(0, len(text), 6 * (3 + len(text) % 5)).view(-1, 6) for text in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "text_encoder", lambda spec, device: Encoder())
        sequences.write_text(clips, {"type": "none", "name": "numbers"})
    return found


class Processes:
    """Processes that each run a program with torchrun's variables."""

    def __init__(self, program: str, world: int, *, room: int | None = None, **extra: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **extra}
        shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
        limit = None if room is None else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=limit,
            )
            for rank in range(world)
        ]

    def end(self, timeout: float = 300) -> list[tuple[int, str, str]]:
        """(exit code, output, errors) of each, which have to end by themselves."""
        found = []
        try:
            for process in self.all:
                output, errors = process.communicate(timeout=timeout)
                found.append((process.returncode, output, errors))
        finally:
            for process in self.all:
                process.kill()
        return found


@pytest.fixture(scope="session")
def processes() -> type[Processes]:
    return Processes


@pytest.fixture
def killed() -> Callable[[str, Path, int], dict]:
    """What ``killing.py`` says of a job in a folder that was killed so often."""

    def run(job: str, folder: Path, kills: int) -> dict:
        script = Path(__file__).with_name("killing.py")
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2] / "src")}
        command = [sys.executable, str(script), job, str(folder), str(kills)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


class Operators(TorchDispatchMode):
    """Counts the calls of the project's operators, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = function.name().partition("::")
        if space == "kinetok":
            self.calls[name.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def through_operators(monkeypatch: pytest.MonkeyPatch) -> type[Operators]:
    """From here on every call takes its operator, as calls with CUDA tensors do; on a CPU those run the definitions."""
    for path in (ROOT / "kernels").glob("*/op.py"):
        module = importlib.import_module(f"kinetok.kernels.{path.parent.name}.op")
        if hasattr(module, "takes_op"):
            monkeypatch.setattr(module, "takes_op", lambda *tensors: True)
    return Operators


def motions(folder: Path, captions: Mapping[str, str], splits: Mapping[str, str]) -> Path:
    """A motion set of swaying figures of 40 frames, called a, b, c; c moves as a does."""
    folder.mkdir()
    recordings = []
    for name in splits:
        rng = np.random.default_rng("ab".find(name) % 2)
        vectors = np.sin(np.linspace(0, 6, 40)[:, None, None] + rng.uniform(0, 3, (22, 1))) * rng.uniform(
            -0.4, 0.4, (22, 3)
        )
        vectors[:, [16, 17]] += [[0, 0, -1.2], [0, 0, 1.2]]
        recordings.append((name, Recording(vectors, np.tile([0, 0.9, 0], (40, 1)), np.array(CANONICAL_OFFSETS))))
    write_recordings(folder / "motions_x.npz", recordings)
    shared: dict[str, Any] = {"kind": "whole", "start": 0, "end": 40, "subject": "", "label": ""}
    lines = [
        Entry(id=name, trial=name, split=split, captions=(captions[name],), **shared) for name, split in splits.items()
    ]
    (folder / "clips_x.jsonl").write_text("\n".join(json.dumps(asdict(line)) for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def motion_set() -> Callable[[Path, Mapping[str, str], Mapping[str, str]], Path]:
    return motions
