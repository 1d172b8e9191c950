"""The part of a revert from which there is only forward; the run and a later recovery take the same way.

``stopping``: QEMU ends -> the UEFI variable store is kept and replaced -> volumes get their snapshots' content
(``merging``) -> the record changes, in one SQL transaction (``switched``) -> files that nobody needs go.
"""

from pathlib import Path

from qmpsnap.block.image import header
from qmpsnap.errors import HostCannot, ImageRefused, StoreMismatch
from qmpsnap.hint import option
from qmpsnap.host.files import Identified
from qmpsnap.host.threads import to_end
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.config.firmware_files import copy_variables, copy_variables_once, forget_variables
from qmpsnap.machine.qemu import require_ended
from qmpsnap.model.home import Home
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Operation, RevertPlan
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import headers_of, identified, require_planned
from qmpsnap.ops.outside import layer_changes


async def switch(session: MachineSession, operation: Operation[RevertPlan]) -> None:
    """End QEMU, if it lives, and make the revert true; the machine is stopped afterwards.

    ``StoreMismatch``: another file is where a layer lay that should go; it was not touched.
    """
    context, machine, plan = session.context, session.machine, operation.plan
    await require_ended(context.process(machine), session.qemu, machine=machine.name, effect="unknown")
    await context.astore.set_process(machine.name, None)
    # Only now: a guest that runs may write between any look and the end.
    if plan.keeps:
        await to_end(copy_variables_once, str(context.home.variables(machine.name)), plan.keeps)
    empty = await to_end(nothing_written, plan, plan.keeps)
    change = plan.unwritten.change if plan.unwritten and empty else plan.change
    await to_end(require_planned, plan.overlays)
    headers: dict[LayerId, Identified] = {**await to_end(headers_of, [one.layer for one in plan.new])}
    if plan.merges:
        anew = [merge.snapshot.id for merge in plan.merges]
        await context.astore.mark(operation.id, "running", step=steps.MERGING, writes=anew)
        headers |= await volumes.merge(plan.merges)
    change = identified(change, headers)
    if plan.variables:
        mine, kept = plan.variables
        await to_end(copy_variables, kept, mine)
    await context.astore.settle(operation.id, machine.name, change, step=steps.SWITCHED)
    await remove_files(context, plan)


async def remove_files(context: Context, plan: RevertPlan) -> None:
    """Remove the files of what the record does not have any more, or never had; fine when they are gone."""
    gone = (*plan.removed, *(plan.unwritten.layers if plan.unwritten else ()))
    known = await context.astore.layers([layer.id for layer in gone])
    sizes = await blocking(layer_changes.sizes, context.store, [layer.id for layer in gone])
    for layer in volumes.latest_first(gone):
        if layer.id not in known:
            await volumes.remove(layer, size=sizes.get(layer.id))
    if plan.keeps:
        snapshots = await context.astore.snapshots(plan.machine)
        if all(found.variables != plan.keeps for found in snapshots):
            await to_end(forget_variables, plan.keeps)


def nothing_written(plan: RevertPlan, variables: str | None) -> bool:
    """Whether there is nothing that only an automatic snapshot would keep; what cannot be read was written to.

    ``variables``: where the UEFI variable store's content lies now; None where it is not replaced.
    """
    unwritten = plan.unwritten
    if unwritten is None:
        return False
    try:
        if not all(header.is_empty(layer) for layer in unwritten.layers):
            return False
        return variables is None or _reads_like(variables, unwritten.variables)
    except (ImageRefused, HostCannot, OSError):
        return False


def _reads_like(path: str, copies: tuple[str, ...]) -> bool:
    content = firmware_files.content(path)
    return any(firmware_files.content(copy) == content for copy in copies if Path(copy).is_file())


def require_variables(home: Home, planned: RevertPlan) -> None:
    """Make sure that the variable store is there, where it is to be kept."""
    if planned.keeps and not (path := home.variables(planned.machine)).is_file():
        raise StoreMismatch(
            f"{path}, the variable store of machine {planned.machine}, does not exist",
            hint="put a copy of it back, or do not keep the present state: " + option("discard"),
            machine=planned.machine,
        )


def require_kept(machine: Machine, snapshot: Snapshot) -> None:
    """Make sure that the copy of the variable store is there before anything is ended for it."""
    if gone := firmware_files.missing(snapshot.variables):
        raise StoreMismatch(
            f"{gone[0]}, which snapshot {snapshot.name} has of the guest's firmware, does not exist",
            hint="put a copy of it back",
            machine=machine.name,
        )
