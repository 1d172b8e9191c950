"""``disk detach``: a stopped machine gives up a disk, and no file is removed for it.

An active layer of our own becomes the point of an automatic snapshot, as a revert keeps what it leaves; by that the
disk can come back. Images that are not ours, and that no snapshot needs, are forgotten: they are their owner's again.
"""

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.machine.starting.argv import places
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.devices import DetachPlan
from qmpsnap.model.operations.operation import Change
from qmpsnap.model.planning import unreferenced
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.context import Context, require_spec
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.devices.attach import BY_SLOT, require_stopped
from qmpsnap.ops.lifecycle import change
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Broken, Direction
from qmpsnap.ops.session.session import begin, inputs, looking, working
from qmpsnap.qmp.session import Monitor


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
        change=replace(gone, removed_layers=tuple(layer.id for layer in forgotten)),
    )


async def preview(context: Context, name: str, disk: str) -> Detached:
    """What :func:`run` would do now; locks and changes nothing."""
    async with looking(context, name) as session:
        chain, spec = _look(session, disk)
        return await _answer(session, plan(await inputs(session, session.basis), chain, spec))


async def run(context: Context, name: str, disk: str) -> Detached:
    """Take a disk from a stopped machine; returns once the record says so.

    Raises:
        NotFoundError: the machine has no such disk.
        StateError: it runs, or is adopted.
    """
    async with working(context, name, "disk detach") as session:
        chain, spec = _look(session, disk)
        operation = await begin(session, session.basis, lambda at: plan(at, chain, spec))
        async with recovery.attempting(session, operation):
            await context.astore.settle(operation.id, name, operation.plan.change)
        return await _answer(session, operation.plan)


def _look(session: MachineSession, disk: str) -> tuple[Chain, MachineSpec]:
    machine = session.machine
    require_spec(machine, "detach a disk")
    machine.require_disk(disk)
    require_stopped(session, "detach")
    chain = next(chain for chain in session.basis.chains if chain.disk == disk)
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


async def end(broken: Broken[DetachPlan], _: Monitor | None) -> Direction:
    """A detachment is one transaction: what did not settle has changed nothing."""
    await broken.mark_failed()
    return "back"
