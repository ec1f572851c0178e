"""The 7B at full size, fp16, exported from fake tensors: time, size and memory, onnx's checker, and two layers run.

    python benchmarks/export/full_7b.py --folder /tmp/7b --json benchmarks/results/export_7b.json

Needs 16 GB under --folder, which is removed again, and minutes. The decoder exists on the meta device alone; random
weights are drawn one tensor at a time as the external file grows, so private memory stays at about one tensor. The two layers
that are run are the first two with the embedding and the head around them: graphs of their own over the full size's file, on
ONNX Runtime against torch with the same weights in fp32.
"""

import argparse
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetok.model.config import DecoderConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.graphs.builder import WeightFile, check_model
from kinetok.model.graphs.decoder import DecoderExport
from kinetok.model.graphs.precision import Precision, Tensors
from kinetok.model.presets import decoder_preset
from kinetok.runtime.bench.machine import machine

LIMIT_BYTES = 3 << 30
RUN_LAYERS = 2
TOLERANCE = 5e-3  # of the largest logit: fp16 rounding through two layers of width 4096


def private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) << 10


class Watch(threading.Thread):
    """The largest private memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.largest = max(self.largest, private_bytes())


def drawn(shapes: dict[str, torch.Size]) -> Tensors:
    """Each weight is a window into one sequence of random numbers, said over and over; the same whenever it is asked for.

    Drawing all 6.9 billion would take longer than the export itself, which does not care what they are.
    """
    period = 4_194_301  # a prime, so that no two rows are alike
    numbers = torch.randn(period, generator=torch.Generator().manual_seed(0)).half()

    def tensor(name: str) -> Tensor:
        shape = shapes[name]
        if name.endswith("scale"):
            return torch.ones(shape, dtype=torch.float16)
        count, start = shape.numel(), sum(name.encode()) * 7919 % period
        values = numbers.roll(-start).repeat(-(-count // period))[:count].view(shape)
        return values if name == "embed.weight" else values.mul_(shape[-1] ** -0.5)

    return tensor


def write(folder: Path) -> dict[str, Any]:
    """Export the decoder and, over the same weights' file, its first ``RUN_LAYERS``; time and sizes of the whole one."""
    config = decoder_preset("7B")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MotionDecoder(config).state_dict().items()}

    def graphs(weights: WeightFile, config: DecoderConfig, suffix: str) -> None:
        half = np.dtype(np.float16)
        export = DecoderExport(config=config, tensors=drawn(shapes), precision=Precision(name="fp16"), kv_dtype=half)
        for graph in (export.prefill(weights), export.decode(weights)):
            (folder / f"{graph.name}{suffix}.onnx").write_bytes(graph.model().SerializeToString())

    began = time.perf_counter()
    with (folder / "weights.bin").open("wb") as file:
        weights = WeightFile(file, "weights.bin")
        graphs(weights, config, "")
        spent, size = time.perf_counter() - began, file.tell()
        graphs(weights, replace(config, n_layer=RUN_LAYERS), "_piece")
        assert file.tell() == size, "the piece has weights of its own"
    return {
        "layers": config.n_layer,
        "parameters": sum(shape.numel() for shape in shapes.values()),
        "seconds": round(spent, 1),
        "weights_bytes": size,
        "graph_bytes": {name: (folder / f"{name}.onnx").stat().st_size for name in ("prefill", "decode")},
    }


def run(folder: Path) -> dict[str, Any]:
    """The piece: prefill and one step on ONNX Runtime against torch with the same fp16 weights in fp32."""
    import onnxruntime

    config = decoder_preset("7B", n_layer=RUN_LAYERS)
    with torch.device("meta"):
        decoder = MotionDecoder(config)
    state = decoder.state_dict()
    tensor = drawn({name: value.shape for name, value in state.items()})
    decoder.load_state_dict({name: tensor(name).float() for name in state}, assign=True)
    decoder.eval()
    text = torch.randn(7, config.text_dim, generator=torch.Generator().manual_seed(0))
    cache = decoder.new_cache(1, 16)
    with torch.inference_mode():
        wanted = [decoder.prefill([text], cache), decoder.decode_step(torch.tensor([5]), cache)]
    del decoder, state
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    past = {
        f"past_key_values.{i}.{kind}": np.zeros((1, config.n_head, 16, config.head_dim), np.float16)
        for i in range(RUN_LAYERS)
        for kind in ("key", "value")
    }
    feeds = {"text_features": text.numpy()[None], "text_lengths": np.array([len(text)]), **past}
    differences = []
    for graph, expected in zip(("prefill", "decode"), wanted, strict=True):
        session = onnxruntime.InferenceSession(
            str(folder / f"{graph}_piece.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_outputs()]
        results = dict(zip(names, session.run(names, feeds), strict=True))
        differences.append(float(np.abs(results.pop("logits") - expected.numpy()).max() / expected.abs().max()))
        past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        feeds = {"input_ids": np.array([[5]]), "position_ids": np.array([[len(text)]]), **past}
        del session
    return {"relative_difference": dict(zip(("prefill", "decode"), differences, strict=True)), "tolerance": TOLERANCE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="a new folder with 16 GB of room; removed at the end"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir()
    result: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    try:
        watch, before = Watch(), private_bytes()
        watch.start()
        result["export"] = write(arguments.folder)
        watch.over.set()
        watch.join()
        result["export"]["private_bytes"] = {"before": before, "largest": watch.largest, "limit": LIMIT_BYTES}
        print(result["export"], flush=True)
        began = time.perf_counter()
        for graph in ("prefill", "decode"):
            check_model(arguments.folder / f"{graph}.onnx")
        result["checker"] = {"passed": True, "seconds": round(time.perf_counter() - began, 1)}
        print("onnx's checker passed", flush=True)
        result["two_layers"] = run(arguments.folder)
        print(result["two_layers"], flush=True)
    finally:
        shutil.rmtree(arguments.folder)
    fine = watch.largest <= LIMIT_BYTES and max(result["two_layers"]["relative_difference"].values()) <= TOLERANCE
    result["passed"] = fine
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
