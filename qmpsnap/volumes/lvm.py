"""Snapshots by the logical volume manager, of raw disks on its volumes: thin, which share a pool's blocks, and thick.

A thick snapshot keeps what is overwritten in its origin in a volume of a fixed size, and is lost when that is full. A
clone of one is a copy. LVM's programs hold a lock on the volume group and suspend the origin for a moment: they are not
killed, and whatever they say, the volumes that are listed afterwards decide.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from qmpsnap.errors import HostCannot, ImageInUse, NotFoundError, StateError, StoreMismatch, UsageError
from qmpsnap.host import files, storage_wait
from qmpsnap.host.programs import uninterrupted
from qmpsnap.host.threads import completed, to_end, to_read
from qmpsnap.model.text import printable
from qmpsnap.volumes import lvm_report as lvm
from qmpsnap.volumes.driver import Ability, DriverName, Size, Volume
from qmpsnap.volumes.lvm_report import PART, LogicalVolume, Place
from qmpsnap.volumes.names import VolumeName

THICK: Final = "20%"
"""Of its origin's size, what a thick snapshot has for what changes."""

_PATIENCE: Final = 60.0
"""Seconds for one of LVM's programs: it may wait for another one that works on the same volume group."""
_MARGIN: Final = 64 << 20
"""Bytes that a thin pool must have free: the guest's next writes take new blocks, and find the pool full otherwise."""
_CHUNK: Final = 256 << 20
_BLOCK: Final = 1 << 20
_INSTALL: Final = "apt-get install lvm2"
SYSTEM_PATH: Final = "/usr/sbin:/sbin"
"""Where the programs lie, and where the PATH of a service or of an ordinary user need not lead."""

Volumes = dict[str, LogicalVolume]


class Lvm(Struct, frozen=True):
    """The driver for logical volumes; ``thick``: how large thick snapshots are to be, see ``thick_size``."""

    thick: str = THICK

    @property
    def name(self) -> DriverName:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        return "lvm"

    def where(self, near: Volume, name: VolumeName) -> str:
        """In the same volume group."""
        return place_of(near).path.rpartition("/")[0] + f"/{name.text}"

    async def probe(self, origin: Volume | None) -> Ability:
        """By the programs of this host, and the figures of the volume, its group and its pool."""
        place = Place.parse(origin.path) if origin else None
        if origin and (place is None or place.group == "mapper" or not (origin.identity or "lvm:").startswith("lvm:")):
            return Ability(
                why=f"{printable(origin.path)} is no logical volume", remedy="name the disk as /dev/GROUP/VOLUME"
            )
        missing = await to_read(_missing)
        if missing or origin is None or place is None:
            return missing or Ability()
        volumes = await listed(place.group)
        return judge(place, origin_of(volumes, place, origin), volumes, self.thick)

    async def snapshot(self, origin: Volume, name: VolumeName) -> Volume:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        place = place_of(origin)
        volumes = await listed(place.group)
        source = origin_of(volumes, place, origin)
        if not (ability := judge(place, source, volumes, self.thick)).able:
            raise HostCannot(ability.why, hint=ability.remedy)
        _require_free(volumes, place, name.text)
        if source.is_thin:
            argv = lvm.thin_snapshot(place, name.text)
        else:
            argv = lvm.thick_snapshot(place, name.text, lvm.thick_size(self.thick, source.size, source.extent))
        return await made(argv, place, name, source)

    async def clone(self, snapshot: Volume, name: VolumeName) -> Volume:
        """See :class:`~qmpsnap.volumes.driver.Driver`; of a thick snapshot all its bytes are copied."""
        place = place_of(snapshot)
        volumes = await listed(place.group)
        source = origin_of(volumes, place, snapshot)
        if source.is_invalid:
            raise StateError(f"the snapshot {place} has run full, and its content is lost")
        _require_free(volumes, place, name.text)
        if source.is_thin:
            if why := _pool_full(place, source, volumes):
                raise HostCannot(why, hint=_enlarge(place))
            return await made(lvm.thin_clone(place, name.text), place, name, source)
        return await _copied(place, snapshot.bytes, name)

    async def activate(self, paths: Sequence[str]) -> None:
        """Give snapshots their devices, which they lack after a boot; what cannot have one is left for its user."""
        places = [place for path in paths if (place := Place.parse(path))]
        for group in dict.fromkeys(place.group for place in places):
            with contextlib.suppress(HostCannot):
                await run(lvm.activate([place for place in places if place.group == group]))

    async def remove(self, volume: Volume) -> None:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        place = place_of(volume)
        volumes = await listed(place.group)
        found = volumes.get(place.volume)
        if found is None:
            return
        if VolumeName.parse(place.volume.removesuffix(PART)) is None or found.identity != (
            volume.identity or found.identity
        ):
            raise StoreMismatch(f"{place} is another volume than the recorded one")
        if above := [one.lv_name for one in volumes.values() if _needs(one, found)]:
            raise StateError(f"{place} has snapshots of its own: {', '.join(above)}", hint="remove those first")
        if found.is_open:
            raise ImageInUse(f"{place} is open in another program, or mounted", hint=f"lsof {place.path} names it")
        said = await run(lvm.remove(place.group, found.lv_uuid))
        if any(one.lv_uuid == found.lv_uuid for one in (await listed(place.group)).values()):
            raise HostCannot(f"lvremove did not remove {place}: {said or 'it does not say why'}", effect="unknown")

    async def list(self, near: Volume, machine: str) -> tuple[Volume, ...]:
        """See :class:`~qmpsnap.volumes.driver.Driver`."""
        group = place_of(near).group
        return tuple(_volume(group, one, name) for name, one in lvm.ours(await listed(group), machine))

    async def size(self, volume: Volume) -> Size:
        """Of a thin one the blocks that it has in the pool, others' as well; of a thick one its reserve."""
        place = place_of(volume)
        found = origin_of(await listed(place.group), place, volume)
        if found.is_thin:
            return Size(own=found.mapped)
        return Size(own=found.size, full=found.full if found.is_thick_snapshot else None)


