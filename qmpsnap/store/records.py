"""What a lost store can be made again from, in small files beside it.

Images and state files say most of it themselves. They do not say whose they are, how the machine is launched and, for
those outside its folder, where they lie: that is written down here before the store settles it. One file per machine
for itself (``NAME.json``), one for its images and state files at other places (``NAME.places``), a line for each.
"""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.host import files, write_errors
from qmpsnap.host.files import sync_folder
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import layer_disk
from qmpsnap.model.relocation import HomeRecord
from qmpsnap.store.sqlite.json_values import decoded

FOLDER = "records"
LARGE = 1 << 16
"""Bytes from which on a file of places is looked through for what says nothing any more."""


class Place(Struct, frozen=True, omit_defaults=True):
    """An image, or the path of a state file, at a place of its own; ``gone``: the store has it no more."""

    layer: Layer | None = None
    state: str | None = None
    gone: bool = False

    @property
    def says_nothing(self) -> bool:
        """Whether it is gone, and no file lies there that could be taken for it; a folder may be away for now."""
        path = Path(self.layer.path if self.layer else self.state or "")
        return self.gone and path.parent.is_dir() and not os.path.lexists(path)


class _Housed(Struct, frozen=True):
    """What a machine's file says beside the machine."""

    home: HomeRecord | None = None


class Records:
    """The files of one store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, machine: Machine, home: HomeRecord | None = None) -> None:
        """Write a machine down, and of which home it is, durably.

        Raises:
            HostCannot: no right, no space.
        """
        said = msgspec.to_builtins(_lasting(machine))
        if home:
            said["home"] = {"id": home.id, "path": home.path}
        text = msgspec.json.format(msgspec.json.encode(said))
        with _translated(self._folder):
            files.make_folder(self._folder)
            path = self._machine(machine.name)
            fresh = path.with_name(f"{path.name}.part")
            fresh.unlink(missing_ok=True)
            _append(fresh, text + b"\n", flags=os.O_EXCL)
            fresh.replace(path)
            sync_folder(self._folder)

    def has(self, machine: Machine) -> bool:
        """Whether the file is there, and this machine's."""
        found = self._read(self._machine(machine.name))
        return found is not None and found == _lasting(machine)

    def add(self, machine: str, places: Iterable[Place]) -> None:
        """Note images or state files at places of their own, durably.

        Raises:
            HostCannot: no right, no space.
        """
        text = b"".join(msgspec.json.encode(place) + b"\n" for place in places)
        if not text:
            return
        with _translated(self._folder):
            files.make_folder(self._folder)
            path = self.places_file(machine)
            fresh = not path.exists()
            _append(path, text)
            shortened = path.stat().st_size > LARGE and self._shorten(machine)
            if fresh or shortened:
                sync_folder(self._folder)

    def withdraw(self, layers: Collection[Layer]) -> None:
        """Note that layers are gone wherever they are noted: who removes one need not be who made it.

        Raises:
            HostCannot: no right, no space.
        """
        for name in self._names(".places") if layers else ():
            machine = name.removesuffix(".places")
            there = {place.layer.id: not place.gone for place in self.places(machine) if place.layer}
            self.add(machine, [Place(layer=layer, gone=True) for layer in layers if there.get(layer.id)])

    def _shorten(self, machine: str) -> bool:
        """Write the file anew with what still says something, where that is less than half of it."""
        lines = self.places(machine)
        last = {place.layer.id if place.layer else place.state: place for place in lines}
        kept = [place for place in last.values() if not place.says_nothing]
        if 2 * len(kept) > len(lines):
            return False
        path = self.places_file(machine)
        fresh = path.with_name(f"{path.name}.part")
        fresh.unlink(missing_ok=True)
        _append(fresh, b"".join(msgspec.json.encode(place) + b"\n" for place in kept), flags=os.O_EXCL)
        fresh.replace(path)
        return True

    def forget(self, machine: str) -> None:
        """Remove what there is of a machine: what stays is taken for a machine that the store has lost.

        Raises:
            HostCannot: it is all there still.
        """
        with _translated(self._folder):
            self._machine(machine).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is gone, if perhaps not durably; what it notes then helps nobody
            self.places_file(machine).unlink(missing_ok=True)
            sync_folder(self._folder)

    def take_back(self, machine: Machine) -> None:
        """Remove what the definition of a machine has written, where it has, durably.

        Raises:
            HostCannot: that cannot be found out, or something of it may be left.
        """
        with _translated(self._folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            with contextlib.suppress(FileNotFoundError):  # gone, but for all we know not durably
                said = self._machine(machine.name).read_bytes()
                with contextlib.suppress(StoreMismatch):  # another's, or nobody's
                    if decoded(said, Machine) == _lasting(machine):
                        self.forget(machine.name)
            sync_folder(self._folder)

    def home(self) -> HomeRecord | None:
        """Which home the machines were written down for, and where that lay; None where none says."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = self._names()
        for name in names:
            with contextlib.suppress(OSError, StoreMismatch):
                if found := decoded((self._folder / name).read_bytes(), _Housed).home:
                    return found
        return None

    def machines(self) -> tuple[Machine, ...]:
        """Every machine that was written down, by name.

        Raises:
            HostCannot: no right to look.
        """
        try:
            names = self._names()
        except OSError as error:
            raise HostCannot(
                f"{self._folder} cannot be read: {error.strerror}",
                hint="let this user read it and the files in it",
            ) from error
        found = (self._read(self._folder / name) for name in names)
        return tuple(machine for machine in found if machine)

    def places(self, machine: str) -> tuple[Place, ...]:
        """What was noted of a machine, oldest first; a line that a crash has cut is left out.

        Raises:
            HostCannot: it cannot be read, which does not mean that there is nothing.
        """
        path = self.places_file(machine)
        try:
            lines = path.read_bytes().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise HostCannot(
                f"{path} cannot be read: {error.strerror}", hint="give this user the right to read it"
            ) from error
        found = []
        for line in lines:
            with contextlib.suppress(StoreMismatch):
                found.append(decoded(line, Place))
        return tuple(place for place in found if place.layer is None or layer_disk(place.layer.id))

    def places_file(self, name: str) -> Path:
        """Where a machine's places are written down."""
        return self._folder / f"{name}.places"

    def _names(self, ending: str = ".json") -> list[str]:
        try:
            return [name for name in sorted(os.listdir(self._folder)) if name.endswith(ending)]  # noqa: PTH208 - as text
        except FileNotFoundError:
            return []

    def _machine(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _read(self, path: Path) -> Machine | None:
        try:
            found = decoded(path.read_bytes(), Machine)
        except (OSError, StoreMismatch):
            return None
        return found if path.name == f"{found.name}.json" else None


def _lasting(machine: Machine) -> Machine:
    """What does not change while the machine exists; to its further QEMU arguments a rebuilt store has no consent."""
    return replace(machine, process=None, current=None, consent=None)


def _append(path: Path, text: bytes, *, flags: int = 0) -> None:
    """Write a line, or a file, durably and whole: a line that a crash had cut before it must not swallow it."""
    access = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, access | flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = b"\n" + text
        while text:
            text = text[os.write(descriptor, text) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what, remedy = write_errors.reason(folder, error)
        raise HostCannot(f"{error.filename or folder} cannot be written: {what}", hint=remedy) from error
