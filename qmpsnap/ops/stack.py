"""``snapshot pop``: back to the current snapshot, which then goes; ``push`` is ``create``.

Two operations, each whole by itself. Broken off between them, the machine stands at the snapshot, and another ``pop``
does what is left.
"""

from qmpsnap.errors import QmpsnapError, StateError
from qmpsnap.ops import delete, revert
from qmpsnap.ops.context import Context
from qmpsnap.ops.delete import DeleteRequest
from qmpsnap.ops.revert import Reverted
from qmpsnap.ops.revert_plan import RevertRequest
from qmpsnap.ops.work import working
from qmpsnap.qmp.jobs import Report, unreported


async def pop(context: Context, name: str, *, report: Report = unreported) -> Reverted:
    """Go back to the current snapshot, without what was written since, and delete it; its parent is current then.

    Raises:
        StateError: there is no current snapshot, or it cannot be gone back to.
        QmpsnapError: see :func:`revert.run` and :func:`delete.run`.
    """
    async with working(context, name, "snapshot pop", removes=True) as work:
        current = work.machine.current
    if current is None:
        raise StateError(
            f"machine {name} stands on no snapshot; nothing was changed",
            hint=f"qmpsnap snapshot push {name} takes one to come back to",
            machine=name,
        )
    reverted = await revert.run(context, name, RevertRequest(name=current, discard=True))
    try:
        await delete.run(context, name, DeleteRequest(names=(current,)), report=report)
    except QmpsnapError as error:
        if error.effect == "none":
            error.claim("applied", f"the machine stands at {current}, and what was written since is gone")
        raise
    return reverted
