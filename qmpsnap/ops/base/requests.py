"""What every kind of snapshot is asked for: a name, disks; and the state of the machine it is taken of."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

from qmpsnap.block.graph import Beside
from qmpsnap.errors import NameRefused, NameTaken, StateError, UsageError
from qmpsnap.hint import call, option
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Outside, Snapshot
from qmpsnap.model.layers.vmstate import version_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import OperationId, check_name, layer_disk
from qmpsnap.model.timestamps import moment
from qmpsnap.qmp import commands, runstate
from qmpsnap.qmp.session import Monitor

SUSPENDED_SINCE = (9, 0)
"""The first QEMU whose memory of a guest says that it sleeps, and that stops and continues a sleeping one."""

_Request = TypeVar("_Request", bound=Struct)


def well_typed(request: _Request) -> _Request:
    """The request, if each field is what its type says: a mistyped word must not pass for a weaker wish."""
    try:
        return msgspec.convert(msgspec.to_builtins(request, builtin_types=(bytes,)), type(request))
    except (msgspec.ValidationError, TypeError) as error:
        raise UsageError(str(error)) from error


def limited(limit: int) -> int:
    """The limit, if it is a number of bytes per second for QEMU (QAPI ``block-job-set-speed``)."""
    if type(limit) is not int or not 0 <= limit < 1 << 63:
        raise UsageError(
            f"a bandwidth cannot be {limit!r} bytes per second", hint="use a whole number, or 0 for no limit"
        )
    return limit


async def mode_of(qemu: Monitor | None) -> str:
    """``live``, ``suspended``, ``paused`` or ``stopped``: how a snapshot taken now is taken."""
    if qemu is None:
        return "stopped"
    status = await commands.query_status(qemu)
    if status.status == runstate.SUSPENDED:
        return "suspended"
    return "live" if status.running else "paused"


def may_run(mode: str) -> bool:
    """Whether the guest may write at any moment unless it is held: it runs, or sleeps and may wake by itself."""
    return mode in {"live", "suspended"}


async def require_told(machine: Machine, qemu: Monitor, *, doing: str, hint: str = "") -> None:
    """Make sure that memory saved from this QEMU, or loaded into it, records whether the guest is suspended.

    QEMU before 9.0 loads the memory of a suspended guest as that of a running one, which nothing can wake any more.
    """
    if (await commands.query_status(qemu)).status != runstate.SUSPENDED:
        return
    version = await commands.query_version(qemu)
    if version_of(version) < SUSPENDED_SINCE:
        raise StateError(
            f"the guest of machine {machine.name} is suspended, and QEMU {version} cannot {doing}: it does not keep"
            " the suspended state",
            hint="wake it first: " + runstate.remedy(runstate.SUSPENDED, machine.name) + (hint and "; or " + hint),
            machine=machine.name,
        )


def snapshot_name(
    machine: Machine, chains: Iterable[Chain], snapshots: Sequence[Snapshot], name: str | None, *, prefix: str = "snap"
) -> str:
    """The name as asked for, or the next free one."""
    if name is None:
        taken = {snapshot.name for snapshot in snapshots}
        return free_name(prefix, taken, layered=layered(machine, chains))
    require_snapshot_name(machine, chains, name)
    require_free_name(snapshots, name, machine=machine.name)
    return name


def layered(machine: Machine, chains: Iterable[Chain]) -> frozenset[str]:
    """What the layers of a machine are called after: its disks, and those of others from whom it has layers."""
    others = {layer_disk(layer) for chain in chains for layer in chain.ids}
    specs = (machine.spec, *(past.spec for past in machine.past))
    return frozenset({disk.name for spec in specs for disk in spec.disks} | {disk for disk in others if disk})


def free_name(prefix: str, taken: Collection[str], *, layered: Collection[str]) -> str:
    """The next free ``PREFIX-N``; of a machine with a disk of that name, whose layers are called so, ``PREFIX.N``."""
    mark = "." if prefix in layered else "-"
    return next(free for number in range(1, len(taken) + 2) if (free := f"{prefix}{mark}{number}") not in taken)


def require_snapshot_name(machine: Machine, chains: Iterable[Chain], name: str) -> None:
    """Make sure that a name stands for a snapshot alone: no layer of the machine is called so, or may be one day."""
    check_name(name, "snapshot")
    if (disk := layer_disk(name)) in layered(machine, chains):
        raise NameRefused(
            f"{name} is a name of layers of disk {disk}, not of snapshots",
            hint="choose another name",
            machine=machine.name,
        )


def require_free_name(snapshots: Iterable[Snapshot], name: str, *, machine: str) -> None:
    """Make sure that no snapshot of the machine has that name."""
    for snapshot in snapshots:
        if snapshot.name == name:
            raise NameTaken(
                f"machine {machine} has had a snapshot {name} since {moment(snapshot.created)}",
                hint="choose another name",
                machine=machine,
            )


def automatic_name(taken: Collection[str], serial: OperationId, *, layered: Collection[str]) -> str:
    """A free name for the snapshot that a revert makes of what was active before; no layer's, as :func:`free_name`."""
    first = f"auto.{serial}" if "auto" in layered else f"auto-{serial}"
    names = (first, *(f"{first}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def require_time(value: float | None, what: str) -> None:
    """Make sure that a wait ends: compared with NaN no time is ever over."""
    if value is not None and not 0 <= value < math.inf:
        raise UsageError(f"{what} cannot be {value:g}", hint="use zero or a positive number")


def disks(machine: Machine, wanted: tuple[str, ...] | None, *, lacking: frozenset[str] = frozenset()) -> frozenset[str]:
    """The disks as asked for; without a wish all that the spec does not leave out and QEMU does not lack."""
    if wanted is None:
        chosen = [disk.name for disk in machine.spec.disks if disk.snapshot and not disk.read_only]
        chosen = [disk for disk in chosen if disk not in lacking]
    else:
        chosen = [_writable(machine, disk).name for disk in wanted]
    if not chosen:
        raise StateError(
            f"machine {machine.name} has no disk that a snapshot could include",
            hint=call("state", machine.name) + " lists its disks",
            machine=machine.name,
        )
    return frozenset(chosen)


def outside(machine: Machine, beside: Beside, wanted: tuple[str, ...] | None) -> tuple[Outside, ...]:
    """What a snapshot of these disks has not though it was asked for everything; nothing where disks were named."""
    if wanted is not None:
        return ()
    left_out = (disk.name for disk in machine.spec.disks if disk.name in beside.unplugged)
    return (*beside.others, *(Outside(name) for name in left_out))


def _writable(machine: Machine, name: str) -> DiskSpec:
    disk = machine.require_disk(name)
    if disk.read_only:
        raise StateError(
            f"disk {name} of machine {machine.name} is read-only and never changes",
            hint="leave it out of " + option("disks", "..."),
            machine=machine.name,
        )
    return disk


def require_all(machine: Machine, chosen: frozenset[str], *, lacking: frozenset[str] = frozenset()) -> None:
    """Memory and disks are of one instant, or the guest's file systems would not fit its memory.

    Refused where a disk that the guest writes to is left out, or was unplugged: memory is loaded beside all disks.
    """
    if gone := [disk.name for disk in machine.spec.disks if disk.name in lacking]:
        raise StateError(
            f"disk {', '.join(gone)} of machine {machine.name} was unplugged, but the QEMU that loads this memory would"
            " have it again",
            hint="attach it again (device_add), or take the other disks alone: " + call("snapshot", machine.name),
            machine=machine.name,
        )
    if left_out := [disk.name for disk in machine.spec.disks if not disk.read_only and disk.name not in chosen]:
        raise StateError(
            f"a snapshot with the memory of machine {machine.name} must include {', '.join(left_out)}: loading memory"
            " beside a disk of another point in time destroys its content",
            hint="include all disks"
            if all(machine.require_disk(name).snapshot for name in left_out)
            else "'snapshot: no' in a spec allows disk snapshots only: " + call("snapshot", machine.name),
            machine=machine.name,
        )
