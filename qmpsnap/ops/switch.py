"""The part of a revert from which there is only forward; the run and a later recovery take the same way.

``stopping``: QEMU ends -> the record changes, in one SQL transaction (``switched``) -> files that nobody needs go.
"""

from collections.abc import Iterable

from qmpsnap.block import header
from qmpsnap.block.image import remove
from qmpsnap.errors import DeadlinePassed, HostCannot, ImageRefused
from qmpsnap.machine.machine import end
from qmpsnap.model import steps
from qmpsnap.model.chain import Layer
from qmpsnap.model.machine import Machine
from qmpsnap.model.operation import Operation, RevertPlan
from qmpsnap.ops.context import Context, blocking
from qmpsnap.ops.overlays import headers_of, identified, require_planned
from qmpsnap.ops.tagging import copy_variables
from qmpsnap.qmp.session import Monitor
from qmpsnap.threads import to_end


async def switch(
    context: Context, machine: Machine, qemu: Monitor | None, operation: Operation, plan: RevertPlan
) -> None:
    """End QEMU, if it lives, and make the revert true; the machine is stopped afterwards.

    Raises:
        DeadlinePassed: QEMU cannot be ended.
        StoreMismatch: another file is where a layer lay that should go; it was not touched.
    """
    process = context.process(machine)
    if process and not await end(process, qemu):
        raise DeadlinePassed(
            f"QEMU of machine {machine.name} (process {process.pid}) does not end",
            hint=f"its storage may hang; once it has ended: qmpsnap recover {machine.name}",
            effect="unknown",
            machine=machine.name,
        )
    await blocking(context.store.set_process, machine.name, None)
    # Only now: a guest that runs may write between any look and the end.
    change = plan.change
    if plan.unwritten:
        empty = await to_end(all_empty, plan.unwritten.layers)
        change = plan.unwritten.change if empty else change
    await to_end(require_planned, plan.overlays)
    headers = await to_end(headers_of, [one.layer for one in plan.new])
    change = identified(change, headers)
    if plan.variables:
        mine, kept = plan.variables
        await to_end(copy_variables, kept, mine)
    await blocking(lambda: context.store.settle(operation.id, machine.name, change, step=steps.SWITCHED))
    await remove_files(context, plan)


async def remove_files(context: Context, plan: RevertPlan) -> None:
    """Remove the files of those layers that the record does not have any more; fine when they are gone."""
    forest = await blocking(context.store.forest)
    for layer in (*plan.removed, *(plan.unwritten.layers if plan.unwritten else ())):
        if layer.id not in forest.layers:
            await remove(layer.path, device=layer.device, inode=layer.inode)


def all_empty(layers: Iterable[Layer]) -> bool:
    """Whether nothing was written to any of them; a layer that cannot be read does not count as empty."""
    try:
        return all(header.is_empty(layer) for layer in layers)
    except (ImageRefused, HostCannot):
        return False
