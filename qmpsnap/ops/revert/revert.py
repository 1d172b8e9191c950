"""``snapshot revert``: new empty overlays on a snapshot's points become active; the old ones are kept or removed.

Order: plan -> journal -> overlays made, the guest still running -> ``stopping`` -> QEMU ends -> the UEFI variable store
is kept and replaced -> volumes are merged (``merging``) -> the record changes (``switched``) -> unneeded files are
removed -> ``starting`` -> QEMU starts on the new layers, with the snapshot's memory if it has one -> settled. Before
``stopping`` an interrupted revert is rolled back and the guest has noticed nothing; after it, it is rolled forward.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image import internal_snapshots
from qmpsnap.errors import DeadlinePassed, QemuGone, QmpsnapError
from qmpsnap.hint import call
from qmpsnap.host.threads import to_read
from qmpsnap.machine import statefile
from qmpsnap.model.home import Home
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Outside, Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.state import State
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import LoadPlan, Operation, Overlay, RevertPlan
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import consent, free_space, luks, vmgenid, volumes
from qmpsnap.ops.base.context import Context, guarded, in_thread
from qmpsnap.ops.base.free_space import Need
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import make_overlays, overlay_on, require_free
from qmpsnap.ops.internal import tags
from qmpsnap.ops.lifecycle import power
from qmpsnap.ops.memory import post_resume
from qmpsnap.ops.memory.load import Loading, require_same_hardware
from qmpsnap.ops.revert import in_place
from qmpsnap.ops.revert.cutover import nothing_written, require_kept, require_variables, switch
from qmpsnap.ops.revert.plan import RevertRequest, Storage, changed_spec, left_out, merge_pairs, plan, points, target_of
from qmpsnap.ops.session import planning_state, quiesce, recovery
from qmpsnap.ops.session.session import begin, inputs, looking, working
from qmpsnap.qmp import commands
from qmpsnap.qmp.commands import Backend
from qmpsnap.qmp.session import Monitor


class Reverted(Struct, frozen=True, kw_only=True):
    """The result of a revert.

    Attributes:
        snapshot: where the machine stands now.
        kept: the automatic snapshot of the former state; None if that was not kept.
        removed: the layers that went.
        state: how the machine is now, in QEMU's word as it was asked: ``running``, ``paused``, ``suspended`` for a
            guest that slept when its memory was saved ...; or ``stopped``.
        memory: the guest goes on where it was; else it boots.
        notes: disks of the snapshot that the machine does not have, and what the guest could not be told afterwards,
            one sentence each.
        detached: devices that somebody had attached to the QEMU that was ended; the machine does not have them.
        clock_error_ms: how far the guest's clock is ahead of the host's now that it was set, less than 0 where it is
            behind; None where it was not set, or nobody knows.
    """

    snapshot: Snapshot
    kept: Snapshot | None
    removed: tuple[LayerId, ...]
    state: State
    memory: bool = False
    notes: tuple[str, ...] = ()
    detached: tuple[Outside, ...] = ()
    clock_error_ms: float | None = None


class Preview(Struct, frozen=True, kw_only=True):
    """The plan that a revert would follow now.

    Attributes:
        unwritten: nothing that would have to be kept is there now.
        moves: bytes to copy, at most.
        commands: the exact QMP commands to the QEMU that runs, in order.
    """

    plan: RevertPlan | LoadPlan
    unwritten: bool
    moves: int = 0
    commands: tuple[tuple[str, dict[str, object]], ...] = ()

    @property
    def kept(self) -> str | None:
        """Name of the automatic snapshot that would be made."""
        snapshots = () if self.unwritten else self.plan.change.snapshots
        return snapshots[0].name if snapshots else None

    @property
    def removed(self) -> tuple[Layer, ...]:
        """The layers whose files would go."""
        if isinstance(self.plan, LoadPlan):
            return ()
        return self.plan.unwritten.layers if self.unwritten and self.plan.unwritten else self.plan.removed


async def preview(context: Context, name: str, request: RevertRequest) -> Preview:
    """What :func:`run` would do now, without a lock and without a change (``--dry-run``)."""
    async with looking(context, name, removes=True) as session:
        machine, qemu = session.machine, session.qemu
        at = await planning_state.look(session, disks=(), counted=False)
        target, now = _target(session, at, request), await inputs(session, at.basis)
        if qemu and changed_spec(machine, target, request) is None and in_place.in_place(target, at.live):
            paused, by = request.run == "paused", request.by or "snapshot-load"
            make = await in_place.planner(session, at, target, discard=request.discard, paused=paused, by=by)
            loaded = await to_read(make, now)
            commands = tuple(in_place.qmp_commands(loaded, now.serial))
            return Preview(plan=loaded, unwritten=False, commands=commands)
    planned = plan(now, at, request, await _storage(machine, at, target, request))
    await volumes.require_independent(planned.removed)
    consent.require(machine)
    await require_same_hardware(context, _as_started(machine, target, request), target)
    variables = str(context.home.variables(name)) if planned.keeps else None
    return Preview(
        plan=planned,
        unwritten=await to_read(nothing_written, planned, variables),
        moves=sum(at.bytes.get(copy.source.id, 0) for copy in planned.copies)
        + sum(merge.moves for merge in planned.merges)
        + await volumes.moves(planned.clones),
        commands=(("quit", {}),) if planned.live else (),
    )


async def run(context: Context, name: str, request: RevertRequest) -> Reverted:
    """Go back to a snapshot.

    Raises:
        QmpsnapError: see :func:`plan`; besides, ``StoreMismatch`` when a file or QEMU's chain is not as recorded,
            ``StateError`` when a job holds a disk, and the families of lock, host, QEMU and deadline. With ``effect``
            ``applied`` the machine stands at the snapshot but could not be started.
    """
    on_top: tuple[Layer, ...] = ()
    if not await _may_load(context, name, request) and await in_place.busy(context, name, request.name):
        async with working(context, name, "snapshot revert", removes=True) as session:
            await _require_possible(session, request)
        on_top = await in_place.freeze(context, name, request.name)
    try:
        return await _run(context, name, request)
    except QmpsnapError as error:
        if error.effect == "applied":
            error.hint = f"the machine is at {request.name} and stopped: " + call("start", name)
        elif on_top and error.effect == "none":
            new = ", ".join(layer.id for layer in on_top)
            error.add(f"the overlay {new}, created for it, stays and is active")
            error.effect = "applied"
        raise


async def _run(context: Context, name: str, request: RevertRequest) -> Reverted:
    async with working(context, name, "snapshot revert", removes=True) as session:
        at = await planning_state.look(session, disks=(), counted=False)
        target = _target(session, at, request)
        same = changed_spec(session.machine, target, request) is None
        if session.qemu and same and in_place.in_place(target, at.live):
            done = await _load(session, at, target, request)
        else:
            before = await commands.query_block(session.qemu) if session.qemu else ()
            done = await _switch(session, at, target, request)
            done = replace(
                done,
                detached=await _detached(context, session.machine, before),
                notes=_left_out(target, _as_started(session.machine, target, request)),
            )
    if done.memory and done.state == "running" and request.after:
        told = await post_resume.tell(context, await context.astore.machine(name))
        return replace(done, notes=(*done.notes, *told.notes), clock_error_ms=told.clock_error_ms)
    return done


def _left_out(target: Snapshot, machine: Machine) -> tuple[str, ...]:
    return tuple(
        f"disk {disk}, which snapshot {target.name} includes, is no disk of machine {machine.name} any more"
        for disk in left_out(target, machine.spec)
    )


async def _detached(context: Context, machine: Machine, before: Sequence[Backend]) -> tuple[Outside, ...]:
    """What the QEMU that was ended had attached, and the one that was started has not."""
    try:
        async with context.monitor(await context.astore.machine(machine.name)) as qemu:
            after = {backend.name for backend in await commands.query_block(qemu)} if qemu else set()
    except QmpsnapError:  # no reason to call a revert failed that is done
        return ()
    disks = {disk.name for disk in machine.spec.disks}
    return tuple(
        Outside(backend.shown, backend.inserted.file)
        for backend in before
        if backend.inserted and backend.qdev and backend.name not in after and backend.shown not in disks
    )


async def _may_load(context: Context, name: str, request: RevertRequest) -> bool:
    """Whether the QEMU that runs can go back by itself, as far as that can be said without holding the machine."""
    machine = await context.astore.machine(name)
    live = {chain.disk: chain for chain in await context.astore.chains(name)}
    found = next((s for s in await context.astore.snapshots(name) if s.name == request.name), None)
    if found is None or context.process(machine) is None or changed_spec(machine, found, request):
        return False
    return in_place.in_place(found, live)


async def _load(session: MachineSession, at: Situation, target: Snapshot, request: RevertRequest) -> Reverted:
    paused, by = request.run == "paused", request.by or "snapshot-load"
    kept = await in_place.load(session, at, target, discard=request.discard, paused=paused, by=by)
    assert session.qemu
    state = await _said(contextlib.nullcontext(session.qemu))
    notes = vmgenid.unchanged(session.machine)
    return Reverted(snapshot=target, kept=kept, removed=(), state=state, memory=True, notes=notes)


async def _said(asking: AbstractAsyncContextManager[Monitor | None]) -> State:
    """The run state as QEMU says it now; what was asked for says nothing of a guest that slept, or fell over at once.

    The revert is done whatever comes back: one that does not answer any more is no reason to call it failed.
    """
    try:
        async with asking as qemu:
            state = State(await commands.run_state(qemu)) if qemu else State.STOPPED
            return State.PAUSED if state is State.PRELAUNCH else state  # started with -S to keep it paused
    except (QemuGone, DeadlinePassed):
        return State.UNKNOWN


async def _require_possible(session: MachineSession, request: RevertRequest) -> None:
    """Refuse what would be refused later, before a layer is put on top for it."""
    at = await planning_state.look(session, disks=(), counted=False)
    target = _target(session, at, request)
    await _examine(session, at, target, request)
    now, folder = await inputs(session, at.basis), str(session.context.home.machine_dir(session.machine.name))
    planned = plan(now, at, request, await _storage(session.machine, at, target, request))
    require_variables(session.context.home, planned)
    busy = in_place.inner(target, {disk: chain.active.id for disk, chain in at.live.items()})
    chains = [at.live[disk] for disk in busy]
    tops = [Overlay(disk=one.disk, layer=overlay_on(one, now.serial, folder), backing=one.active) for one in chains]
    goes_on = Need(folder, free_space.LEFT, "the running guest")
    _require_space(session.context, session.machine, planned, [*free_space.of_overlays(session.machine, tops), goes_on])


def _as_started(machine: Machine, target: Snapshot, request: RevertRequest) -> Machine:
    """The machine with the spec that it is started with after the revert."""
    return replace(machine, spec=changed_spec(machine, target, request) or machine.spec)


def _target(session: MachineSession, at: Situation, request: RevertRequest) -> Snapshot:
    return target_of(at, request.name, machine=session.machine, hardware=request.hardware)


async def _examine(session: MachineSession, at: Situation, target: Snapshot, request: RevertRequest) -> None:
    """The guest ends only for layers that it can be started on again."""
    machine = _as_started(session.machine, target, request)
    consent.require(machine)
    await require_same_hardware(session.context, machine, target)
    there = points(at, target, machine.spec)
    await to_read(power.require_files, session.machine, there)
    await to_read(require_kept, session.machine, target)
    stay = [chain for disk, chain in at.live.items() if machine.spec.disk(disk)]
    new = [chain for chain in there if chain.disk not in at.live]
    await luks.require(session.context, session.machine, [*stay, *new])


async def _switch(session: MachineSession, at: Situation, target: Snapshot, request: RevertRequest) -> Reverted:
    await _examine(session, at, target, request)
    in_place.require_frozen(at, target)
    async with _memory(target, request) as loading:
        operation = await _open(session, at, target, request)
        async with recovery.attempting(session, operation):
            await _carry_out(session, operation, loading)
    return await _outcome(session.context, operation)


@asynccontextmanager
async def _memory(snapshot: Snapshot, request: RevertRequest) -> AsyncIterator[Loading | None]:
    """The snapshot's memory in a file, all of it compared with the record; None where there is no such file."""
    state = snapshot.vmstate
    if state is None:
        yield None
        return
    if request.file:
        moved = Path(request.file)
        status = await to_read(moved.stat)
        state = replace(state, path=request.file, device=status.st_dev, inode=status.st_ino, birth=0)
    async with in_thread(statefile.verified(state)) as descriptor:
        yield Loading(state, descriptor)


