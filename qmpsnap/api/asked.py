"""What the methods of a handle are asked for, as the verbs take it; each refuses a value of a wrong type."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpsnap.later import Later
from qmpsnap.ops.base.requests import limited, well_typed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.layers.vmstate import Compression
    from qmpsnap.model.machines.spec import Format
    from qmpsnap.model.operations.by import DeleteBy, LoadBy, MirrorBy
    from qmpsnap.ops import save
    from qmpsnap.ops.fork import request as forks
    from qmpsnap.ops.fork.request import ForkRequest
    from qmpsnap.ops.merge import commit
    from qmpsnap.ops.merge.commit import CommitRequest, StreamRequest
    from qmpsnap.ops.mirror import mirror
    from qmpsnap.ops.mirror.mirror import MirrorRequest, Mode
    from qmpsnap.ops.revert import plan as revert_plan
    from qmpsnap.ops.revert.plan import HardwareOf, RevertRequest, Run
    from qmpsnap.ops.save import RestoreRequest, SaveRequest
    from qmpsnap.ops.snapshot import delete, describe
    from qmpsnap.ops.snapshot import plan as create_plan
    from qmpsnap.ops.snapshot import request as wishes
    from qmpsnap.ops.snapshot.delete import DeleteRequest
    from qmpsnap.ops.snapshot.describe import DescribeRequest
    from qmpsnap.ops.snapshot.plan import CreateRequest
    from qmpsnap.ops.snapshot.request import Files
else:
    forks = Later("ops.fork.request")
    commit, delete = Later("ops.merge.commit"), Later("ops.snapshot.delete")
    save, mirror = Later("ops.save"), Later("ops.mirror.mirror")
    revert_plan, create_plan = Later("ops.revert.plan"), Later("ops.snapshot.plan")
    describe, wishes = Later("ops.snapshot.describe"), Later("ops.snapshot.request")


def name_of(snapshot: Snapshot | str) -> str:
    """A snapshot's name, or that of a layer."""
    return snapshot if isinstance(snapshot, str) else snapshot.name


def to_commit(
    disk: str, *, base: Snapshot | str | None, top: Snapshot | str | None, consume: bool, bandwidth: int
) -> CommitRequest:
    """A merge downwards."""
    return well_typed(
        commit.CommitRequest(
            disk=disk, base=_named(base), top=_named(top), consume=consume, bandwidth=limited(bandwidth)
        )
    )


def to_stream(disk: str, *, base: Snapshot | str | None, bandwidth: int) -> StreamRequest:
    """A merge upwards."""
    return well_typed(commit.StreamRequest(disk=disk, base=_named(base), bandwidth=limited(bandwidth)))


def to_delete(
    names: tuple[Snapshot | str, ...], *, bandwidth: int, by: DeleteBy | None, **options: bool
) -> DeleteRequest:
    """The end of snapshots."""
    given, chosen = tuple(map(name_of, names)), by or "blockdev-snapshot-delete-internal-sync"
    request = delete.DeleteRequest(names=given, bandwidth=limited(bandwidth), by=chosen, **options)
    return well_typed(request)


def to_fork(snapshot: Snapshot | str | None, name: str | None, **options: Any) -> ForkRequest:
    """Machines that go on from a snapshot."""
    return well_typed(forks.ForkRequest(snapshot=_named(snapshot), name=name, **options))


def to_push(name: str | None, description: str) -> CreateRequest:
    """A snapshot to come back to."""
    return well_typed(create_plan.CreateRequest(name=name, description=description, pushed=True))


def to_describe(
    snapshot: Snapshot | str, description: str | None, tags: Mapping[str, str] | None, untag: Sequence[str]
) -> DescribeRequest:
    """Another description and other tags."""
    return well_typed(
        describe.DescribeRequest(
            name=name_of(snapshot),
            description=description,
            tags=tags or {},
            untag=wishes.names_of(untag, "untag") or (),
        )
    )


def layers(disks: Sequence[str] | None, files: Files | None) -> CreateRequest:
    """New layers without a snapshot."""
    return well_typed(
        create_plan.CreateRequest(disks=wishes.names_of(disks), files=wishes.paths_of(files), listed=False)
    )


def to_save(
    file: str | os.PathLike[str] | None, name: str | None, description: str, compression: Compression
) -> SaveRequest:
    """A full snapshot after which QEMU ends."""
    return well_typed(save.SaveRequest(file=_place(file), name=name, description=description, compression=compression))


def to_restore(file: str | os.PathLike[str] | None, *, discard: bool, paused: bool, after: bool) -> RestoreRequest:
    """A revert to where the machine was saved."""
    return well_typed(save.RestoreRequest(file=_place(file), discard=discard, paused=paused, after=after))


def to_revert(
    snapshot: Snapshot | str,
    *,
    discard: bool,
    state: Run | None,
    hardware: HardwareOf,
    after: bool,
    by: LoadBy | None,
) -> RevertRequest:
    """A revert."""
    return well_typed(
        revert_plan.RevertRequest(
            name=name_of(snapshot), discard=discard, run=state, hardware=hardware, after=after, by=by
        )
    )


def to_mirror(
    disk: str,
    target: str | os.PathLike[str],
    *,
    mode: Mode,
    shallow: bool,
    reuse: bool,
    format: Format | None,  # noqa: A002 - as in a spec
    write_blocking: bool,
    bandwidth: int,
    by: MirrorBy,
) -> MirrorRequest:
    """A copy."""
    return well_typed(
        mirror.MirrorRequest(
            disk=disk,
            target=os.fspath(target),
            mode=mode,
            shallow=shallow,
            reuse=reuse,
            format=format,
            write_blocking=write_blocking,
            bandwidth=limited(bandwidth),
            by=by,
        )
    )


def _named(snapshot: Snapshot | str | None) -> str | None:
    return None if snapshot is None else name_of(snapshot)


def _place(file: str | os.PathLike[str] | None) -> str | None:
    return None if file is None else str(Path(file).absolute())
