"""A reflink on any file system: where the kernel cannot share blocks they are copied, so that faults run everywhere."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap.host.files import FileId
from qmpsnap.host.threads import to_end
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.copies import VolumeMerge
from qmpsnap.ops.base import volumes
from qmpsnap.volumes import reflink
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.names import of_path

_share = reflink.share
_PIECE = 1 << 20


def _share_or_copy(source: int, target: int) -> None:
    try:
        _share(source, target)
    except OSError as error:
        if error.errno not in reflink._CANNOT:
            raise
        os.ftruncate(target, os.fstat(source).st_size)
        at = 0
        while data := os.pread(source, _PIECE, at):
            if data.strip(b"\0"):
                os.pwrite(target, data, at)
            at += len(data)


@contextmanager
def everywhere() -> Iterator[None]:
    """For the block every file system can make snapshots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reflink, "share", _share_or_copy)
        patch.setattr(reflink, "_able", {})
        yield


async def _mergeable(active: Layer, snapshot: Layer) -> VolumeMerge | None:
    name = of_path(snapshot.path)
    assert name
    return VolumeMerge(disk=name.disk, layer=active, snapshot=snapshot, reserve=0, moves=active.virtual_size)


def _move(snapshot: Path, origin: str) -> None:
    with snapshot.open("rb") as source, Path(origin).open("r+b") as target:
        target.truncate(0)
        shutil.copyfileobj(source, target)
    snapshot.unlink()


async def _merge(merges: Iterable[VolumeMerge]) -> dict[LayerId, Volume]:
    made: dict[LayerId, Volume] = {}
    for one in merges:
        path, name = Path(one.snapshot.path), of_path(one.snapshot.path)
        assert name
        found = FileId.at(path)
        if found and (found.device, found.inode) == (one.snapshot.device, one.snapshot.inode):
            await to_end(_move, path, one.layer.path)
            found = None
        made[one.snapshot.id] = (
            await reflink.Reflink().snapshot(volumes.volume_of(one.layer), name)
            if found is None
            else Volume(path=str(path), device=found.device, inode=found.inode, birth=found.birth, name=name)
        )
    return made


@contextmanager
def merging() -> Iterator[None]:
    """For the block files can be merged as thick logical volumes are: in place, and the snapshot is lost with it."""
    with everywhere(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "mergeable", _mergeable)
        patch.setattr(volumes, "merge", _merge)
        yield
