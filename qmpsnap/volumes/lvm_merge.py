"""A thick LVM snapshot merged into its origin: what was overwritten goes back, and no byte else is copied.

``lvconvert --merge`` gives the snapshot up. It is taken anew once the merge is over: the origin holds what it held, and
the group has its room again. Each step is told by the volumes that are listed, so what was interrupted is gone on with.
"""

import time
from typing import Final

import anyio
from msgspec import Struct

from qmpsnap.errors import HostCannot, ImageInUse
from qmpsnap.volumes import lvm_report
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.lvm import listed, made, origin_of, place_of, run
from qmpsnap.volumes.lvm_report import LogicalVolume

_INTERVAL: Final = 0.5
"""Seconds between two looks at a merge."""
_RETRY: Final = 10.0
"""Seconds that udev has to close a volume which it looks at as QEMU has closed it; and until a merge is begun again."""
_PATIENCE: Final = 60.0
"""Seconds without any progress of a merge, after which it is left to itself."""


class Mergeable(Struct, frozen=True):
    """``moves``: bytes that a merge copies, at most; ``reserve``: of the snapshot, which a new one gets as well."""

    moves: int
    reserve: int


async def mergeable(snapshot: Volume, origin: Volume) -> Mergeable | None:
    """What a merge of a snapshot into its origin costs; None where a clone of it is to be made instead.

    That is so for a thin volume, whose clone costs nothing; for another origin; if the origin has further snapshots,
    which a merge could fill; and if another program reads the snapshot.
    """
    place, above = place_of(snapshot), place_of(origin)
    if place.group != above.group:
        return None
    volumes = await listed(place.group)
    found, source = origin_of(volumes, place, snapshot), origin_of(volumes, above, origin)
    siblings = [one for one in volumes.values() if one.is_thick_snapshot and one.origin_uuid == source.lv_uuid]
    if siblings != [found] or found.is_invalid or found.is_open or source.refusal():
        return None
    return Mergeable(moves=min(source.size, int(found.size * found.full)), reserve=found.size)


async def merge(snapshot: Volume, origin: Volume, *, reserve: int) -> Volume:
    """Merge a snapshot into its origin, which nobody has open, and take it anew under the same name.

    Raises:
        ImageInUse: a program has one of them open.
        StoreMismatch: another volume has one of their names.
        HostCannot: one of LVM's programs failed, or the merge does not proceed.
    """
    place, above = place_of(snapshot), place_of(origin)
    found, source = await _closed(snapshot, origin)
    if found and found.identity == snapshot.identity:
        if said := await run(lvm_report.merge(place)):
            raise HostCannot(f"lvconvert did not merge {place}: {said}", effect="unknown")
        found = None
    elif source.is_merging:
        await run(lvm_report.refresh(above))  # whoever watched it may have died
    source = await _merged(origin, source)
    assert snapshot.name
    if found is None or found.origin_uuid != source.lv_uuid:
        argv = lvm_report.thick_snapshot(above, place.volume, reserve)
        return await made(argv, above, snapshot.name, source)
    return await _known(snapshot)


async def _closed(snapshot: Volume, origin: Volume) -> tuple[LogicalVolume | None, LogicalVolume]:
    """The snapshot, where it is listed, and its origin; where both are to be merged nobody has one of them open."""
    place, since = place_of(snapshot), time.monotonic()
    while True:
        volumes = await listed(place.group)
        found, source = volumes.get(place.volume), origin_of(volumes, place_of(origin), origin)
        if found is None or found.identity != snapshot.identity:
            return found, source
        used = [one.lv_name for one in (found, source) if one.is_open]
        if not used:
            return found, source
        if time.monotonic() - since > _RETRY:
            raise ImageInUse(
                f"{place.group}/{used[0]} is open in another program, and cannot be merged",
                effect="unknown",
                hint=f"lsof /dev/{place.group}/{used[0]} names it",
            )
        await anyio.sleep(_INTERVAL)


async def _known(snapshot: Volume) -> Volume:
    """The snapshot that was taken anew already."""
    place = place_of(snapshot)
    found = origin_of(await listed(place.group), place, Volume(path=snapshot.path))
    return Volume(path=snapshot.path, identity=found.identity, bytes=found.seen, name=snapshot.name)


async def _merged(origin: Volume, source: LogicalVolume) -> LogicalVolume:
    """The origin, once nothing is being merged into it.

    LVM defers a merge where one of both is open in that instant, until a refresh finds them closed.
    """
    place = place_of(origin)
    left, since = source.data_percent, time.monotonic()
    begun = since
    while True:
        found = origin_of(await listed(place.group), place, origin)
        if not found.is_merging:
            return found
        if found.data_percent != left:
            left, since = found.data_percent, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            raise HostCannot(
                f"the merge of a snapshot into {place} does not proceed: {left or '?'}% are left",
                effect="unknown",
                hint=f"lvs -a {place.group} shows it",
            )
        elif time.monotonic() - begun > _RETRY:
            await run(lvm_report.refresh(place))
            begun = time.monotonic()
        await anyio.sleep(_INTERVAL)
