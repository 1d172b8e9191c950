"""``resize``: a disk's active layer gets more bytes, in the running QEMU or without one. Layers below keep their size.

A shrink would cut off what the guest has there, so there is none.
"""

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image.backing import durable_size, require_size
from qmpsnap.block.usage import access
from qmpsnap.errors import StateError, StoreMismatch, UsageError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.machine import worker
from qmpsnap.machine.open_files import require_recorded
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Change, Operation, ResizePlan
from qmpsnap.model.sizes import UNITS, in_bytes
from qmpsnap.ops.base import luks, volumes
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, looking, require_agreement, working
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor

SECTOR = 512
"""Bytes; QEMU would round another size up."""
LARGEST = (1 << 63) - SECTOR
"""Bytes that QEMU's block layer can count."""


class ResizeRequest(Struct, frozen=True, kw_only=True):
    """``size``: bytes that the guest is to see; ``by``: bytes more than it sees now. One of the two."""

    disk: str
    size: int | None = None
    by: int | None = None


def requested(disk: str, size: str | int) -> ResizeRequest:
    """What is meant by a size as people write it: ``20G``, or ``+5G`` for so much more."""
    text = str(size)
    found = in_bytes(text.removeprefix("+"))
    if found is None or found <= 0 or found > LARGEST or found % SECTOR:
        raise UsageError(
            f"{text[:40]!r} is no size of a disk: a multiple of {SECTOR} bytes is",
            hint="as in 20G, or +5G for so much more; " + UNITS,
        )
    return ResizeRequest(disk=disk, by=found) if text.startswith("+") else ResizeRequest(disk=disk, size=found)


def plan(machine: str, chain: Chain, request: ResizeRequest, *, live: bool) -> ResizePlan:
    """What will be done; pure.

    Raises:
        StateError: the disk has that size already, or a larger one.
    """
    layer = chain.active
    size = layer.virtual_size + request.by if request.by else request.size or 0
    if size <= layer.virtual_size:
        what = "has that size already" if size == layer.virtual_size else "is larger, and a shrink would lose data"
        raise StateError(
            f"disk {chain.disk} of machine {machine} has {layer.virtual_size} bytes: it {what}",
            hint=call("chains", machine, chain.disk) + " shows its layers",
            machine=machine,
        )
    if size > LARGEST:
        raise UsageError(f"a disk cannot have {size} bytes", hint=f"{LARGEST} are the most")
    change = Change(layers=(replace(layer, virtual_size=size),))
    return ResizePlan(machine=machine, disk=chain.disk, layer=layer, size=size, live=live, change=change)


def command_of(made: ResizePlan) -> tuple[str, dict[str, Any]]:
    """The QMP command that does it."""
    return commands.block_resize(node_name(made.layer), made.size)


async def preview(context: Context, name: str, request: ResizeRequest) -> tuple[ResizePlan, tuple[str, dict[str, Any]]]:
    """The plan that :func:`run` would follow now and its QMP command; locks and changes nothing."""
    async with looking(context, name) as session:
        basis = session.basis
        made = await _plan(session, basis.chains, request)
        command, arguments = command_of(made)
        return made, (command, session.machine.sent(arguments))


async def run(context: Context, name: str, request: ResizeRequest) -> ResizePlan:
    """Resize; returns what was done once the new size is durable and recorded.

    Raises:
        StateError: it would shrink, or is read-only or busy with a job.
        NotFoundError: the machine has no such disk.
        QmpError: QEMU refuses, as where there is no room for more tables; the size is as before.
        StoreMismatch: QEMU's chains are not the store's.
    """
    async with working(context, name, "resize") as session:
        basis = session.basis
        made = await _plan(session, basis.chains, request)
        operation = await begin(session, basis, lambda _: made)
        async with recovery.attempting(session, operation):
            await _carry_out(session, basis.chains, operation)
        return made


async def _plan(session: MachineSession, chains: tuple[Chain, ...], request: ResizeRequest) -> ResizePlan:
    machine = session.machine
    if machine.require_disk(request.disk).read_only:
        raise StateError(f"disk {request.disk} of machine {machine.name} is read-only", machine=machine.name)
    chain = next(chain for chain in chains if chain.disk == request.disk)
    if session.qemu:
        await require_agreement(session, [chain], doing="resize its disks", wanted=(request.disk,))
    made = plan(machine.name, chain, request, live=session.qemu is not None)
    await to_read(_require_possible, chain, made)
    await volumes.require_growable(made.layer, made.size)
    return made


def _require_possible(chain: Chain, made: ResizePlan) -> None:
    require_recorded(chain.layers, machine=made.machine)
    require_size(made.layer)
    size = 0 if volumes.is_logical(made.layer) else made.size
    access.require_writable(made.layer, size=size, ours=not made.live, shared=made.live)


async def _carry_out(session: MachineSession, chains: tuple[Chain, ...], operation: Operation[ResizePlan]) -> None:
    context, machine, made = session.context, session.machine, operation.plan
    if session.qemu:
        await _resize(context, session.qemu, operation)
    else:
        chain = next(chain for chain in chains if chain.disk == made.disk)
        async with luks.worker_on(context, machine, chain) as monitor:
            await _resize(context, monitor, operation)
    if await to_end(durable_size, made.layer) != made.size:
        raise StoreMismatch(f"QEMU has resized {made.layer.shown}, but its header says otherwise", machine=machine.name)
    await context.astore.settle(operation.id, machine.name, made.change)


async def _resize(context: Context, monitor: Monitor, operation: Operation[ResizePlan]) -> None:
    command, arguments = command_of(operation.plan)
    await context.astore.mark(operation.id, "running", step=steps.RESIZING)
    await volumes.grow(operation.plan.layer, operation.plan.size)
    await monitor.execute(command, arguments)


async def end(broken: Broken[ResizePlan], qemu: Monitor | None) -> Direction:
    """End an interrupted resize by what the image's header says once no QEMU is still at it."""
    context, machine, made = broken.context, broken.machine, broken.operation.plan
    if broken.operation.step == steps.PLANNED:
        await broken.mark_failed()
        return "back"
    if qemu:
        await commands.query_status(qemu)  # QEMU carries out one command at a time, so an earlier one has ended
    else:
        await worker.end_leftover(machine, context.home.run_dir(machine.name))
    found = await to_end(durable_size, made.layer)
    if found == made.size:
        if qemu and volumes.is_logical(made.layer):  # it may not have been told that the volume has grown
            await qemu.execute(*command_of(made))
        await context.astore.settle(broken.operation.id, machine.name, made.change)
        return "forward"
    if found != made.layer.virtual_size:
        raise StoreMismatch(
            f"{made.layer.shown} has {found} bytes, neither the {made.layer.virtual_size} from before the resize nor"
            f" {made.size}",
            hint="set one of the two (qemu-img resize), then " + call("recover", machine.name),
            machine=machine.name,
        )
    await broken.mark_failed()
    return "back"