async def dependents(volume: Volume) -> tuple[str, ...]:
    """Paths of the thick snapshots that would go with a volume."""
    place = place_of(volume)
    volumes = await listed(place.group)
    found = volumes.get(place.volume)
    names = [one.lv_name for one in volumes.values() if found and _needs(one, found)]
    return tuple(Place(place.group, name).path for name in names)


async def growable(volume: Volume, size: int) -> str:
    """Why a volume cannot get that many bytes; empty where it can. LVM counts them in extents, by which it rounds up.

    Raises:
        UsageError: that is no whole number of extents.
    """
    place = place_of(volume)
    volumes = await listed(place.group)
    found = origin_of(volumes, place, volume)
    if size % found.extent:
        raise UsageError(
            f"volume group {place.group} has extents of {found.extent} bytes, and {size} are no whole number of them",
            hint=f"use {-(-size // found.extent) * found.extent}",
        )
    if refused := found.refusal():
        return f"{place} {refused}"
    if any(_needs(one, found) for one in volumes.values()):
        return f"{place} has thick snapshots, with which LVM enlarges no active volume"
    if not found.is_thin and found.free < size - found.size:
        return f"volume group {place.group} has {found.free} bytes free, and {place} needs {size - found.size} more"
    return ""


async def grow(volume: Volume, size: int) -> None:
    """Give a volume that many bytes; fine if it has them already."""
    place = place_of(volume)
    if origin_of(await listed(place.group), place, volume).size == size:
        return
    said = await run(lvm.extend(place, size))
    if origin_of(await listed(place.group), place, volume).size != size:
        raise HostCannot(f"lvextend did not enlarge {place}: {said or 'it does not say why'}")


async def copied(snapshot: Volume) -> int:
    """Bytes that a clone of a snapshot copies."""
    place = place_of(snapshot)
    source = origin_of(await listed(place.group), place, snapshot)
    return 0 if source.is_thin else source.seen


# --- judging ----------------------------------------------------------------------------------------------------------


