"""``import ... --define``: a machine of another manager is defined, with those of its snapshots that its files have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image import snapshot_table
from qmpsnap.block.image.header import FoundLayer
from qmpsnap.block.image.snapshot_table import Entry
from qmpsnap.errors import StateError
from qmpsnap.hint import option
from qmpsnap.host.files import Inode, inode_of
from qmpsnap.host.threads import to_read
from qmpsnap.imports.found import Imported
from qmpsnap.machine import originals
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import DefinePlan
from qmpsnap.ops.adoption.earlier_snapshots import Below, Disk, Taken, choose
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.lifecycle import define, dry_run
from qmpsnap.ops.lifecycle.disk_sources import DiskSource


class Done(Struct, frozen=True):
    """A machine that was taken over, or the plan of it."""

    machine: Machine
    taken: Taken
    plan: DefinePlan | None = None


async def run(context: Context, found: Imported, *, folders: Sequence[Path]) -> Done:
    """Define the machine; returns it as recorded.

    Raises:
        StateError: the original runs, or as :func:`qmpsnap.ops.lifecycle.define.run`.
    """
    taken: list[Taken] = []
    await to_read(_require_shut_down, found)
    machine = await define.run(context, found.spec, folders=folders, amend=_amending(found, taken))
    return Done(machine, taken[-1])


async def preview(context: Context, found: Imported, *, folders: Sequence[Path]) -> Done:
    """What :func:`run` would do now; refused as that would be, and nothing is changed."""
    taken: list[Taken] = []
    await to_read(_require_shut_down, found)
    planned = await dry_run.defined(context, found.spec, folders=folders, amend=_amending(found, taken))
    assert planned.change.define
    return Done(planned.change.define, taken[-1], planned)


def _require_shut_down(found: Imported) -> None:
    name, why = found.spec.name, found.runs
    if not why and found.spec.uuid and (process := originals.running(found.spec.uuid)):
        why = f"process {process} has its UUID {found.spec.uuid}"
    if why:
        raise StateError(
            f"the original of {name} runs: {why}",
            hint="shut it down where it was started; to print only its spec, omit " + option("define"),
            machine=name,
        )


def _amending(found: Imported, taken: list[Taken]) -> define.Amend:
    """How a plan gets the machine's snapshots; ``taken`` gets them, too."""

    def amend(planned: DefinePlan, sources: Mapping[str, DiskSource], serial: OperationId) -> DefinePlan:
        machine = planned.change.define
        assert machine
        new = {layer.path: layer.id for layer in planned.change.layers}
        paths = {path for moment in found.moments for one in moment.frozen.values() for path in (one.path, one.above)}
        files = {path: _file(path) for path in paths}
        disks = {name: _disk(source, new) for name, source in sources.items()}
        taken.append(choose(machine, found.moments, disks, files, operation=serial))
        now = taken[-1]
        return replace(planned, change=replace(planned.change, snapshots=now.snapshots, current=now.current))

    return amend


def _disk(source: DiskSource, new: Mapping[str, LayerId]) -> Disk:
    pairs = zip(source.found, source.known, strict=True)
    layers = [
        Below(known.id if known else new[file.path], (file.header.device, file.header.inode)) for file, known in pairs
    ]
    return Disk(tuple(layers), _tags(source.found[-1]) if source.found else ())


def _tags(top: FoundLayer) -> tuple[Entry, ...]:
    return snapshot_table.entries(top.path, top.format) or ()


def _file(path: str) -> Inode | None:
    try:
        return inode_of(Path(path).stat())
    except (OSError, ValueError):  # a NUL in the path
        return None
