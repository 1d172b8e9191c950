"""Free space: what an operation may need is checked before it begins, and shortage is reported in time."""

import contextlib
import os
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from msgspec import Struct

from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations.operation import CreatePlan, Overlay
from qmpsnap.model.planning.state import CLUSTER, TABLE_COVERS

STORE = 256 << 10
"""Bytes the store's journal may need for one operation."""

LUKS_HEADER = 3 << 20
"""Bytes that an encrypted image takes more, rounded up."""

LEFT = 1 << 20
"""Bytes that must be left under a running guest by a new layer: what it overwrites takes up room again there."""

LOW = 1 << 30
"""Bytes under which a file system counts as short, if the guest may write that much to it at all."""


class Need(Struct, frozen=True):
    """Bytes that something may need in a folder; ``what`` is part of a sentence."""

    folder: str
    bytes: int
    what: str


class Room(NamedTuple):
    """A file system: what tells it from others, and the bytes that are free for us."""

    device: int
    free: int


def room(folder: str | os.PathLike[str]) -> Room:
    """The file system that a folder lies on."""
    try:
        status, device = os.statvfs(folder), Path(folder).stat().st_dev
    except OSError as error:
        raise HostCannot(
            f"{printable(os.fspath(folder))} is not writable: {error.strerror}",
            hint="create the folder" if isinstance(error, FileNotFoundError) else "",
        ) from error
    return Room(device, status.f_bavail * status.f_frsize)


def require(needs: Iterable[Need], *, machine: str, hint: str = "free some space there") -> None:
    """Refuse before anything begins what may run out of space; needs on one file system are added up."""
    together: dict[int, list[Need]] = {}
    rooms: dict[int, Room] = {}
    for need in needs:
        found = room(need.folder)
        together.setdefault(found.device, []).append(need)
        rooms[found.device] = found
    for device, here in together.items():
        wanted, free = sum(need.bytes for need in here), rooms[device].free
        if free < wanted:
            whats = " and ".join(dict.fromkeys(need.what for need in here))
            raise HostCannot(
                f"{whats} may need {wanted} bytes, but only {free} are free at {printable(here[0].folder)}",
                hint=hint,
                machine=machine,
            )


def of_image(virtual_size: int, data: int = 0) -> int:
    """Bytes that a qcow2 image of that size takes with so much data in it: tables and reference counts are added."""
    tables = 8 * -(-virtual_size // TABLE_COVERS)
    clusters = -(-data // CLUSTER)
    return 4 * CLUSTER + tables + clusters * (CLUSTER + 8 + 2) + (CLUSTER if data else 0)


def of_overlays(machine: Machine, overlays: Iterable[Overlay]) -> list[Need]:
    """What new empty layers need."""
    needs = []
    for overlay in overlays:
        header = LUKS_HEADER if machine.require_layers_of(overlay.disk).encryption else 0
        wanted = of_image(overlay.layer.virtual_size) + header
        needs.append(Need(str(Path(overlay.layer.path).parent), wanted, "a new layer"))
    return needs


def of_create(machine: Machine, plan: CreatePlan, store: Path) -> list[Need]:
    """What a snapshot needs: layers, room for a running guest to go on in them, its memory, the store's own."""
    needs = of_overlays(machine, plan.overlays)
    needs.append(Need(str(store), STORE, "the store"))
    if plan.live:
        folders = {need.folder: room(need.folder).device for need in needs[: len(plan.overlays)]}
        once = {device: folder for folder, device in folders.items()}  # several disks share what is left
        needs += [Need(folder, LEFT, "the running guest") for folder in once.values()]
    if plan.variables:
        source, target = plan.variables
        with contextlib.suppress(OSError):
            size = Path(source).stat().st_size
            needs.append(Need(str(Path(target).parent), size, "a copy of the UEFI variable store"))
    if plan.memory:
        packed = 1 if plan.memory.compression == "none" else 2  # made while the other is still there
        folder = str(Path(plan.memory.path).parent)
        needs.append(Need(folder, plan.memory.reserve * packed, "the guest's memory"))
    return needs


PATIENCE: Final = 1.0
"""Seconds that :func:`shortage` is given where an answer without it is better than none."""


class ShortageKind(Enum):
    """What is known of a file system that images lie on."""

    LOW = "low"
    """The guest may write more than is free."""
    UNKNOWN = "unknown"
    """Its storage did not answer at once."""


class Shortage(Struct, frozen=True, kw_only=True):
    """A file system that may fill up under the guest; ``str()`` is a sentence about it.

    Attributes:
        kind: whether that is known.
        folder: where images lie on it; empty if it is unknown.
        disks: names of the disks that write to it.
        free: bytes that are free on it.
        needed: bytes that the guest may still write to it.
    """

    kind: ShortageKind
    folder: str = ""
    disks: tuple[str, ...] = ()
    free: int = 0
    needed: int = 0

    def __str__(self) -> str:
        if self.kind is ShortageKind.UNKNOWN:
            return "the free space is unknown: the storage of an image did not answer at once"
        return (
            f"only {self.free >> 20} MiB are free at {self.folder}, where the guest may write"
            f" {self.needed >> 20} MiB more: QEMU pauses it when no space is left"
        )


UNKNOWN: Final = Shortage(kind=ShortageKind.UNKNOWN)


def shortage(chains: Iterable[Chain]) -> tuple[Shortage, ...]:
    """Every file system that is short of room for what the guest may still write to it."""
    growth: dict[int, int] = {}
    disks: dict[int, list[str]] = {}
    where: dict[int, tuple[str, Room]] = {}
    for chain in chains:
        layer = chain.active
        folder = str(Path(layer.path).parent)
        try:
            found = room(folder)
            used = Path(layer.path).stat().st_blocks * 512
        except (HostCannot, OSError):
            continue  # an inaccessible file is reported elsewhere
        growth[found.device] = growth.get(found.device, 0) + max(0, layer.virtual_size - used)
        disks.setdefault(found.device, []).append(chain.disk)
        where[found.device] = folder, found
    return tuple(
        Shortage(
            kind=ShortageKind.LOW,
            folder=folder,
            disks=tuple(disks[device]),
            free=found.free,
            needed=growth[device],
        )
        for device, (folder, found) in where.items()
        if found.free < min(LOW, growth[device])
    )
