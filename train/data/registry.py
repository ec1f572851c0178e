"""Which texts have been met, on the disk: millions of names or captions cost the process no memory."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from kinetok.errors import UserError

ROWS = 1000  # read at a time


class Registry:
    """Different texts, numbered from 0 in the order in which they first came.

    The file is scratch: one that is there is replaced, and it is removed at the end. ``UserError`` where it cannot be
    written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def __enter__(self) -> "Registry":
        self.path.unlink(missing_ok=True)
        try:
            self._base = sqlite3.connect(self.path, isolation_level=None)
            # It is made anew after a crash, so it needs neither a journal nor to wait for the disk.
            self._base.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
                "CREATE TABLE texts (number INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE); BEGIN"
            )
        except sqlite3.Error as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._base.close()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self._count

    def number(self, text: str) -> tuple[int, bool]:
        """The number of a text, and whether it is new."""
        try:
            new = self._base.execute("INSERT OR IGNORE INTO texts VALUES (?, ?)", (self._count, text)).rowcount == 1
            if new:
                self._count += 1
                return self._count - 1, True
            return self._base.execute("SELECT number FROM texts WHERE text = ?", (text,)).fetchone()[0], False
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def texts(self, start: int) -> Iterator[str]:
        """All texts from a number on."""
        while start < self._count:
            try:
                rows = self._base.execute(
                    "SELECT text FROM texts WHERE number BETWEEN ? AND ? ORDER BY number", (start, start + ROWS - 1)
                ).fetchall()
            except sqlite3.Error as error:
                raise self._failed(error) from error
            yield from (text for (text,) in rows)
            start += ROWS

    def _failed(self, error: sqlite3.Error) -> UserError:
        return UserError(f"cannot write {self.path}: {error}; is the disk full? Run it again and it goes on")