async def _open(
    session: MachineSession, at: Situation, target: Snapshot, request: RevertRequest
) -> Operation[RevertPlan]:
    spec = _as_started(session.machine, target, request).spec
    there = await volumes.taken(session.machine, (chain.active for chain in points(at, target, spec)))
    storage = await _storage(session.machine, at, target, request)
    if request.discard and any(layer.storage != "file" for chain in at.live.values() for layer in chain.layers):
        now = await inputs(session, at.basis)
        await volumes.require_independent(plan(now, at, request, storage).removed)

    def make(inputs: PlanInputs) -> RevertPlan:
        planned = plan(inputs, at, request, storage)
        files = [one.layer.path for one in planned.new if one.layer.storage == "file"]
        require_free([*files, *([planned.keeps] if planned.keeps else [])])
        volumes.require_free(planned.clones, there)
        require_variables(session.context.home, planned)
        _require_space(session.context, session.machine, planned)
        return planned

    return await begin(session, at.basis, make)


async def _storage(machine: Machine, at: Situation, target: Snapshot, request: RevertRequest) -> Storage:
    """Merges are destructive: only with ``discard``."""
    spec = _as_started(machine, target, request).spec
    pairs = merge_pairs(at, target, spec) if request.discard else ()
    found = [await volumes.mergeable(active, wanted) for active, wanted in pairs]
    sizes = await to_read(tags.sizes, target, points(at, target, spec))
    return Storage([merge for merge in found if merge], sizes)


