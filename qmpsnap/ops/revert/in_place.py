"""Reverting to an internal snapshot in the running QEMU, while its layers are still the active ones.

The guest is paused from before its present state is kept until it continues at the snapshot, so data that it flushed is
always in one of the two.

In all other cases its content is copied into a new layer; an image that a guest writes to gets a layer on top first.
"""

from collections.abc import Callable, Mapping

from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.errors import StateError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Hardware
from qmpsnap.model.names import JobId, LayerId, OperationId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.by import LoadBy
from qmpsnap.model.operations.operation import Change, InternalPlan, LoadPlan, Operation, RevertPlan
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import requests
from qmpsnap.ops.base.context import Context, guarded
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import require_free
from qmpsnap.ops.internal import create as internal
from qmpsnap.ops.internal import tags
from qmpsnap.ops.internal.create import InternalRequest
from qmpsnap.ops.internal.tags import job_of
from qmpsnap.ops.lifecycle.power import LoadingInside
from qmpsnap.ops.memory.load import hardware_now, require_fits
from qmpsnap.ops.outside import other_devices
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.quiesce import Freezer
from qmpsnap.ops.session.session import begin
from qmpsnap.ops.snapshot import create
from qmpsnap.ops.snapshot.plan import CreateRequest
from qmpsnap.qmp import commands, human, jobs
from qmpsnap.qmp.jobs import unreported
from qmpsnap.qmp.session import Monitor


def in_place(snapshot: Snapshot, live: Mapping[str, Chain]) -> bool:
    """Whether the snapshot's memory and all its disks lie inside the layers that the guest writes to now."""
    return snapshot.inside is not None and all(
        point.disk in live and live[point.disk].active.id == point.layer for point in snapshot.points
    )


def plan(
    at: PlanInputs,
    snapshot: Snapshot,
    *,
    hardware: Hardware,
    sizes: Mapping[str, int],
    discard: bool,
    paused: bool,
    by: LoadBy = "snapshot-load",
) -> LoadPlan:
    """What will be done where :func:`in_place` holds; pure. Disks get back the ``sizes`` that they had."""
    assert snapshot.inside
    machine, chains = at.machine, at.basis.chains
    active = {chain.disk: chain.active for chain in chains}
    kept: InternalPlan | None = None
    if not discard:
        taken = {found.name for found in at.basis.snapshots}
        name = requests.automatic_name(taken, at.serial, layered=requests.layered(machine, chains))
        request = InternalRequest(name=name, description=f"before the revert to {snapshot.name}")
        # This decides whether the guest runs, and when.
        kept = replace(internal.plan(at, request, hardware=hardware), resume=False)
    return LoadPlan(
        machine=machine.name,
        snapshot=snapshot.name,
        tag=str(snapshot.points[0].tag),
        layers={point.disk: active[point.disk] for point in snapshot.points},
        vmstate=snapshot.inside.layer,
        paused=paused,
        resume=requests.may_run(at.mode),
        kept=kept,
        variables=(str(at.home.variables(machine.name)), snapshot.variables) if snapshot.variables else None,
        change=Change(
            layers=tuple(
                replace(active[disk], virtual_size=size)
                for disk, size in sizes.items()
                if size != active[disk].virtual_size
            ),
            snapshots=kept.change.snapshots if kept else (),
            current=snapshot.name,
        ),
        by=by,
    )


def qmp_commands(planned: LoadPlan, serial: OperationId) -> list[tuple[str, dict[str, object]]]:
    """The exact QMP commands of a plan, in order."""
    found: list[tuple[str, dict[str, object]]] = [("stop", {})] if planned.resume else []
    if kept := planned.kept:
        found.append(("snapshot-save", _arguments(tags.keeping_job_of(serial), kept)))
    by_job = ("snapshot-load", _arguments(job_of(serial), planned))
    found.append(human.command(f"loadvm {planned.tag}") if planned.by == "loadvm" else by_job)
    return found if planned.paused else [*found, ("cont", {})]


def _arguments(job: JobId, planned: InternalPlan | LoadPlan) -> dict[str, object]:
    return tags.memory_arguments(job, tag=planned.tag, layers=planned.layers, vmstate=planned.vmstate)


async def planner(
    session: MachineSession, at: Situation, snapshot: Snapshot, *, discard: bool, paused: bool, by: LoadBy
) -> Callable[[PlanInputs], LoadPlan]:
    """How the plan is made, of the machine as it is now.

    Refused where the memory is of other hardware than the QEMU that runs has, or the guest writes to more than would go
    back with it.
    """
    assert session.qemu
    await graph.require_no_other(
        session.qemu, tuple(at.live.values()), machine=session.machine.name, hint="then try again"
    )
    stop = "start anew: " + call("stop", session.machine.name, force=True)
    await other_devices.require_same(session.machine, session.qemu, hint=stop, only_cards=True)
    await requests.require_told(
        session.machine,
        session.qemu,
        doing="load other memory into it",
        hint=call("stop", session.machine.name, force=True),
    )
    hardware = await hardware_now(session.context, session.machine, session.qemu)
    require_fits(snapshot, hardware, machine=session.machine.name)
    sizes = await to_read(tags.sizes, snapshot, at.live.values())

    def make(inputs: PlanInputs) -> LoadPlan:
        planned = plan(inputs, snapshot, hardware=hardware, sizes=sizes, discard=discard, paused=paused, by=by)
        require_free([planned.kept.variables[1]] if planned.kept and planned.kept.variables else [])
        return planned

    return make


