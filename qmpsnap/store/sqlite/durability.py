"""Which transactions stand in an SQLite file, and that what stands is on the disk.

A COMMIT that fails says neither. Its frames may be whole in the ``-wal`` file, and the next process that opens the
store reads them; or they are not, and SQLite writes others in their place. And after a failed fsync Linux takes the
pages it could not write for clean: a second fsync of them succeeds and writes nothing, until they are written to anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3

from qmpsnap.host.files import opened, sync_folder

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from qmpsnap.host.files import Name

KEPT = 1000
"""Transactions of all processes that are remembered: one in doubt is asked for within seconds."""

_PIECE = 1 << 20


def sign(connection: sqlite3.Connection) -> int:
    """Give the open transaction a number that :func:`stands` finds wherever it is recorded."""
    number = int.from_bytes(os.urandom(8), "big") >> 1  # `secrets` would load what makes every start slower
    connection.execute("INSERT INTO committed (number) VALUES (?)", (number,))
    connection.execute("DELETE FROM committed WHERE id <= last_insert_rowid() - ?", (KEPT,))
    return number


def stands(connection: sqlite3.Connection, number: int | None) -> bool:
    """Whether the transaction of that number is recorded."""
    return connection.execute("SELECT 1 FROM committed WHERE number = ?", (number,)).fetchone() is not None


def frames(store: Name) -> str:
    """The file with what was not yet taken over into the store's own."""
    return f"{os.fspath(store)}-wal"


def has_frames(store: Name) -> bool:
    """Whether there is something in it: of a process that works beside us, or of one that has not closed the store."""
    try:
        return os.stat(frames(store)).st_size > 0  # noqa: PTH116
    except OSError:
        return False


def write_again(store: Name) -> None:
    """Write the frames once more, as they are, and out to the disk; our connection holds the write lock.

    Unlike the store's own file, this one may be opened and closed beside SQLite: its locks are not on it.
    """
    with contextlib.suppress(FileNotFoundError), opened(frames(store), os.O_RDWR) as file:
        at = 0
        while piece := os.pread(file, _PIECE, at):
            at += os.pwrite(file, piece, at)
        os.fsync(file)
    sync_folder(os.path.dirname(store))  # noqa: PTH120