def _missing() -> Ability | None:
    """What this host lacks."""
    path = _environment()["PATH"]
    if lacks := [program for program in ("lvs", "lvcreate", "lvremove") if not shutil.which(program, path=path)]:
        return Ability(why=f"there is no {lacks[0]} program", remedy=_INSTALL)
    if os.geteuid() != 0:
        return Ability(why="only root can change logical volumes", remedy="run qmpsnap as root")
    if "device-mapper" not in files.read("/proc/misc") and not os.path.exists("/dev/mapper/control"):  # noqa: PTH110
        return Ability(why="this host's kernel has no device mapper", remedy="modprobe dm-mod")
    return None


def judge(place: Place, origin: LogicalVolume, volumes: Volumes, thick: str) -> Ability:
    """Whether the volume can be snapshotted; pure."""
    if refused := origin.refusal():
        return Ability(why=f"{place} {refused}")
    if origin.is_thin:
        why = _pool_full(place, origin, volumes)
        return Ability(why=why, remedy=_enlarge(place) if why else "")
    size = lvm.thick_size(thick, origin.size, origin.extent)
    if origin.free < size:
        why = f"volume group {place.group} has {origin.free} bytes free, and the snapshot of {place} takes {size}"
        return Ability(why=why, remedy="choose a smaller one, or enlarge the group with vgextend")
    return Ability(
        reserve=size,
        clone_moves=origin.size,
        note=f"{thick} of the disk's {origin.size} bytes; it is lost once the guest has overwritten more than that",
    )


def _pool_full(place: Place, volume: LogicalVolume, volumes: Volumes) -> str:
    """Why the thin pool of a volume has no room for another one; empty where it has."""
    pool = next((one for one in volumes.values() if one.lv_uuid == volume.pool_lv_uuid), None)
    if pool is None or not pool.data_percent:
        return f"the thin pool of {place} does not say how full it is"
    name = f"{place.group}/{pool.lv_name}"
    if pool.lv_attr[8] not in "-D":
        return f"thin pool {name} has failed: its attributes are {pool.lv_attr}"
    if pool.size * (1 - pool.full) < _MARGIN:
        return f"thin pool {name} is {pool.data_percent}% full: less than {_MARGIN >> 20} MiB are free"
    # LVM itself wants a quarter of it, at most 4 MiB.
    room = int(pool.lv_metadata_size or 0)
    if room * (1 - float(pool.metadata_percent or 0) / 100) < min(room / 4, 4 << 20):
        return f"the metadata of thin pool {name} are {pool.metadata_percent}% full"
    return ""


def _enlarge(place: Place) -> str:
    return f"enlarge the pool: lvextend, which for its metadata has --poolmetadatasize; lvs -a {place.group} shows both"


def _needs(volume: LogicalVolume, origin: LogicalVolume) -> bool:
    """Whether a volume would go with its origin: thin ones live on."""
    return volume.is_thick_snapshot and volume.origin_uuid == origin.lv_uuid


def place_of(volume: Volume) -> Place:
    """Its group and name."""
    place = Place.parse(volume.path)
    if place is None:
        raise NotFoundError(f"{printable(volume.path)} is no logical volume", hint="its name is /dev/GROUP/VOLUME")
    return place


def origin_of(volumes: Volumes, place: Place, recorded: Volume) -> LogicalVolume:
    """The volume of that name, which has to be the recorded one."""
    found = volumes.get(place.volume)
    if found is None:
        raise NotFoundError(f"there is no logical volume {place}")
    if recorded.identity and found.identity != recorded.identity:
        raise StoreMismatch(
            f"{place} is another volume than the recorded one: its UUID is {found.lv_uuid}", hint="lvs -o+lv_uuid"
        )
    return found


def _require_free(volumes: Volumes, place: Place, name: str) -> None:
    if name in volumes:
        raise StateError(f"there is a volume {place.group}/{name} already", hint="lvs shows it")


