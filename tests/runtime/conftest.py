"""Scripts as modules, folders of engines, and what builds runtime/cpp."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.model.decoder import MotionDecoder
from kinetok.model.pretrained import ModelBundle
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.skeleton import CANONICAL_OFFSETS
from kinetok.runtime.bundle import file_digest
from kinetok.runtime.engines import ENGINES, FORMAT, VERSION, Engines, read_engines


def _script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    file = Path(__file__).parents[2] / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    return _script


@pytest.fixture(scope="session")
def soak() -> ModuleType:
    return _script("benchmarks/runtime/soak_crowd.py")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> ModelBundle:
    """Two layers and a head of 4,375 classes; a causal tokenizer without text encoder or bank."""
    torch.manual_seed(3)
    tokenizer = TokenizerConfig(nb_code=4096, code_dim=8, width=16, depth=2, patcher="none", causal=True)
    config = DecoderConfig(n_layer=2, n_head=2, n_embd=192, codebook=tokenizer.codebook, text_dim=8, block_size=64)
    return ModelBundle(
        tokenizer=MotionTokenizer(tokenizer).eval(),
        decoder=MotionDecoder(config).eval(),
        mean=np.zeros(272),
        std=np.ones(272),
        offsets=np.array(CANONICAL_OFFSETS),
        text_encoder={"type": "none"},
        sampling={},
        provenance={},
        licence="none",
        bank=None,
        directory=tmp_path_factory.mktemp("none"),
    )


@pytest.fixture(scope="session")
def engine_folder() -> Callable[..., Path]:
    """Writes a folder in the form of exported engines, for sm_86 and sm_120 by TensorRT-RTX 1.0; keywords change its manifest.

    What the engines hold is the caller's business.
    """
    pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    from kinetok.export.bundle import decoder_facts

    def write(folder: Path, config: DecoderConfig, engines: dict[str, bytes], **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in engines.items():
            (folder / name).write_bytes(data)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "library": "tensorrt-rtx",
            "library_version": "1.0",
            "targets": ["sm_86", "sm_120"],
            "kv_dtype": "float32",
            "batches": [1, 4],
            "positions": config.block_size,
            "decoder": decoder_facts(config),
            "files": {
                name: dict(zip(("sha256", "bytes"), file_digest(folder / name), strict=True)) for name in engines
            },
            **changes,
        }
        (folder / ENGINES).write_text(json.dumps(manifest))
        return folder

    return write


class Cpp:
    """runtime/cpp on this machine: its sources, how to run programs, and the library of ONNX Runtime."""

    source = Path(__file__).resolve().parents[2] / "runtime" / "cpp"

    def __init__(self) -> None:
        import onnxruntime

        self.onnxruntime = next((Path(onnxruntime.__file__).parent / "capi").glob("*onnxruntime.so.*"))
        self.environment = {
            **os.environ,
            "KINETOK_ONNXRUNTIME": str(self.onnxruntime),
            "ORT_DISABLE_TELEMETRY": "1",
            # ONNX Runtime keeps what it has until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }

    def run(self, *command: object, data: bytes | None = None, code: int = 0, **environment: str) -> str:
        """What a program says on its standard output, or all it says where it should end with another code than 0."""
        words, names = [str(word) for word in command], {**self.environment, **environment}
        done = subprocess.run(words, input=data, capture_output=True, env=names)
        said = done.stdout.decode() + done.stderr.decode()
        assert done.returncode == code, f"{words[0]}: exit code {done.returncode}\n{said[-4000:]}"
        return said if code else done.stdout.decode()

    def build(self, folder: Path, *targets: str, source: Path | None = None, **options: object) -> Path:
        """Configure with -DNAME=VALUE and build."""
        given = [f"-D{name}={value}" for name, value in options.items()]
        self.run("cmake", "-S", source or self.source, "-B", folder, *given)
        self.run("cmake", "--build", folder, "--parallel", "2", *(["--target", *targets] if targets else []))
        return folder

    def own_tests(self, build: Path, program: str, bundle: Path, scratch: Path, **environment: str) -> str:
        """What a program of the library's own tests says; skipped where CMake found no GoogleTest to build it with."""
        if "GTest_DIR:PATH=GTest_DIR-NOTFOUND" in (build / "CMakeCache.txt").read_text():
            pytest.skip(
                "GoogleTest is not installed: apt install libgtest-dev (Debian, Ubuntu), or another package of it"
            )
        return self.run(build / "tests" / program, bundle, scratch, **environment)


@pytest.fixture(scope="session")
def cpp() -> Cpp:
    for program in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed: pip install 'kinetok[onnx]'")
    return Cpp()


@pytest.fixture(scope="session")
def stand_in() -> ModuleType:
    """The module in TensorRT-RTX's place, ``stand_in_tensorrt.py``."""
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    return _script("tests/runtime/stand_in_tensorrt.py")


@pytest.fixture(scope="session")
def stand_in_engines(stand_in, engine_folder, tmp_path_factory) -> Callable[..., Engines]:
    """Engines of a decoder for the stand-in, of the graphs that the real ones are built from."""
    from kinetok.export.tensorrt import OPSET
    from kinetok.model.graphs.builder import WeightFile
    from kinetok.model.graphs.decoder import DecoderExport, module_tensors
    from kinetok.model.graphs.precision import Precision

    def write(
        decoder: MotionDecoder, dtype: str = "fp32", positions: int = 64, batches: tuple[int, ...] = (1, 4)
    ) -> Engines:
        folder, precision = tmp_path_factory.mktemp("engines"), Precision(name=dtype, target="tensorrt")
        export = DecoderExport(
            config=decoder.config,
            tensors=module_tensors(decoder),
            precision=precision,
            kv_dtype=precision.activations,
            opset=OPSET,
            capacity=positions,
        )
        files = {}
        with (folder / "weights.bin").open("wb") as file:
            weights = WeightFile(file, "weights.bin")
            for graph in (export.prefill(weights), export.decode(weights)):
                (folder / f"{graph.name}.onnx").write_bytes(graph.model().SerializeToString())
                files[f"{graph.name}.engine"] = stand_in.engine_file(
                    folder / f"{graph.name}.onnx", batches, positions - 1
                )
        kv = precision.activations.name
        return read_engines(
            engine_folder(
                folder / "out", decoder.config, files, kv_dtype=kv, positions=positions, batches=list(batches)
            )
        )

    return write
