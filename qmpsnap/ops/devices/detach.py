"""``disk detach``: a machine gives up a disk, and no file is removed for it.

A running QEMU asks its guest to let go of the disk (``device_del``), which may never answer: then nothing has changed,
but the guest may still do it later. A disk that QEMU has lost so is detached by the next call.

An active layer of our own becomes the point of an automatic snapshot, as a revert keeps what it leaves; by that the
disk can come back. Images that are not ours, and that no snapshot needs, are forgotten: they are their owner's again.
"""

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.machine.starting.root_ports import places
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.devices import DetachPlan
from qmpsnap.model.operations.operation import Change, Operation
from qmpsnap.model.planning import unreferenced
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.context import Context, require_spec
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.devices.attach import BY_SLOT
from qmpsnap.ops.devices.plugging import Command, close, require_pluggable, unplug, unplug_commands
from qmpsnap.ops.lifecycle import change
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, inputs, looking, require_agreement, working
from qmpsnap.qmp import devices
from qmpsnap.qmp.session import Monitor

TIMEOUT = 30.0
"""Seconds that a guest is given to let go of a disk."""


class Detached(Struct, frozen=True, kw_only=True):
    """A disk that a machine has no more.

    Attributes:
        plan: what was done.
        disk: its name.
        path: of what was its active layer.
        kept: the automatic snapshot of it; None for an image that is not ours.
        unloadable: names of the snapshots whose memory fits the hardware no more, and why; they can still be reverted
            to with the hardware of their time, which brings the disk back.
    """

    plan: DetachPlan
    disk: str
    path: str
    kept: str | None
    unloadable: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def commands(self) -> list[Command]:
        """The exact QMP commands to the QEMU that runs, in order; none for a stopped machine."""
        return unplug_commands(self.plan) if self.plan.live else []


def without(spec: MachineSpec, name: str) -> MachineSpec:
    """The spec without a disk; the others on its controller keep the places that they have; pure."""
    found = places(spec.disks)
    bus = next(disk.bus for disk in spec.disks if disk.name == name)

    def stays(disk: DiskSpec) -> DiskSpec:
        shared = disk.bus == bus and bus not in BY_SLOT
        return replace(disk, address=str(found[disk.name])) if shared and disk.address is None else disk

    return replace(spec, disks=tuple(stays(disk) for disk in spec.disks if disk.name != name))


def plan(inputs: PlanInputs, chain: Chain, spec: MachineSpec) -> DetachPlan:
    """What will be done: ``spec`` is the machine's without the disk; pure."""
    machine, basis, active = inputs.machine, inputs.basis, chain.active
    gone = Change(spec=spec, removed_disks=(chain.disk,))
    if active.owned:
        name = requests.automatic_name(
            {found.name for found in basis.snapshots},
            inputs.serial,
            layered=requests.layered(machine, basis.chains),
        )
        kept = Snapshot(
            name=name,
            kind="disk",
            state="ok",
            parent=machine.current,
            created=inputs.now,
            description=f"{chain.disk} as it was detached",
            mode=inputs.mode,
            points=(Point(disk=chain.disk, layer=active.id),),
            operation=inputs.serial,
        )
        gone = replace(gone, snapshots=(kept,))
    after = Situation(basis=basis, running=False, bytes={}).after(gone)
    forgotten = [layer for layer in unreferenced.nobodys(after, [chain]) if not layer.owned]
    return DetachPlan(
        machine=machine.name,
        disk=chain.disk,
        layers=chain.layers,
        live=inputs.mode != "stopped",
        change=replace(gone, removed_layers=tuple(layer.id for layer in forgotten)),
    )


async def preview(context: Context, name: str, disk: str) -> Detached:
    """What :func:`run` would do now; locks and changes nothing."""
    async with looking(context, name) as session:
        chain, spec = await _look(session, disk)
        return await _answer(session, plan(await inputs(session, session.basis), chain, spec))


async def run(context: Context, name: str, disk: str, *, timeout: float = TIMEOUT) -> Detached:  # noqa: ASYNC109
    """Take a disk from a machine; returns once the record says so. ``timeout``: seconds that its guest is waited for.

    Raises:
        NotFoundError: the machine has no such disk.
        StateError: it is adopted, or runs and its QEMU cannot unplug that disk.
        QmpError: the guest refuses.
        DeadlinePassed: the guest has not answered in time.
    """
    requests.require_time(timeout, "a timeout")
    async with working(context, name, "disk detach") as session:
        chain, spec = await _look(session, disk)
        operation = await begin(session, session.basis, lambda at: plan(at, chain, spec))
        async with recovery.attempting(session, operation):
            if session.qemu:
                await _unplug(session, session.qemu, operation, timeout)
            await context.astore.settle(operation.id, name, operation.plan.change)
        return await _answer(session, operation.plan)


async def _unplug(session: MachineSession, qemu: Monitor, operation: Operation[DetachPlan], seconds: float) -> None:
    planned = operation.plan
    await session.context.astore.mark(operation.id, "running", step=steps.UNPLUGGING)
    await unplug(qemu, planned.disk, machine=planned.machine, seconds=seconds)
    await close(qemu, planned.layers)


async def _look(session: MachineSession, disk: str) -> tuple[Chain, MachineSpec]:
    machine = session.machine
    require_spec(machine, "detach a disk")
    found = machine.require_disk(disk)
    chain = next(chain for chain in session.basis.chains if chain.disk == disk)
    if session.qemu:
        beside = await require_agreement(session, [chain], doing="detach a disk")
        if disk not in beside.unplugged:
            require_pluggable(session, found, doing="detach")
    return chain, without(machine.spec, disk)


async def _answer(session: MachineSession, planned: DetachPlan) -> Detached:
    context, machine, snapshots = session.context, session.machine, session.basis.snapshots
    after = replace(machine, spec=planned.change.spec or machine.spec)
    return Detached(
        plan=planned,
        disk=planned.disk,
        path=planned.layers[-1].path,
        kept=planned.kept,
        unloadable=tuple([each async for each in change.unloadable(context, machine, after, snapshots)]),
    )


async def end(broken: Broken[DetachPlan], qemu: Monitor | None) -> Direction:
    """End a detachment that did not settle by whether QEMU has the disk; where it runs no more, the disk stays."""
    planned = broken.operation.plan
    if qemu and broken.operation.step == steps.UNPLUGGING and planned.disk not in await devices.plugged(qemu):
        await close(qemu, planned.layers)
        await broken.context.astore.settle(broken.operation.id, planned.machine, planned.change)
        return "forward"
    await broken.mark_failed()
    return "back"
