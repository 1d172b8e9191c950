"""Numbers whose names are free in the QEMU that runs: nodes and jobs bear them, and its owner has named some, too."""

from qmpsnap.block import graph
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId, job_id, layer_id
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor


def first_free(machine: Machine, serial: int, taken: frozenset[str]) -> OperationId:
    """The first number from ``serial`` on none of whose names is taken; the numbers before it are nobody's."""
    number = OperationId(serial)
    while not taken.isdisjoint(_names(machine, number)):
        number = OperationId(number + 1)
    return number


def _names(machine: Machine, serial: OperationId) -> set[str]:
    layers = {layer_id(disk.name, serial) for disk in machine.spec.disks}
    jobs = {job_id(serial, disk.name) for disk in machine.spec.disks}
    return {*layers, *(f"{layer}.file" for layer in layers), *jobs}


async def taken(machine: Machine, qemu: Monitor, seen: frozenset[str], *, jobs: bool) -> frozenset[str]:
    """Every name that a node, or with ``jobs`` a job, could not have.

    ``seen`` are those of its graph, where that was just read.
    """
    # An owner's names are not those in the graph as we read it: nodes are called as the layers they are there.
    theirs: list[str] = []
    if machine.adopted:
        theirs = [*machine.adopted.nodes.values(), *(drive.device for drive in await commands.query_block(qemu))]
    if jobs:
        theirs += [job.id for job in await commands.query_jobs(qemu)]
    return (seen or graph.taken_names(await graph.read(qemu))).union(theirs)
