"""The store's one connection: who may read or write when, and SQLite's own errors in our words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from _thread import allocate_lock, get_ident
from contextlib import contextmanager

from qmpsnap.errors import HostCannot, QmpsnapError, StoreMismatch
from qmpsnap.store.sqlite import durability, schema

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterator

    from qmpsnap.host.files import Name

    Moment = tuple[sqlite3.Connection, int, int, int]

_READ = "BEGIN"


class _Undone(Exception):
    """Ends a transaction whose changes are not wanted."""


class Database:
    """An SQLite file that threads share. Where it can only be read, changes are refused."""

    def __init__(self, path: Name, *, make: bool = True) -> None:
        self._path = os.fspath(path)
        self.is_there = make or not _is_missing(path)
        self._doubt: Exception | None = None
        """What a COMMIT has failed with whose outcome is not known; the connection is closed then."""
        self._inherited = False
        self.connection, self._barred = self._connect()
        self._lock = allocate_lock()
        self._undone = 0
        """Transactions that were: what they have shown is nothing that stands."""
        self._inside: int | None = None
        """The thread of :meth:`foreseeing`, or of :meth:`at_once`, which holds the lock."""

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @property
    def barred(self) -> HostCannot | None:
        """Why it cannot be written now; None when it can."""
        return self._barred

    def require_writable(self) -> None:
        """Raise ``HostCannot`` when it cannot be written now."""
        with self._lock:
            self._connect_again()
            self._remove_doubt()
            self._refuse_barred()
            self._require_durable()

    def is_sound(self) -> bool:
        """Whether SQLite finds nothing wrong; it looks through the whole file."""
        with self.reading() as sql:
            return [*sql.execute("PRAGMA quick_check(1)"), *sql.execute("PRAGMA foreign_key_check")] == [("ok",)]

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For the block: what it reads is of one moment; inside of :meth:`foreseeing`, of what is foreseen."""
        if self._inside == get_ident():
            yield self.connection
            return
        with self._transaction(_READ) as connection:
            yield connection

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For the block: all that this thread reads is of one moment, and is read in one transaction."""
        with self._transaction(_READ), self._own():
            yield

    def moment(self) -> Moment:
        """Equal to that of an earlier transaction if nothing has changed since. Asked inside a transaction."""
        (version,) = self.connection.execute("PRAGMA data_version").fetchone()
        return self.connection, version, self.connection.total_changes, self._undone

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """For the block: what it changes is durable at its end, all of it or nothing."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextmanager
    def foreseeing(self) -> Iterator[sqlite3.Connection]:
        """For the block: what it changes is undone at its end. It shows what a change will make of the store."""
        with contextlib.suppress(_Undone), self._transaction("BEGIN IMMEDIATE") as connection:
            with self._own():
                yield connection
            raise _Undone

    @contextmanager
    def _own(self) -> Iterator[None]:
        self._inside = get_ident()
        try:
            yield
        finally:
            self._inside = None

    def _connect(self) -> tuple[sqlite3.Connection, HostCannot | None]:
        if not self.is_there:
            return schema.nowhere(), None
        self._inherited = durability.has_frames(self._path)
        try:
            return schema.connect(self._path), None
        except HostCannot as error:
            if (found := schema.readable(self._path, error)) is None:
                raise
            return found, error

    def _connect_again(self) -> None:
        """What can only be read is opened anew for every transaction, in the hope of better and to see changes."""
        if self._barred:
            self.connection.close()
            self.connection, self._barred = self._connect()

    def _refuse_barred(self) -> None:
        if self._barred:
            raise HostCannot(self._barred.message, hint=self._barred.hint) from self._barred

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        """The one way in: everything in the block is one transaction, SQLite's own errors are translated here."""
        with self._lock:
            self._connect_again()
            self._remove_doubt()
            if begin != _READ:
                self._refuse_barred()
                self._require_durable()
            with self._translated():
                self.connection.execute(begin)
                number = None
                try:
                    yield self.connection
                    if begin != _READ:
                        number = durability.sign(self.connection)
                    self._commit(number)
                except BaseException:
                    # SQLite itself rolls back when the disk is full.
                    if not self._doubt and self.connection.in_transaction:
                        self.connection.execute("ROLLBACK")
                    self._undone += 1
                    raise

    def _commit(self, number: int | None) -> None:
        """End a transaction. Where that fails, what stands decides: a change that does is one that was made."""
        try:
            self.connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise  # told before anything is written
        except (sqlite3.Error, MemoryError) as error:
            # Without room the frame that would have ended it was not written, and SQLite has rolled back.
            if number is None or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise
            self._doubt = error
            if not self._settle(number):
                raise

    def _remove_doubt(self) -> None:
        """After a COMMIT that failed nothing is read either until it is known what stands, and that it stays."""
        if self._doubt:
            self._settle(None)

    def _require_durable(self) -> None:
        """Before the first change: what others have left above the store's file may never have reached the disk."""
        if not self._inherited:
            return
        try:
            with self._translated():
                self._harden(None)
        except OSError as error:
            raise HostCannot(
                f"the store {self._path} has changes that may not have reached the disk and cannot be synced: {error}",
                hint=self._remedy(error),
            ) from error
        self._inherited = False

    def _settle(self, number: int | None) -> bool:
        """Open the file anew, make what stands there durable, and say whether the transaction of that number does.

        ``HostCannot``: that is not to be found out now. The next transaction tries again.
        """
        assert self._doubt
        self.connection.close()
        try:
            os.stat(self._path)  # noqa: PTH116 - or another would be made in its place
            self.connection = schema.connect(self._path)
            found = self._harden(number)
        except (QmpsnapError, sqlite3.Error, OSError, MemoryError) as error:
            self.connection.close()
            why = error.message if isinstance(error, QmpsnapError) else error  # its own effect is not this one's
            raise HostCannot(
                f"the store {self._path} could not sync a change to the disk ({self._doubt}), nor its present state"
                f" ({why}): whether the change is recorded is unknown",
                hint="check the disk (dmesg); the next command finds out once the disk is writable",
                effect="unknown",
            ) from self._doubt
        self._doubt, self._barred, self._inherited = None, None, False
        return found

    def _harden(self, number: int | None) -> bool:
        """Make what stands durable, and that nothing else does; whether the transaction of that number is among it.

        The COMMIT at its end overwrites frames that SQLite has given up, and that a power loss would bring back.
        """
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            durability.write_again(self._path)
            found = durability.stands(self.connection, number)
            durability.sign(self.connection)
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        return found

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "Could not decode" in str(error):  # bytes that are no text, where only text is
                raise schema.damaged(self._path, error) from error
            raise HostCannot(
                f"the store {self._path} refused a change: {error}",
                hint=self._remedy(error),
            ) from error
        except sqlite3.IntegrityError as error:
            raise StoreMismatch(
                f"the store {self._path} contradicts this change: {error}",
                hint="try again: another command may have recorded the same",
            ) from error
        except sqlite3.DatabaseError as error:
            raise schema.damaged(self._path, error) from error

    def _remedy(self, error: Exception) -> str:
        from pathlib import Path

        from qmpsnap.host import write_errors

        return write_errors.reason(Path(self._path).parent, error).remedy


def _is_missing(path: Name) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:  # another problem, reported when it is opened
        return False
    return False
