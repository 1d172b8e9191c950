"""What QEMU is told as a device is plugged in or unplugged, and of a disk its nodes."""

from typing import Any

import anyio

from qmpsnap.block import graph
from qmpsnap.errors import DeadlinePassed, StateError
from qmpsnap.hint import call
from qmpsnap.machine.starting.argv import disk_device
from qmpsnap.machine.starting.root_ports import PORT, places
from qmpsnap.model.layers.blockdev import chain_options, node_name
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.operations.devices import AttachPlan, DetachPlan
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.qmp import commands, devices
from qmpsnap.qmp.session import Monitor

_RELEASE = 5.0
"""Seconds that QEMU is given to release the image of a device that has gone."""

Command = tuple[str, dict[str, Any]]


def require_pluggable(session: MachineSession, disk: DiskSpec, *, doing: str) -> None:
    """Refuse a disk that QEMU cannot plug in or unplug while it runs.

    PCI devices need a PCIe root port, which machines of earlier releases have none of; a SCSI disk its controller.
    """
    scsi = [other for other in session.machine.spec.disks if other.bus == "scsi"]
    why = ""
    if disk.bus == "scsi":
        why = "has no SCSI controller yet" if not scsi else ""
        if scsi == [disk]:
            why = "would keep the SCSI controller"  # which a QEMU that loads its memory would lack
    elif disk.bus not in ("virtio", "nvme"):
        why = f"cannot do so on its {disk.bus} bus"
    elif not (disk.address and disk.address.startswith(PORT)):
        why = "has no free PCIe root port" if doing == "attach" else "has the disk on no PCIe root port"
    if disk.encryption and doing == "attach" and not why:
        why = "cannot be given the key of an encrypted disk"
    if why:
        name = session.machine.name
        raise StateError(
            f"machine {name} runs and {why}, so that disk {disk.name} can only be {doing}ed while it is stopped",
            hint="stop it first: " + call("stop", name),
            machine=name,
        )


def plug_commands(planned: AttachPlan) -> list[Command]:
    """The commands that plug a disk in."""
    chain, spec = Chain(planned.disk.name, planned.layers), planned.change.spec
    assert spec
    place = places(spec.disks)[planned.disk.name]
    device = disk_device(spec, planned.disk, node_name(chain.active), place)[1]
    nodes: list[Command] = [("blockdev-add", options) for options in chain_options(chain, planned.disk)]
    return [*nodes, devices.add(device)]


async def plug(qemu: Monitor, planned: AttachPlan) -> None:
    """Open the disk's images and plug its device in; images that are open already, for another disk, are shared."""
    there = graph.node_names(await graph.read(qemu))
    for command, arguments in plug_commands(planned):
        if arguments.get("node-name") not in there:
            await qemu.execute(command, arguments)


def unplug_commands(planned: DetachPlan) -> list[Command]:
    """The commands that have a disk unplugged and close its images."""
    nodes: list[Command] = [("blockdev-del", {"node-name": node_name(layer)}) for layer in reversed(planned.layers)]
    return [devices.remove(planned.disk), *nodes]


async def unplug(qemu: Monitor, device: str, *, machine: str, seconds: float) -> None:
    """Have the guest let go of a device; one that QEMU has no more is not asked for.

    Raises:
        QmpError: the guest refuses.
        DeadlinePassed: it has not answered within so many seconds; it may still do so.
    """
    if device not in await devices.plugged(qemu):
        return
    try:
        await devices.unplug(qemu, device, timeout=seconds)
    except DeadlinePassed as error:
        error.hint = "it may still do so: try again later, or stop the machine first: " + call("stop", machine)
        raise


async def close(qemu: Monitor, layers: tuple[Layer, ...]) -> None:
    """Close a disk's images from the top, as far as nothing else in QEMU uses them.

    QEMU has an unplugged device's image in use for a moment after the device has gone.
    """
    with anyio.move_on_after(_RELEASE):
        while layers and await _is_used(qemu, layers[-1]):
            await anyio.sleep(0.02)
    for layer in reversed(layers):
        if await _is_used(qemu, layer) is not False:
            return
        await commands.blockdev_del(qemu, node_name(layer))


async def _is_used(qemu: Monitor, layer: Layer) -> bool | None:
    """Whether something in QEMU uses a layer; None where it is not open."""
    found = await graph.read(qemu)
    ids = {node.id for node in found.nodes if node.name == node_name(layer)}
    return any(edge.child in ids for edge in found.edges) if ids else None
