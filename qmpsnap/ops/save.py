"""``save`` and ``restore``: the machine ends with its memory in a file, and goes on from there another time.

A saved machine is a full snapshot after which QEMU has ended; to restore it is to revert to that and run on. In between
the machine may be started afresh: it then writes to other layers.
"""

from pathlib import Path

from msgspec import Struct

from qmpsnap.errors import NotFoundError, StateError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end
from qmpsnap.machine import statefile
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Compression
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.memory.strategy import MemoryRequest
from qmpsnap.ops.revert import revert
from qmpsnap.ops.revert.plan import RevertRequest
from qmpsnap.ops.revert.revert import Preview, Reverted
from qmpsnap.ops.snapshot import create
from qmpsnap.ops.snapshot.plan import CreateRequest
from qmpsnap.qmp.jobs import Report, unreported


class SaveRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for; without a file it lies with the machine's images, without a name it is ``saved-N``."""

    file: str | None = None
    name: str | None = None
    description: str = ""
    compression: Compression = "none"


class RestoreRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for, as in :class:`~qmpsnap.ops.revert.plan.RevertRequest`; without a file the latest one."""

    file: str | None = None
    discard: bool = False
    paused: bool = False
    after: bool = True


def wanted(request: SaveRequest) -> CreateRequest:
    """The snapshot that a save is."""
    memory = MemoryRequest(file=request.file, compression=request.compression, quit=True)
    return CreateRequest(name=request.name, description=request.description, memory=memory)


async def save(context: Context, name: str, request: SaveRequest, *, report: Report = unreported) -> Snapshot:
    """Save the machine and end its QEMU; returns the snapshot that holds it."""
    return await create.run(context, name, wanted(request), report=report)


async def restore(context: Context, name: str, request: RestoreRequest) -> Reverted:
    """Let a machine go on where it was saved."""
    return await revert.run(context, name, await _wanted_back(context, name, request))


async def preview_restore(context: Context, name: str, request: RestoreRequest) -> Preview:
    """What :func:`restore` would do now; refused as that would be, but for a file that is damaged inside."""
    return await revert.preview(context, name, await _wanted_back(context, name, request))


async def _wanted_back(context: Context, name: str, request: RestoreRequest) -> RevertRequest:
    """The revert that a restore is."""
    snapshot = await _find(context, name, request.file)
    return RevertRequest(
        name=snapshot.name,
        discard=request.discard,
        run="paused" if request.paused else "running",
        file=request.file,
        after=request.after,
        resume=True,
    )


async def _find(context: Context, name: str, file: str | None) -> Snapshot:
    machine = await context.astore.machine(name)
    full = [found for found in await context.astore.snapshots(name) if found.vmstate]
    if file is None:
        if usable := [found for found in full if found.state == "ok"]:
            return usable[-1]
        raise NotFoundError(
            f"machine {name} has no full snapshot to restore",
            hint=call("save", name) + " takes one",
            machine=name,
        )
    state, manifest = await to_end(statefile.find, str(Path(file)))
    if state.hardware.uuid != machine.uuid:
        raise StateError(
            f"{file} is the memory of another machine (UUID {state.hardware.uuid})",
            hint="use a state file of this machine",
            machine=name,
        )
    for found in full:
        if found.vmstate and found.vmstate.digest == state.digest:
            return found
    raise StateError(
        f"{file} belongs to snapshot {manifest.snapshot}, which machine {name} no longer has: its disks have"
        " changed since",
        hint="restore one that " + call("snapshots", name) + " lists",
        machine=name,
    )
