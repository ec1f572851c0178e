"""Folders of TensorRT engines (docs/tensorrt.md): what is in them, and whether this machine can run them."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from kinetok.errors import UserError, missing_package
from kinetok.runtime.bundle import Bundle, check_files
from kinetok.runtime.manifest import INTACT, parsed

ENGINES = "kinetok_engines.json"
FORMAT, VERSION = "kinetok-engines", 2
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def library(kind: str, purpose: str) -> Any:
    """The module of "tensorrt" or "tensorrt-rtx". ``UserError`` naming the package that ``purpose`` needs."""
    try:
        module = importlib.import_module(LIBRARIES[kind])
    except (ImportError, OSError) as error:
        raise missing_package(kind, kind, purpose) from error
    # The package alone may be a stub whose libraries come from the vendor's own index.
    if not hasattr(module, "Builder"):
        raise UserError(f"the package {kind} is here without its libraries: install it as its vendor describes")
    return module


def log_into(trt: Any, said: list[str]) -> Any:
    """A logger of the library that keeps what it calls errors and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)

    return Logger()


def short(words: Sequence[str]) -> str:
    """What a library said, as part of one line."""
    return " ".join(" ".join(words).split())[:300] or "it did not say why"


@dataclass(frozen=True, slots=True)
class Engines(Bundle):
    """A folder of engines whose files are whole. ``manifest`` is the parsed kinetok_engines.json."""

    source: ClassVar[str] = ENGINES

    @property
    def kind(self) -> str:
        """The library that built them, one of ``LIBRARIES``."""
        kind = self.manifest.get("library")
        if kind not in LIBRARIES:
            raise UserError(
                f"{self.directory / ENGINES}: expected the library to be one of {', '.join(LIBRARIES)}, got {str(kind)[:40]!r}"
            )
        return str(kind)

    def engine(self, name: str) -> Path:
        """The file of an engine. ``UserError`` where there is none."""
        return self.directory / self._file(f"{name}.engine")

    def check_gpu(self, capability: tuple[int, int] | None) -> None:
        """Raise ``UserError`` where these were built for other GPUs than one of ``capability`` (None: no GPU)."""
        if capability is None:
            raise UserError("these engines need an NVIDIA GPU, and torch sees none: use the backend onnx or torch")
        targets, own = self.manifest.get("targets"), f"sm_{capability[0]}{capability[1]}"
        if not isinstance(targets, list) or own not in targets:
            named = ", ".join(map(str, targets)) if isinstance(targets, list) else "no GPU that it names"
            how = f" --targets {own}" if self.kind == "tensorrt-rtx" else ""
            raise UserError(
                f"{self.directory}: these engines were built for {named[:80]}, but this GPU is {own}: build them again "
                f"with kinetok export {self.kind}{how}"
            )

    def check_library(self, trt: Any) -> None:
        """Raise ``UserError`` where another version of the library built these: engines are of one version only."""
        built = str(self.manifest.get("library_version"))[:40]
        if built != trt.__version__:
            raise UserError(
                f"{self.directory}: these engines were built by {self.kind} {built}, but {trt.__version__} is installed: "
                f"build them again with kinetok export {self.kind}, or install the version {built}"
            )


def read_engines(path: str | Path) -> Engines:
    """Open a folder of engines. ``UserError`` for another version, a file that is absent, cut or edited, or no engines."""
    folder = Path(path)
    try:
        manifest = parsed(folder / ENGINES)
    except OSError as error:
        raise UserError(
            f"{folder} holds no engines: cannot read {ENGINES} ({error.strerror or error}); make them with kinetok export "
            "tensorrt-rtx or tensorrt"
        ) from error
    version = manifest.get("version")
    if manifest.get("format") != FORMAT or not isinstance(version, int):
        raise UserError(
            f"{folder / ENGINES}: expected the format {FORMAT!r}, got {str(manifest.get('format'))[:40]!r}: {INTACT}"
        )
    if version != VERSION:
        remedy = "update kinetok, or build the engines" if version > VERSION else "build the engines"
        raise UserError(
            f"{folder / ENGINES}: expected version {VERSION}, got {version}: {remedy} again with this kinetok"
        )
    check_files(folder, manifest, ENGINES)
    return Engines(folder, manifest)


def check_here(engines: Engines, purpose: str, device: torch.device | None = None) -> Any:
    """The installed library, for engines of this GPU (None: torch's current one) and this version of it.

    Raises ``UserError`` for any others.
    """
    engines.check_gpu(torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None)
    trt = library(engines.kind, purpose)
    engines.check_library(trt)
    return trt


def deserialize(trt: Any, path: Path, said: list[str]) -> Any:
    """The engine in a file; what it says from then on is added to ``said``.

    Raises ``UserError`` with the library's words where it is none, or cannot run here.
    """
    # The engine keeps the runtime, and the runtime its logger.
    runtime = trt.Runtime(log_into(trt, said))
    engine = runtime.deserialize_cuda_engine(path.read_bytes()) if runtime is not None else None
    if engine is None:
        raise UserError(f"{path}: {trt.__name__} {trt.__version__} cannot load this engine: {short(said)}")
    return engine
