"""Files are written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kinetok.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it into place on success, delete it on failure.

    It has the suffix of ``path`` in lower case, which writers that go by suffixes want. Missing parent folders are made.
    Raises ``UserError`` when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"cannot write {path}: expected a file name, but it is a folder")
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix.lower(), dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes files private; a file the user asked for follows the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """``UserError`` where no file ``path`` can be written, said before long work for it; nothing is made."""
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        taken = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    if taken or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: expected the name of a file in a folder that can be written")


def check_directory(out: Path, replaceable: Callable[[Path], bool], kind: str) -> None:
    """``UserError`` where ``whole_directory`` would refuse ``out`` for what is there, said before long work for it."""
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise UserError(f"cannot write {out}: expected a new folder or {kind}, but it is a file: name another")
        if any(out.iterdir()) and not replaceable(out):
            raise UserError(
                f"cannot write {out}: expected a new folder or {kind}, but it holds other files: name another"
            )
        if out.samefile(Path.cwd()):  # which cannot be put in another's place
            raise UserError(f"cannot write {out}: it is the folder that you are in: name another")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_directory(out: Path, replaceable: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``out`` that takes its place on success and is removed on failure.

    A folder that is there and empty or ``replaceable`` is replaced; any other is refused with a ``UserError`` that calls
    what is expected ``kind``. Raises ``UserError`` too when the folder cannot be written or the disk is full.
    """
    temporary: Path | None = None
    old: Path | None = None
    check_directory(out, replaceable, kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent)) / out.name
            out.replace(old)
        try:
            temporary.replace(out)
        except OSError:
            if old is not None:
                old.replace(out)
            raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        for leftover in (temporary, old.parent if old is not None else None):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder, which must be there: a second process that wants it is told that another one is at ``work``.

    Raises ``UserError`` then, and ``OSError`` where the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # torch brings it

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another process is {work}") from error
    try:
        yield
    finally:
        lock.release()