async def load(
    session: MachineSession, at: Situation, snapshot: Snapshot, *, discard: bool, paused: bool, by: LoadBy
) -> Snapshot | None:
    """Go back in the QEMU that runs; returns the automatic snapshot of what ran before, None when that went.

    Raises:
        StateError: see :func:`planner`.
        QmpError: QEMU could not keep what runs, which runs on; or could not load the snapshot: it has been ended, and
            the disks stand at the snapshot.
    """
    assert session.qemu
    # What the guard takes to start passes while the plan is made.
    runs = not paused or requests.may_run(await requests.mode_of(session.qemu))
    async with guarded(session.context, session.machine, when=runs) as guard_ready:
        make = await planner(session, at, snapshot, discard=discard, paused=paused, by=by)
        operation = await begin(session, at.basis, make)
        async with recovery.attempting(session, operation):
            await guard_ready()
            return await _carry_out(session.context, session.qemu, operation)


async def _carry_out(context: Context, qemu: Monitor, operation: Operation[LoadPlan]) -> Snapshot | None:
    planned = operation.plan
    tags.require_tags(planned.layers.values(), planned.tag, await commands.query_tags(qemu))
    by_human = planned.by == "loadvm"
    if by_human:
        await tags.require_first(qemu, planned)
    if planned.kept or by_human:
        await context.astore.mark(operation.id, "running", step=steps.KEEPING)
        await commands.control(qemu, "stop")
        await tags.require_held(qemu)
    if planned.kept:
        keeping = tags.keeping_job_of(operation.id)
        await tags.tag_live(qemu, keeping, planned.kept, Freezer(), unreported)
        await jobs.dismiss(qemu, keeping)
    change = tags.settled_load(planned, await commands.query_tags(qemu))
    await context.astore.mark(operation.id, "running", step=steps.LOADING)
    loading = job_of(operation.id)
    if by_human:  # the guest is held already: from this step on there is only forward
        await human.execute(qemu, f"loadvm {planned.tag}", deadline=jobs.MEMORY_DEADLINE)
    else:
        await commands.control(qemu, "stop")
        await tags.require_held(qemu)
        await tags.load_into(qemu, loading, tag=planned.tag, layers=planned.layers, vmstate=planned.vmstate)
    await context.astore.settle(operation.id, planned.machine, change, step=steps.LOADED)
    if not by_human:
        await jobs.dismiss(qemu, loading)
    if not planned.paused:
        await commands.control(qemu, "cont")
    await context.astore.mark(operation.id, "settled", step=steps.SETTLED)
    return change.snapshots[0] if change.snapshots else None


# --- taken out into a new layer ---------------------------------------------------------------------------------------


def inner(snapshot: Snapshot, active: Mapping[str, LayerId]) -> tuple[str, ...]:
    """The disks whose active layer has the snapshot inside."""
    return tuple(point.disk for point in snapshot.points if point.tag and active.get(point.disk) == point.layer)


async def busy(context: Context, name: str, target: str) -> tuple[str, ...]:
    """The disks where a running guest writes to the layer that the snapshot is inside of, as far as can be said now."""
    machine = await context.astore.machine(name)
    snapshot = next((s for s in await context.astore.snapshots(name) if s.name == target), None)
    if snapshot is None or snapshot.state != "ok" or not context.process(machine):
        return ()
    return inner(snapshot, {chain.disk: chain.active.id for chain in await context.astore.chains(name)})


async def freeze(context: Context, name: str, target: str) -> tuple[Layer, ...]:
    """Put a layer on top of each of those, as they are read first; returns them."""
    disks = await busy(context, name, target)
    return await create.add_layers(context, name, CreateRequest(disks=disks)) if disks else ()


def require_frozen(at: Situation, snapshot: Snapshot) -> None:
    """Make sure that no guest writes to an image that is to be copied."""
    active = {chain.active.id for chain in at.live.values()} if at.running else set()
    if busy := [point.layer for point in snapshot.points if point.tag and point.layer in active]:
        raise StateError(
            f"the guest of machine {at.machine} writes to {', '.join(busy)} again, which holds snapshot"
            f" {snapshot.name}",
            hint="try again: another command changed the machine meanwhile",
            machine=at.machine,
        )


def memory_in(planned: RevertPlan, operation: Operation) -> LoadingInside | None:
    """The memory inside a layer that a revert makes, for the QEMU that is started on it; None if there is none."""
    if planned.inside is None:
        return None
    layers = {copy.disk: copy.layer for copy in planned.copies}
    return LoadingInside(job_of(operation.id), planned.copies[0].tag, layers, planned.inside)
