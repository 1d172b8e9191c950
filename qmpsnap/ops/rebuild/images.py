"""Every image and state file that a lost store must have known, found by our own reader alone."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from qmpsnap.block.image import header, snapshot_table
from qmpsnap.errors import HostCannot, ImageRefused, StoreMismatch
from qmpsnap.host.files import same_file
from qmpsnap.machine import statefile
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, Format
from qmpsnap.model.names import SERIAL, LayerId, is_text, layer_id, tag_number
from qmpsnap.model.relocation import HomeRecord, carried
from qmpsnap.ops.base import home_location
from qmpsnap.ops.rebuild.plan import Image, State, Unread
from qmpsnap.ops.session.stale_store import LAYER_FILE
from qmpsnap.store.records import FOLDER, Place, Records

_INSIDE = re.compile(r"(/.*)/machines/([^/]+/[^/]+)")
"""A file in the folder of a home's machine."""

_KINDS: dict[str | None, Format] = {"qcow2": "qcow2", "raw": "raw"}


class Finder:
    """Collects images by path; ``problems`` says what could not be read, ``elsewhere`` which homes headers name."""

    def __init__(self, home: Home, records: Records, place: HomeRecord) -> None:
        self._home = home
        self._before = (place.path,)
        self._original = home_location.original(place, home)
        self._named: set[str] = set()
        self.elsewhere: set[str] = {place.path} - {str(home.data)}
        self._records = records
        self._found: dict[str, Image] = {}
        self._below: dict[str, str | None] = {}
        self._kinds: dict[str, Format | None] = {}
        self._last = 0
        self._layers: dict[tuple[str, str], Unread] = {}
        self.problems: list[str] = []

    def images(self, machines: Sequence[Machine]) -> list[Image]:
        """The images of these machines and all that they read; what reads something that is not there is left out.

        Raises:
            HostCannot: a machine's folder cannot be read.
        """
        noted = {machine.name: self._places(machine) for machine in machines}
        self._named = {place.layer.path for places in noted.values() for place in places if place.layer}
        self._named |= {path for machine in machines for disk in machine.spec.disks for path in _given(disk)}
        gone = {
            layer: place for places in noted.values() for layer, place in _latest(places).items() if place.gone
        }  # whoever removed a layer need not be who noted it
        removed = {place.layer.path for place in gone.values() if place.layer}
        for machine in machines:
            given = {path for disk in machine.spec.disks for path in _given(disk)}
            for identity, place in _latest(noted[machine.name]).items():
                assert place.layer
                self._noted(machine, place.layer, given=place.layer.path in given, gone=identity in gone)
            for file in self._files(machine):
                self._in_folder(machine, file)
        for machine in machines:
            for disk in machine.spec.disks:
                named = disk.image or disk.base
                if named and named not in self._found and (named not in removed or os.path.lexists(named)):
                    self._foreign(named, disk.format, disk.name)
        pending = list(self._found)
        while pending:
            pending += self._read_below(pending.pop())
        return self._linked()

    def unread(self, images: Sequence[Image]) -> list[Unread]:
        """Every layer that there should be and is not among these images."""
        read = {image.layer.path for image in images}
        return [layer for (_, path), layer in self._layers.items() if path not in read]

    def states(self, machine: Machine) -> list[State]:
        """The machine's state files."""
        last = {place.state: place.gone for place in self._places(machine) if place.state}
        noted = [path for path, gone in last.items() if not gone or Path(path).exists()]
        found = []
        for path in [*(path for path in self._files(machine) if path.endswith(".vmstate")), *noted]:
            try:
                vmstate, manifest = statefile.find(path)
            except (StoreMismatch, HostCannot) as error:
                self.problems.append(error.message)
                continue
            if not re.fullmatch(SERIAL, str(manifest.operation)):
                self.problems.append(f"{header.printable(path)} names an impossible operation number")
            elif manifest.hardware.uuid == machine.uuid:
                self._last = max(self._last, manifest.operation)
                written = Path(path).stat().st_mtime
                said = (manifest.operation, manifest.snapshot, manifest.created, manifest.points, written)
                found.append(State(vmstate, *said))
        return found

    def variables(self, machine: Machine, *, taken: bool = False) -> dict[int, str]:
        """Copies of the machine's UEFI variable store, by the number of the operation that made each.

        With ``taken`` those that snapshots by new layers have taken; else those inside images, and those that a revert
        has kept.
        """
        prefix = "vars-at-" if taken else "vars-"
        named = ((re.fullmatch(rf".*/{prefix}({SERIAL})\.fd", path), path) for path in self._files(machine))
        found = {int(name[1]): path for name, path in named if name}
        self._last = max(self._last, *found, 0)
        return found

    @property
    def last_number(self) -> int:
        """The highest number that a layer or a state file bears."""
        return self._last

    def _places(self, machine: Machine) -> list[Place]:
        """What was noted of a machine, with the home's folder where it is now."""
        found = []
        for place in self._records.places(machine.name):
            layer = place.layer and replace(place.layer, path=self._carried(place.layer.path))
            found.append(replace(place, layer=layer, state=place.state and self._carried(place.state)))
        return found

    def _carried(self, path: str) -> str:
        return carried(path, self._before, str(self._home.data))

    def _own(self, path: str) -> str:
        """What the header of a layer of ours means: of another home's machines it is the file of this home.

        A home that was moved or copied has headers with the folder that it, or its original, was in.
        """
        here = self._carried(path)
        inside = _INSIDE.fullmatch(here)
        if inside is None or inside[1] == str(self._home.data) or here in self._named:
            return here
        root, own = Path(inside[1]), f"{self._home.machines}/{inside[2]}"
        if os.path.lexists(own) or (root / "qmpsnap.db").exists() or (root / FOLDER).is_dir():
            self.elsewhere.add(inside[1])
            return own
        return here

    def _files(self, machine: Machine) -> list[str]:
        folder = self._home.machine_dir(machine.name)
        try:
            names = os.listdir(folder)  # noqa: PTH208 - as text
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise HostCannot(
                f"{folder} cannot be read: {error.strerror}",
                hint="let this user read it and the files in it",
                machine=machine.name,
            ) from error
        return sorted(f"{folder}/{name}" for name in names if is_text(name))  # no store could keep another

    def _noted(self, machine: Machine, layer: Layer, *, given: bool, gone: bool) -> None:
        """A layer at a place of its own; ``given``: the spec names it, or what it names reads it."""
        disk, _, number = layer.id.rpartition("-")
        self._last = max(self._last, int(number))
        if gone and (not layer.owned or not os.path.lexists(layer.path)):
            return  # what a crash has left of ours is kept
        of = (machine.name, disk) if machine.spec.disk(disk) else None
        if of and not gone:
            remedy = f"remove its line from {self._records.places_file(machine.name)}"
            shown = header.printable(layer.path)
            self._layers[machine.name, layer.path] = Unread(machine.name, disk, int(number), shown, remedy)
        if self._original and layer.owned and not layer.path.startswith(f"{self._home.data}/"):
            return  # the original's: neither to be written to nor removed by a copy of its home
        if given and layer.path in self._found:
            return  # another machine's layer, which is the base here
        if image := self._look(layer.path, layer.format, layer.id, owned=layer.owned):
            # Another file may be there by now: then it is not ours to remove.
            same = same_file(layer, image.layer)
            image = replace(image, layer=replace(image.layer, owned=layer.owned and same))
            self._add(replace(image, of=None if given else of))

    def _in_folder(self, machine: Machine, path: str) -> None:
        name = LAYER_FILE.fullmatch(Path(path).name)
        if name is None or path in self._found or machine.spec.disk(name[1]) is None:
            return
        identity = layer_id(name[1], int(name[2]))
        unread = Unread(machine.name, name[1], int(name[2]), header.printable(path), "move it out of that folder")
        self._layers[machine.name, path] = unread
        if image := self._look(path, "raw" if name[3] == "raw" else "qcow2", identity, owned=True):
            self._add(replace(image, of=(machine.name, name[1])))

    def _foreign(self, path: str, kind: Format, disk: str) -> bool:
        image = self._look(path, kind, layer_id(disk, self._last + 1), owned=False)
        if image:
            self._add(image)
        return image is not None

    def _read_below(self, path: str) -> Iterator[str]:
        below = self._below[path]
        if below is None or below in self._found:
            return
        kind = self._kinds[path]
        if kind is None:
            self.problems.append(f"{header.printable(path)} names no format of its backing file")
        elif self._foreign(below, kind, self._found[path].layer.id.rpartition("-")[0]):
            yield below

    def _look(self, path: str, kind: Format, identity: LayerId, *, owned: bool) -> Image | None:
        try:
            found = header.read(path, format=kind, block_device=not owned)
            layer = Layer(
                id=identity,
                path=path,
                format=kind,
                backing=None,
                virtual_size=found.virtual_size,
                device=found.device,
                inode=found.inode,
                birth=found.birth,
                owned=owned,
            )
            tags = snapshot_table.names(layer) or frozenset()
            written = os.stat(path).st_mtime  # noqa: PTH116 - a string of somebody's header
        except (ImageRefused, HostCannot) as error:
            self.problems.append(error.message)
            return None
        except OSError as error:
            self.problems.append(f"{header.printable(path)}: {error.strerror}")
            return None
        below = found.backing
        beside = below and _beside(path, below)
        self._below[path] = self._own(beside) if beside and owned else beside
        self._kinds[path] = _KINDS.get(found.backing_format)
        return Image(layer, written, tags)

    def _add(self, image: Image) -> None:
        taken = {found.layer.id for path, found in self._found.items() if path != image.layer.path}
        tags = (tag_number(tag) or 0 for tag in image.tags if image.of)
        self._last = max(self._last, int(image.layer.id.rpartition("-")[2]), *tags)
        if image.layer.id in taken:
            self._last += 1
            fresh = layer_id(image.layer.id.rpartition("-")[0], self._last)
            image = replace(image, layer=replace(image.layer, id=fresh))
        self._found[image.layer.path] = image

    def _linked(self) -> list[Image]:
        """The images with their backing as a layer; without those that end in nothing, or in a circle."""
        whole: dict[str, Image] = {}
        left = dict(self._found)
        while ready := [path for path in left if self._below[path] is None or self._below[path] in whole]:
            for path in ready:
                image, below = left.pop(path), self._below[path]
                backing = whole[below].layer.id if below else None
                whole[path] = replace(image, layer=replace(image.layer, backing=backing))
        self.problems += [f"{header.printable(path)} reads an image that does not exist" for path in left]
        return list(whole.values())


def _latest(places: Sequence[Place]) -> dict[LayerId, Place]:
    """What was noted last of each layer."""
    return {place.layer.id: place for place in places if place.layer}


def _given(disk: DiskSpec) -> Iterator[str]:
    """The image that a disk's spec names, and all that it reads as far as that can be told."""
    path, kind = disk.image or disk.base, _KINDS.get(disk.format)
    seen: set[str] = set()
    while path and path not in seen:
        seen.add(path)
        yield path
        try:
            found = header.read(path, format=kind, block_device=True)
        except (ImageRefused, HostCannot):
            return
        path, kind = found.backing and _beside(path, found.backing), _KINDS.get(found.backing_format)


def _beside(path: str, backing: str) -> str:
    return os.path.join(os.path.dirname(path), backing)  # noqa: PTH118, PTH120 - as QEMU does
