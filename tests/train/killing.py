"""``killing.py import|import-set|tokens|text FOLDER KILLS``: run a job until it is done, killed at random points.

FOLDER has MotionMillion or set, which are imported, or a store and a tokenizer.pt. Every attempt is a fork that kills
itself, as from outside, when it is about to touch the file system for the N-th time. Prints JSON: how often it was killed,
at which of how many points, and the files whose bytes are not those of a run that nobody killed.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet  # noqa: F401  before the forks, which share it
import torch
from torch import Tensor

from kinetok.errors import UserError
from kinetok.model.config import TokenizerConfig
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.train.data import sequences
from kinetok.train.data.shard_import import import_shards
from kinetok.train.data.shards import ClipStore

TOUCHES = ("open", "sqlite3.connect", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
IMPORTS = {"import": ("MotionMillion", 5), "import-set": ("set", 1)}  # source and clips a shard
DONE = 3  # exit code: it was there already


class Letters:
    dim, name = 5, "letters"

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.full((len(text), 5), float(len(text))) for text in texts]


def do(job: str, folder: Path, out: Path) -> None:
    if job in IMPORTS:
        if out.exists():
            raise FileExistsError
        source, clips = IMPORTS[job]
        import_shards(folder / source, out, clips=clips)
    elif job == "tokens":
        torch.manual_seed(0)
        tokenizer = MotionTokenizer(TokenizerConfig(nb_code=256, code_dim=8, width=8, depth=1)).eval()
        mean, std = torch.zeros(272, dtype=torch.float64), torch.ones(272, dtype=torch.float64)
        sequences.BATCH_FRAMES = 100
        sequences.write_tokens(ClipStore(out), folder / "tokenizer.pt", tokenizer, mean, std)
    else:
        sequences.text_encoder = lambda spec, device: Letters()  # type: ignore[assignment,return-value]
        sequences.write_text(ClipStore(out), {"type": "letters"}, progress=lambda *_: sys.audit("os.truncate"))


def attempt(work: Callable[[], None], kill_at: int, counted: Path | None = None) -> int:
    """The exit code of a fork, negative when it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    touched = 0

    def hook(event: str, _: object) -> None:
        nonlocal touched
        if event in TOUCHES:
            touched += 1
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        work()
        if counted is not None:
            counted.write_text(str(touched))
    except FileExistsError:
        os._exit(DONE)
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def tree(folder: Path) -> dict[str, bytes | None]:
    found = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
    return {name: content for name, content in found.items() if name != ".lock"}


def main(job: str, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    out = folder / "out"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if job not in IMPORTS:
            shutil.copytree(folder / "store", out)

    begin()
    assert attempt(lambda: do(job, folder, out), 0, folder / "touches") == 0
    points, whole = int((folder / "touches").read_text()), tree(out)
    rng = random.Random(0)
    killed, differing = 0, set()
    while killed < kills:
        begin()
        while True:
            code = attempt(lambda: do(job, folder, out), rng.randrange(1, points + 1))
            if code in (0, DONE):
                break
            assert code == -signal.SIGKILL, code
            killed += 1
        beside = [path.name for path in folder.iterdir() if path.name.startswith("out.")]
        if code == DONE:  # all was done but for the clearing up
            try:
                import_shards(folder, out)
            except UserError:  # which says that it is there
                beside = [path.name for path in folder.iterdir() if path.name.startswith("out.")]
        got = tree(out)
        differing |= {name for name in {*got, *whole} if got.get(name, b"?") != whole.get(name, b"!")} | set(beside)
    print(json.dumps({"killed": killed, "points": points, "differing": sorted(differing)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
