"""A folder of clips and its index: what lets a run that was interrupted go on where it stopped."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinetok.errors import UserError, missing_package

VERSION = 1  # of the index
FORMATS = {
    "bvh": ("pybvh",),
    "glb": ("pygltflib",),
    "npz": (),
    "npy": (),
    "png": ("PIL",),
    "mp4": ("PIL", "imageio_ffmpeg"),
}
"""Each format and the packages it needs."""


@dataclass(frozen=True, slots=True)
class Job:
    """One clip to make: line ``number`` of the sentences, counted from 0."""

    number: int
    text: str

    @property
    def stem(self) -> str:
        """The clip's name and that of its files."""
        letters = "".join(c if c.isascii() and c.isalnum() else " " for c in self.text.lower())
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:6]
        return f"{self.number:03d}-{'-'.join(letters.split())[:40].strip('-') or 'clip'}-{digest}"


@dataclass(slots=True)
class ClipFolder:
    """The clips in the folder of the file ``index``, made with ``settings`` and written in the formats ``suffixes``.

    Raises ``UserError`` when ``index`` is there and is no index.
    """

    index: Path
    settings: dict[str, Any]
    suffixes: list[str]
    clips: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.clips = _read(self.index)

    @property
    def path(self) -> Path:
        return self.index.parent

    def done(self, job: Job) -> bool:
        """Whether the clip is there, with the same settings and in every format."""
        entry = self.clips.get(job.stem)
        return (
            entry is not None
            and entry.get("prompt") == job.text
            and entry.get("settings") == self.settings
            and all(name.rpartition(".")[0] and (self.path / name).exists() for name in entry.get("files", []))
            and {name.rpartition(".")[2] for name in entry.get("files", [])} >= set(self.suffixes)
        )

    def add(self, job: Job, motion: Any, seed: int, **more: Any) -> None:
        """Write the files of a clip, then the index with it and ``more`` about it."""
        from kinetok.files import whole_file

        files = [f"{job.stem}.{suffix}" for suffix in self.suffixes]
        for name in files:
            motion.save(self.path / name)
        self.clips[job.stem] = {
            "prompt": job.text,
            "settings": self.settings,
            "seed": seed,
            "frames": len(motion),
            "duration_s": round(motion.duration, 3),
            **more,
            "files": files,
        }
        text = json.dumps({"version": VERSION, "clips": self.clips}, indent=1, ensure_ascii=False)
        with whole_file(self.index) as temporary:
            temporary.write_text(text, encoding="utf-8")


def parse_formats(texts: list[str]) -> list[str]:
    """The formats of one or several comma lists. ``UserError`` for one that is unknown or whose package is missing."""
    suffixes = [part.strip().lstrip(".").lower() for text in texts for part in text.split(",") if part.strip()]
    unknown = [suffix for suffix in suffixes if suffix not in FORMATS]
    if unknown or not suffixes:
        raise UserError(f"--format: expected some of {', '.join(FORMATS)}, got {','.join(texts)!r}")
    for suffix in suffixes:
        for package in FORMATS[suffix]:
            # Before the model runs, not after.
            if importlib.util.find_spec(package) is None:
                raise missing_package(package, "files", f"writing .{suffix} (see --format)")
    return list(dict.fromkeys(suffixes))


def manifest_digest(manifest: Path) -> str:
    """Which model made a clip: its manifest names sizes, training run and files."""
    try:
        return hashlib.sha256(manifest.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise UserError(f"cannot read {manifest}: {error.strerror or error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        clips = {str(stem): dict(entry) for stem, entry in index["clips"].items()}
        version = index["version"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: expected the index of an earlier run; move it away or name another folder") from error
    if version != VERSION:
        raise UserError(
            f"{path}: expected an index of version {VERSION}, got version {str(version)[:20]!r}; move it away or name another "
            "folder"
        )
    return clips
