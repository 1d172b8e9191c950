"""A machine's whole record beside its images: a lost store is rebuilt from it, and it shows if a store is old.

``record.json`` in the machine's folder has everything the store has about the machine. It is written before the store
settles an operation, with that operation's number. So it is never older than the images, and a record that is ahead
only by an operation that the store has open is no sign of an old store. Decision 0013 says what each death leaves.

An earlier release kept only how machines were launched, in ``records`` beside the machines' folder.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.host import files, write_errors
from qmpsnap.host.files import sync_folder
from qmpsnap.model.home import ACTIVE, RECORD
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId
from qmpsnap.model.relocation import HomeRecord
from qmpsnap.store import record_files
from qmpsnap.store.sqlite.json_values import decoded


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that the store has of a machine, but for its journal, its QEMU and what was agreed to.

    ``generation``: how often the store has changed it; -1 where an earlier release wrote this. ``operation``: the one
    that settled with it; 0 where none did. ``serial``: the last number that the store had given to an operation.
    ``home``: of which home it is, and where that lay. ``layers``: every one that its disks and snapshots read.
    """

    machine: Machine
    generation: int = -1
    operation: int = 0
    serial: int = 0
    home: HomeRecord | None = None
    active: dict[str, LayerId] = {}
    layers: tuple[Layer, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()

    def describes(self, uuid: str, generation: int) -> bool:
        """Whether it is that machine's, as the store has it at that generation."""
        return (self.machine.uuid, self.generation) == (uuid, generation)


class _Housed(Struct, frozen=True):
    home: HomeRecord | None = None


class Records:
    """The records of one home, in the folders below ``machines``."""

    def __init__(self, machines: Path) -> None:
        self._machines = machines
        self._last: tuple[bytes, Record] | None = None
        """What was read last, and what it says: a verb asks several times, and long records take long to decode."""
        self.earlier = Path(record_files.earlier(machines))
        """Where an earlier release kept them."""

    @property
    def elsewhere(self) -> bool:
        """Whether a link leads to the machines' folder, and so to storage that may hang."""
        return self._machines.is_symlink()

    def write(self, record: Record, *, make: bool = False) -> None:
        """Put a record in the place of the one before, durably.

        ``make``: also the machine's folder; else one that is not there is on a file system that is not there now.
        """
        path = self._path(record.machine.name)
        with _translated(path.parent):
            if make:
                files.make_folder(path.parent)
                sync_folder(self._machines)
            if record.machine.adopted:
                from qmpsnap.store import active_files  # of few machines

                for name, content in active_files.contents(record).items():
                    files.replace_durably(path.with_name(name), content)
            files.replace_durably(path, msgspec.json.format(msgspec.json.encode(record)) + b"\n")

    def tidy(self, machine: str) -> None:
        """Remove what a write that failed has left unfinished and could not remove, where none is to replace it."""
        path = self._path(machine)
        with contextlib.suppress(OSError):
            for name in (*ACTIVE, RECORD):
                path.with_name(f"{name}.part").unlink(missing_ok=True)

    def read(self, machine: str) -> Record | None:
        """A machine's record; None where there is none, or nothing that is one.

        ``HostCannot`` where it cannot be read, which does not mean that it says nothing.
        """
        path = self.file(machine)
        try:
            with files.opened(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
                said = file.read()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise record_files.unreadable(path.parent, error) from error
        if self._last and self._last[0] == said:
            found = self._last[1]
        else:
            try:
                if path.name == RECORD:
                    found = decoded(said, Record)
                else:
                    found = Record(machine=decoded(said, Machine), home=decoded(said, _Housed).home)
            except StoreMismatch:
                return None
            self._last = said, found
        return found if found.machine.name == machine else None

    def all(self) -> tuple[Record, ...]:
        """Every machine's record, by name."""
        found = (self.read(name) for name in self.names())
        return tuple(record for record in found if record)

    def names(self) -> tuple[str, ...]:
        """The machines that have a record."""
        return record_files.names(self._machines)

    def home(self) -> HomeRecord | None:
        """Which home the records were written for, and where that lay; None where none says."""
        names: tuple[str, ...] = ()
        with contextlib.suppress(HostCannot):
            names = self.names()
        for name in names:
            with contextlib.suppress(HostCannot):
                if (found := self.read(name)) and found.home:
                    return found.home
        return None

    def forget(self, machine: str) -> None:
        """Remove a machine's record, durably: what stays is taken for a machine that the store has lost."""
        path = self._path(machine)
        with _translated(path.parent), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.forget_earlier(machine)
            self.tidy(machine)
            for name in (*ACTIVE, RECORD):
                path.with_name(name).unlink(missing_ok=True)
            sync_folder(path.parent)
            with contextlib.suppress(OSError):  # an adopted machine need not have a file of its own
                path.parent.rmdir()

    def forget_earlier(self, machine: str) -> None:
        """Remove what an earlier release has kept of a machine, or ``OSError``."""
        if self.earlier.is_dir():
            for ending in ("json", "places"):
                (self.earlier / f"{machine}.{ending}").unlink(missing_ok=True)
            sync_folder(self.earlier)
            with contextlib.suppress(OSError):
                self.earlier.rmdir()

    def file(self, machine: str) -> Path:
        """The file that a machine's record is in."""
        path, earlier = self._path(machine), self.earlier / f"{machine}.json"
        return earlier if earlier.exists() and not path.exists() else path

    def _path(self, machine: str) -> Path:
        return self._machines / machine / RECORD


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what, remedy = write_errors.reason(folder, error)
        raise HostCannot(f"{error.filename or folder} cannot be written: {what}", hint=remedy) from error
