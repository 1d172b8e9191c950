"""What QEMU itself decides of an image that it opens by its path: for ``blockdev-snapshot-sync`` and ``drive-mirror``.

It names the node below, which reads the file (``#block123``); and of how the disk is opened it keeps cache and discard
modes, but neither ``detect-zeroes`` nor the options of one driver, nor can it be given a key.
"""

from collections.abc import Iterable

from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.errors import StateError
from qmpsnap.hint import option
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp.commands import BlockGraph
from qmpsnap.qmp.session import Monitor

_INHERITED = frozenset({"discard", "cache"})


async def note(context: Context, machine: Machine, qemu: Monitor, layers: Iterable[Layer]) -> None:
    """Record QEMU's names of the nodes below these layers', so that its monitor exchanges them from the next call on.

    They are those of one process, and forgotten with it.
    """
    process = context.process(machine)
    if process is None:
        return
    given = foreign(await graph.read(qemu), layers)
    if not given.items() <= process.nodes.items():
        await context.astore.set_process(machine.name, replace(process, nodes={**process.nodes, **given}))


def foreign(found: BlockGraph, layers: Iterable[Layer]) -> dict[str, str]:
    """The nodes below these layers' that QEMU has named itself, by the names that we would have given them."""
    names = {f"{node_name(layer)}.file": graph.child(found, node_name(layer), "file") for layer in layers}
    return {ours: name for ours, name in names.items() if name and name != ours}


def require_inherited(machine: Machine, disks: Iterable[str], *, command: str, default: str) -> None:
    """Refuse a disk that QEMU would open otherwise than it is open now, or could not open at all."""
    for name in disks:
        disk = machine.require_disk(name)
        given = {**disk.opened.file, **disk.opened.format} if disk.opened else {}
        lost = sorted(given.keys() - _INHERITED)
        if disk.encryption or lost:
            without = "its key" if disk.encryption else ", ".join(lost)
            raise StateError(
                f"{command} would open the new image of disk {name} of machine {machine.name} without {without}",
                hint="use " + option("by", default),
                machine=machine.name,
            )
