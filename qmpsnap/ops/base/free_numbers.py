"""Numbers whose names are free in the QEMU that runs: nodes and jobs bear them, and its owner has named some, too."""

from qmpsnap.block import graph
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId, job_id, layer_id
from qmpsnap.ops.base.context import Context, blocking
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor


async def next_free(
    context: Context, machine: Machine, qemu: Monitor | None, *, seen: frozenset[str] = frozenset()
) -> OperationId:
    """The number that the next operation would get after :func:`pass_over`; for plans that are only printed.

    ``seen`` are the names that its graph has, where that was just read.
    """
    serial = OperationId(await blocking(context.store.next_serial))
    taken = await _taken(machine, qemu, seen) if qemu else frozenset()
    while not taken.isdisjoint(_names(machine, serial)):
        serial = OperationId(serial + 1)
    return serial


async def pass_over(
    context: Context, machine: Machine, qemu: Monitor | None, *, seen: frozenset[str] = frozenset()
) -> None:
    """Let the next operation have a number none of whose names QEMU has; the numbers before it are nobody's."""
    if qemu and (serial := await next_free(context, machine, qemu, seen=seen)) != await blocking(
        context.store.next_serial
    ):
        await blocking(context.store.skip_to, serial)


def _names(machine: Machine, serial: OperationId) -> set[str]:
    layers = {layer_id(disk.name, serial) for disk in machine.spec.disks}
    jobs = {job_id(serial, disk.name) for disk in machine.spec.disks}
    return {*layers, *(f"{layer}.file" for layer in layers), *jobs}


async def _taken(machine: Machine, qemu: Monitor, seen: frozenset[str]) -> frozenset[str]:
    """Every name that a node or a job could not have."""
    # An owner's names are not those in the graph as we read it: nodes are called as the layers they are there.
    theirs: list[str] = []
    if machine.adopted:
        theirs = [*machine.adopted.nodes.values(), *(drive.device for drive in await commands.query_block(qemu))]
    jobs = [job.id for job in await commands.query_jobs(qemu)]
    return (seen or graph.taken_names(await graph.read(qemu))) | {*theirs, *jobs}
