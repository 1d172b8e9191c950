"""``snapshot rename``: another name, in one SQL transaction; the snapshots that grew from it follow."""

from qmpsnap.model.layers.snapshot import Snapshot, require_snapshot
from qmpsnap.model.names import check_name
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.session.session import looking, working


async def run(context: Context, name: str, old: str, new: str) -> Snapshot:
    """Rename a snapshot; returns it as it is now."""
    check_name(new, "snapshot")  # whatever machine it is
    # Operations remember snapshots by name, so none may be open: this frame ends them first.
    async with working(context, name, "snapshot rename") as session:
        await _require_possible(session, old, new)
        await context.astore.apply(name, Change(renamed={old: new}))
        return next(found for found in await context.astore.snapshots(name) if found.name == new)


async def preview(context: Context, name: str, old: str, new: str) -> None:
    """Make sure that :func:`run` would do it now."""
    check_name(new, "snapshot")
    async with looking(context, name) as session:
        await _require_possible(session, old, new)


async def _require_possible(session: MachineSession, old: str, new: str) -> None:
    context, name = session.context, session.machine.name
    snapshots = await context.astore.snapshots(name)
    require_snapshot(snapshots, old, machine=name)
    requests.require_snapshot_name(session.machine, await context.astore.chains(name), new)
    requests.require_free_name(snapshots, new, machine=name)
