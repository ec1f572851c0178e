"""Import a synthetic 8 GB decoder checkpoint and measure private memory: ``python benchmarks/model/soak_import.py``.

The file is a 16-bit ``.pth`` with a pickled optimiser object beside the weights, written entry by entry so that it is
never in memory. It and the imported directory (16 GB together) are deleted afterwards. Private memory is RssAnon of
/proc/self/status, which leaves out pages that belong to the mapped file; the whole resident size is reported beside it.
"""

import argparse
import io
import json
import math
import pickle
import platform
import shutil
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from kinetok.model.checkpoint import import_checkpoint, open_decoder
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import own_tensors
from kinetok.model.released import decoder_rows, released_shapes, to_released, tokenizer_rows
from kinetok.model.tensor_files import read_safetensors
from kinetok.model.tokenizer import MotionTokenizer

RESULTS = Path(__file__).parents[1] / "results" / "soak_import.json"
LIMIT_GB = 6.0


class DeepSpeedOptimizer:
    """Stands for the optimiser object that the training files are said to carry."""

    def __init__(self) -> None:
        self.state = {"step": 1}


class StoragePickler(pickle.Pickler):
    """Writes ``Blank`` tensors as torch would, without having their values."""

    def persistent_id(self, value: object) -> object:
        if isinstance(value, BlankStorage):
            return ("storage", torch.BFloat16Storage, value.key, "cpu", value.count)
        return None


class BlankStorage:
    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class Blank:
    def __init__(self, key: str, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = BlankStorage(key, int(np.prod(shape))), shape

    def __reduce__(self) -> tuple[object, ...]:
        strides = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


def write_pth(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bf16 checkpoint of the given shapes, values repeating a random megabyte."""
    tensors = OrderedDict((f"module.{name}", Blank(str(i), shape)) for i, (name, shape) in enumerate(shapes.items()))
    noise = (torch.randn(1 << 19) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    program = io.BytesIO()
    StoragePickler(program, protocol=2).dump({"trans": tensors, "optimizer": DeepSpeedOptimizer(), "nb_iter": 1})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        file.writestr("archive/data.pkl", program.getvalue())
        file.writestr("archive/byteorder", "little")
        for tensor in tensors.values():
            size = tensor.storage.count * 2
            info = zipfile.ZipInfo(f"archive/data/{tensor.storage.key}")
            info.file_size = size
            # With a 64-bit size field of 20 bytes the data begin on a multiple of 64, as torch has them.
            at = file.fp.tell() + 30 + len(info.filename) + 20 + 4
            info.extra = struct.pack("<2H", 0x4246, -at % 64) + bytes(-at % 64)
            with file.open(info, "w", force_zip64=True) as entry:
                for start in range(0, size, len(noise)):
                    entry.write(noise[: min(len(noise), size - start)])


class Memory(threading.Thread):
    """Samples this process's memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(rest.split()[0]) * 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--folder", type=Path, help="where the files go while it runs (needs twice the size)")
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        print("this measurement reads /proc/self/status, which this system does not have", file=sys.stderr)
        return 2
    per_layer = 4 * 4096**2 + 3 * 11008 * 4096
    layers = max(1, math.ceil((options.gigabytes * 1e9 / 2 - 2 * 64002 * 4096) / per_layer))
    config = DecoderConfig(n_layer=layers, n_head=32, n_embd=4096)
    with torch.device("meta"):
        shapes = released_shapes(decoder_rows(config), own_tensors(MotionDecoder(config)))
    folder = Path(tempfile.mkdtemp(prefix="kinetok-soak-", dir=options.folder))
    try:
        decoder, tokenizer = folder / "decoder.pth", folder / "tokenizer.pth"
        write_pth(decoder, shapes)
        small = TokenizerConfig()
        torch.manual_seed(0)
        released = to_released(tokenizer_rows(small), own_tensors(MotionTokenizer(small)))
        wavelets = {"encoder.model.0.wavelets": torch.full((2,), 0.70710678)}
        torch.save(
            {"net": {f"vqvae.{k}": v.detach().contiguous() for k, v in (released | wavelets).items()}}, tokenizer
        )
        np.save(folder / "mean.npy", np.zeros(272))
        np.save(folder / "std.npy", np.ones(272))
        memory = Memory()
        memory.start()
        start = time.perf_counter()
        import_checkpoint(
            folder / "model",
            tokenizer=tokenizer,
            decoder=decoder,
            mean=folder / "mean.npy",
            std=folder / "std.npy",
            config={"n_head": 32},
        )
        seconds = time.perf_counter() - start
        memory.done.set()
        memory.join()
        written = sum(path.stat().st_size for path in (folder / "model").iterdir())
        source, exact = open_decoder(decoder, {"n_head": 32}), 0
        for path in sorted((folder / "model").glob("decoder-*")):
            shard = read_safetensors(path)
            back = to_released([row for row in source.rows if row.ours in shard], shard)
            exact += sum(torch.equal(value, source.tensors[name]) for name, value in back.items())
        result = {
            "what": "import-checkpoint of a synthetic bf16 decoder with a pickled optimiser object",
            "file_gb": round(decoder.stat().st_size / 1e9, 3),
            "written_gb": round(written / 1e9, 3),
            "seconds": round(seconds, 1),
            "peak_private_gb": round(memory.peak["RssAnon"] / 1e9, 3),
            "peak_resident_gb_with_mapped_file": round(memory.peak["VmRSS"] / 1e9, 3),
            "limit_private_gb": LIMIT_GB,
            "tensors_bit_exact": f"{exact} of {len(source.tensors)}",
            "passed": memory.peak["RssAnon"] < LIMIT_GB * 1e9 and exact == len(source.tensors),
            "layers": layers,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
        }
    finally:
        shutil.rmtree(folder)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