def _require_space(context: Context, machine: Machine, planned: RevertPlan, also: Iterable[Need] = ()) -> None:
    needs = [*_needs(machine, planned, context.home), *also]
    free_space.require(needs, machine=machine.name, hint="free some space there")


def _needs(machine: Machine, planned: RevertPlan, home: Home) -> list[Need]:
    """What the new layers need; a snapshot inside an image is copied out of it with the whole image."""
    needs = [Need(str(home.data), free_space.STORE, "the store"), *free_space.of_overlays(machine, planned.overlays)]
    for copy in planned.copies:
        with contextlib.suppress(OSError):
            size = Path(copy.source.path).stat().st_blocks * 512
            needs.append(Need(str(Path(copy.layer.path).parent), size, f"a copy of {copy.source.id}"))
    if planned.keeps:
        size = home.variables(machine.name).stat().st_size
        needs.append(Need(str(Path(planned.keeps).parent), size, "a copy of the UEFI variable store"))
    return needs


async def _carry_out(session: MachineSession, operation: Operation[RevertPlan], loading: Loading | None) -> None:
    planned = operation.plan
    await make_overlays(session.context, session.machine, planned.overlays)
    for copy in planned.copies:
        await internal_snapshots.take_out(
            copy.source, copy.tag, copy.layer, keep=planned.inside is not None, qemu_img=session.context.image.binary
        )
    await volumes.make(session.context, session.machine, operation.id, planned.clones, "clone")
    # From here on the guest may have ended: recovery finishes instead of rolling back.
    await session.context.astore.mark(operation.id, "running", step=steps.STOPPING)
    await switch(session, operation)
    if planned.restart:
        await session.context.astore.mark(operation.id, "running", step=steps.STARTING)
        machine = await session.context.astore.machine(planned.machine)
        memory = loading or in_place.memory_in(planned, operation)
        frozen = planned.vmstate is not None and planned.vmstate.frozen
        async with guarded(session.context, machine, when=frozen) as guard_ready:
            await guard_ready()
            await power.bring_up(session.context, machine, paused=planned.paused, loading=memory)
            if frozen:
                await quiesce.thaw(session.context, machine)
    await session.context.astore.mark(operation.id, "settled", step=steps.SETTLED)


async def _outcome(context: Context, operation: Operation[RevertPlan]) -> Reverted:
    planned = operation.plan
    snapshots = {found.name: found for found in await context.astore.snapshots(planned.machine)}
    kept = planned.change.snapshots
    gone = planned.unwritten.layers if planned.unwritten else planned.removed
    known = await context.astore.layers([layer.id for layer in gone])
    return Reverted(
        snapshot=snapshots[planned.snapshot],
        kept=snapshots.get(kept[0].name) if kept else None,
        removed=tuple(layer.id for layer in gone if layer.id not in known),
        state=await _said(context.monitor(await context.astore.machine(planned.machine))),
        memory=planned.vmstate is not None or planned.inside is not None,
    )
