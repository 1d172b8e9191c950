"""``snapshot pop``: back to the snapshot that ``push`` took, which then goes; ``push`` is ``create`` with a mark.

Two operations, each whole by itself. Broken off between them, the machine stands at the snapshot, and another ``pop``
does what is left.
"""

from msgspec import Struct

from qmpsnap.errors import QmpsnapError, StateError
from qmpsnap.hint import call, option
from qmpsnap.model.layers.snapshot import require_snapshot
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.revert import revert
from qmpsnap.ops.revert.plan import RevertRequest
from qmpsnap.ops.revert.revert import Preview, Reverted
from qmpsnap.ops.session import planning_state
from qmpsnap.ops.session.session import looking, working
from qmpsnap.ops.snapshot import delete
from qmpsnap.ops.snapshot.delete import DeletePlan, DeleteRequest
from qmpsnap.qmp.jobs import Report, unreported


class PopPreview(Struct, frozen=True):
    """The plans that a pop would follow now, one after the other."""

    revert: Preview
    delete: DeletePlan


async def pop(
    context: Context, name: str, *, discard: bool = False, bandwidth: int = 0, report: Report = unreported
) -> Reverted:
    """Go back to the current snapshot, without what was written since, and delete it; its parent is current then.

    Raises:
        StateError: there is no current snapshot, it was not pushed, or it cannot be gone back to.
        QmpsnapError: see :func:`revert.run` and :func:`delete.run`.
    """
    async with working(context, name, "snapshot pop", removes=True):
        current = await _top(context, name, discard=discard)
    reverted = await revert.run(context, name, RevertRequest(name=current, discard=True))
    try:
        await delete.run(context, name, DeleteRequest(names=(current,), bandwidth=bandwidth), report=report)
    except QmpsnapError as error:
        if error.effect == "none":
            error.claim("applied", f"the machine is at {current}, and all changes since are lost")
        raise
    return reverted


async def preview(context: Context, name: str, *, discard: bool = False) -> PopPreview:
    """What :func:`pop` would do now, without a lock and without a change; refused as that would be."""
    async with looking(context, name, removes=True) as session:
        current = await _top(context, name, discard=discard)
        at = await planning_state.look(session, disks=())
    back = await revert.preview(context, name, RevertRequest(name=current, discard=True))
    return PopPreview(back, delete.plan(at.after(back.plan.change), DeleteRequest(names=(current,))))


async def _top(context: Context, name: str, *, discard: bool) -> str:
    """The snapshot that goes: what push has not made, nobody has agreed to lose."""
    machine = await context.astore.machine(name)
    if machine.current is None:
        raise StateError(
            f"machine {name} has no current snapshot",
            hint="take one first: " + call("push", name),
            machine=name,
        )
    found = require_snapshot(await context.astore.snapshots(name), machine.current, machine=name)
    if not (found.pushed or discard):
        raise StateError(
            f"pop would delete snapshot {found.name} of machine {name}, which push did not take, and all changes since",
            hint="keep both: " + call("revert", name, found.name) + "; or accept that with " + option("discard"),
            machine=name,
        )
    return found.name
