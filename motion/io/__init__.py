"""Motion files: the suffix says which kind."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinetok.errors import UserError

if TYPE_CHECKING:
    from kinetok.motion import Motion

WRITES = (".bvh", ".glb", ".npz", ".npy", ".png", ".mp4")
READS = (".bvh", ".glb", ".npz", ".npy")


def save(motion: "Motion", path: str | Path, **options: Any) -> None:
    """Write ``motion`` to ``path``, whole or not at all; ``UserError`` for an unknown suffix.

    .bvh takes the options ``scale`` (units a metre, 1) and ``up`` ("Y" or "Z"); the others take none.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITES:
        raise UserError(f"{path}: expected a file name ending in {', '.join(WRITES)}, got {suffix or 'no suffix'}")
    if options and suffix != ".bvh":
        raise UserError(f"{path}: {suffix} files take no options, got {sorted(options)}")
    if suffix == ".bvh":
        from kinetok.motion.io.bvh import save_bvh

        save_bvh(motion, path, **options)
    elif suffix == ".glb":
        from kinetok.motion.io.glb import save_glb

        save_glb(motion, path)
    elif suffix in (".npz", ".npy"):
        from kinetok.motion.io.npz import save_numpy

        save_numpy(motion, path)
    elif suffix == ".png":
        from kinetok.motion.render import save_png

        save_png(motion, path)
    else:
        from kinetok.motion.render import save_mp4

        save_mp4(motion, path)


def load(path: str | Path) -> "Motion":
    """Read a motion file. ``UserError`` for an unknown suffix, a missing file, or one that is not what its suffix says."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READS:
        raise UserError(f"{path}: expected a motion file ending in {', '.join(READS)}, got {suffix or 'no suffix'}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if suffix == ".bvh":
        from kinetok.motion.io.bvh import load_bvh

        return load_bvh(path, data)
    if suffix == ".glb":
        from kinetok.motion.io.glb import load_glb

        return load_glb(path, data)
    from kinetok.motion.io.npz import load_numpy

    return load_numpy(path, data)