def _volume(group: str, found: LogicalVolume, name: VolumeName) -> Volume:
    """A snapshot or clone as it is listed.

    LVM makes a plain volume first and turns it into a thick snapshot then: dead in between, it leaves the former.
    """
    snapshot = found.is_thin or found.is_thick_snapshot
    part = found.lv_name.endswith(PART) or (name.role == "snapshot" and not snapshot)
    return Volume(
        path=Place(group, found.lv_name).path,
        identity=found.identity,
        bytes=found.seen,
        name=name,
        state="part" if part else "invalid" if found.is_invalid else "ok",
    )


# --- doing ------------------------------------------------------------------------------------------------------------


async def made(argv: list[str], place: Place, name: VolumeName, source: LogicalVolume) -> Volume:
    """Have a snapshot made, and make sure that it is one of that volume."""
    said = await run(argv)
    found = (await listed(place.group)).get(name.text)
    if said or found is None:
        raise HostCannot(
            f"lvcreate made no snapshot of {place}: {said or 'it does not say why'}",
            effect="unknown" if found else "none",
        )
    if found.origin_uuid != source.lv_uuid:
        raise StoreMismatch(f"{place.group}/{name.text} is a snapshot of another volume than {place}", effect="unknown")
    return _volume(place.group, found, name)


async def _copied(source: Place, size: int, name: VolumeName) -> Volume:
    """A copy, under a name of its own until it is whole."""
    part = Place(source.group, name.text + PART)
    said = await run(lvm.plain_volume(part.group, part.volume, size))
    new = (await listed(part.group)).get(part.volume)
    if new is None or said:
        raise HostCannot(
            f"lvcreate made no volume {part}: {said or 'it does not say why'}", effect="unknown" if new else "none"
        )
    try:
        for start in range(0, size, _CHUNK):
            await to_end(_copy, source.path, part.path, start, min(start + _CHUNK, size))
        said = await run(lvm.rename(part, name.text))
    except BaseException:
        await completed(run(lvm.remove(part.group, new.lv_uuid)))
        raise
    found = (await listed(part.group)).get(name.text)
    if found is None or found.lv_uuid != new.lv_uuid:
        raise HostCannot(f"lvrename did not rename {part}: {said or 'it does not say why'}", effect="unknown")
    return _volume(part.group, found, name)


def _copy(source: str, target: str, start: int, end: int) -> None:
    try:
        with _opened(source, os.O_RDONLY) as reader, _opened(target, os.O_WRONLY | os.O_EXCL) as writer:
            for offset in range(start, end, _BLOCK):
                data = os.pread(reader, min(_BLOCK, end - offset), offset)
                if os.pwrite(writer, data, offset) != min(_BLOCK, end - offset):
                    raise HostCannot(f"{source} ended before its size", effect="unknown")
            os.fdatasync(writer)
    except OSError as error:
        raise HostCannot(f"{source} cannot be copied to {target}: {error.strerror}", effect="unknown") from error


@contextlib.contextmanager
def _opened(path: str, access: int) -> Iterator[int]:
    """A device, by the link that leads to it."""
    descriptor = os.open(path, access | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def listed(group: str) -> Volumes:
    """All volumes of a group."""
    done = await _ended(lvm.list_volumes(group))
    if done.returncode:
        said = lvm.last_line(done.stderr)
        if f'Volume group "{group}" not found' in done.stderr.decode(errors="replace"):
            raise NotFoundError(f"there is no volume group {group}", hint="vgs shows which there are")
        raise HostCannot(f"lvs cannot list volume group {group}: {said}")
    return lvm.parse(done.stdout)


async def run(argv: list[str]) -> str:
    """What a program says of its failure; empty where it has succeeded."""
    done = await _ended(argv)
    return "" if done.returncode == 0 else lvm.last_line(done.stderr)


async def _ended(argv: list[str]) -> "subprocess.CompletedProcess[bytes]":
    try:
        seconds = max(_PATIENCE, storage_wait.deadline())
        return await uninterrupted(argv, seconds=seconds, environment=_environment())
    except OSError as error:
        raise HostCannot(f"{argv[0]} cannot be run: {error.strerror}", hint=_INSTALL) from error


def _environment() -> dict[str, str]:
    """In English, whose sentences are looked for."""
    return {**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"}
