"""``snapshot create``: every disk's active layer is frozen under a new empty overlay, all disks in one transaction."""

import time
from collections.abc import Awaitable, Callable, Iterable

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.graph import Beside
from qmpsnap.effect import Effect
from qmpsnap.errors import DeadlinePassed, QmpsnapError, StateError
from qmpsnap.hint import call, option
from qmpsnap.host.threads import to_read
from qmpsnap.machine.open_files import require_opened, require_recorded
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.memory import Memory
from qmpsnap.model.operations.operation import Change, CreatePlan, Operation
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.ops.base import free_space, overlay_paths, requests, volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context, guarded
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import identified, make_overlays, require_free
from qmpsnap.ops.memory import save as memory
from qmpsnap.ops.memory.strategy import choose
from qmpsnap.ops.merge import commit
from qmpsnap.ops.merge.commit import CommitRequest
from qmpsnap.ops.session import early_flush, file_nodes, quiesce, recovery
from qmpsnap.ops.session.quiesce import Freezer
from qmpsnap.ops.session.session import begin, inputs, looking, require_agreement, working
from qmpsnap.ops.snapshot import fold, nvram
from qmpsnap.ops.snapshot import recover as recover_create
from qmpsnap.ops.snapshot.plan import CreateRequest, expected, node_options, plan, transaction_of
from qmpsnap.qmp import commands
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor
from qmpsnap.volumes.driver import Ability

_STARTS = "make it start on a new layer"


async def preview(context: Context, name: str, request: CreateRequest) -> tuple[Machine, CreatePlan]:
    """The plan that :func:`run` would follow now, without a lock and without a change (``--dry-run``)."""
    async with looking(context, name) as session:
        basis = session.basis
        beside = await require_agreement(session, basis.chains, doing=_STARTS, wanted=request.disks)
        freezer = await quiesce.foreseen(session.machine, session.qemu, request.quiesce)
        make = await _planner(session, basis, request, freezer, beside=beside)
        at = await inputs(session, basis, seen=beside.names)
    await overlay_paths.require_free(context, name, request.files)
    return session.machine, await to_read(make, at)


async def run(context: Context, name: str, request: CreateRequest, *, report: Report = unreported) -> Snapshot:
    """Take the snapshot; returns it as recorded.

    With ``memory`` the guest runs on as soon as its memory is fixed; the call returns once all of it is written.

    Raises:
        QmpsnapError: see :func:`plan` and :func:`choose`; besides, ``StoreMismatch`` when QEMU's chains are not the
            store's, and the families of lock, host, QEMU and deadline. Unless ``effect`` is ``unknown`` nothing has
            changed; then the next command, or ``recover``, finds out and ends it.
    """
    try:
        change = await _run(context, name, request, report)
    except nvram.VariablesMoved as error:
        if error.effect != "none":
            raise
        change = await _run(context, name, replace(request, hold=True), report)
    return change.snapshots[0]


async def add_layers(context: Context, name: str, request: CreateRequest) -> tuple[Layer, ...]:
    """Put the new layers on top without recording a snapshot; returns them."""
    change = await _run(context, name, replace(request, listed=False), unreported)
    return change.layers


async def _run(context: Context, name: str, request: CreateRequest, report: Report) -> Change:
    plan: CreatePlan | None = None
    try:
        async with working(context, name, "snapshot create") as session:
            basis = session.basis
            if request.volumes:
                await fold.run(session, report=report)  # what an interrupted one has left
                basis = await context.astore.basis(name, sharers=False)
            beside = await require_agreement(session, basis.chains, doing=_STARTS, wanted=request.disks)
            await overlay_paths.require_free(context, name, request.files)
            async with quiesce.prepared(context, session.machine, session.qemu, request.quiesce) as freezer:
                make = await _planner(session, basis, request, freezer, beside=beside)
                serials = 2 if request.volumes else 1
                operation = await begin(session, basis, make, seen=beside.names, serials=serials, jobs=False)
                plan = operation.plan
                async with (
                    guarded(context, session.machine, when=plan.hold or _holds(plan.memory)) as guard_ready,
                    recovery.attempting(session, operation),
                ):
                    after = [one for one in expected(basis.chains, plan) if one.disk not in beside.unplugged]
                    attempt = _Attempt(session, operation, plan, tuple(after), report, freezer, guard_ready)
                    change = await _carry_out(attempt)
            shielded, plan = bool(plan.volumes and plan.overlays), None  # it is settled: nothing is undone from here on
            if shielded:
                await fold.after(session, change.snapshots[0].name, report=report)
            return change
    except QmpsnapError as error:
        moved = plan and (plan.memory or plan.quiesce == "require" or plan.variables or plan.volumes)
        if plan and moved and (left := await _undone(context, plan, error)):
            return left
        raise


def _holds(memory: Memory | None) -> bool:
    return memory is not None and memory.resume


async def _undone(context: Context, plan: CreatePlan, error: QmpsnapError) -> Change | None:
    """After the disks have moved for nothing: their snapshot, if that was agreed to, else no trace of it."""
    if error.effect == "applied" and plan.memory and plan.memory.degrade:
        names = {snapshot.name for snapshot in plan.change.snapshots}
        found = await context.astore.snapshots(plan.machine)
        return replace(plan.change, snapshots=tuple(snapshot for snapshot in found if snapshot.name in names))
    if error.effect == "unknown":
        return None
    active = {chain.disk: chain.active.id for chain in await context.astore.chains(plan.machine)}
    moved = [overlay for overlay in plan.overlays if active[overlay.disk] == overlay.layer.id]
    effect: Effect = "none"
    left: list[str] = []
    for overlay in moved:
        try:
            await commit.run(context, plan.machine, CommitRequest(disk=overlay.disk, base=overlay.backing.id))
        except QmpsnapError as why:  # no reason to tell less of why there is no snapshot
            if why.effect == "applied":  # it is merged; only what follows that has failed
                continue
            effect = "unknown" if "unknown" in (effect, why.effect) else "applied"
            left.append(f"layer {overlay.layer.id} of disk {overlay.disk} stays as a hidden layer: {why.message}")
    if moved:
        taken = {found.name for found in await context.astore.snapshots(plan.machine)}
        if any(found.name in taken for found in plan.change.snapshots):  # its volumes were complete, whatever failed
            effect = "applied"
        error.claim(effect, "; ".join(left))
    return None


async def _planner(
    session: MachineSession, basis: Basis, request: CreateRequest, freezer: Freezer, *, beside: Beside
) -> Callable[[PlanInputs], CreatePlan]:
    """The plan but for its number, of the machine as it is now; refused on other files, or without room for it."""
    if request.memory and beside.unplugged:
        requests.require_all(session.machine, frozenset(), lacking=beside.unplugged)
    has_variables = session.machine.spec.firmware == "uefi" and not session.machine.adopted
    if request.listed and request.memory is None and has_variables and not request.hold:
        moves = requests.may_run(await requests.mode_of(session.qemu))
        hold = moves and not await nvram.is_still(session.context.home.variables(session.machine.name))
        request = replace(request, hold=hold)
    means = (
        await choose(session.context, session.machine, session.qemu, basis.chains, request.memory)
        if request.memory
        else None
    )

    by_volume = await _by_volume(session.machine, basis, request, beside) if request.volumes else {}
    there = await volumes.taken(session.machine, (chain.active for chain in basis.chains if chain.disk in by_volume))

    def make(at: PlanInputs) -> CreatePlan:
        planned = plan(at, request, means=means, freezer=freezer, beside=beside, by_volume=by_volume)
        touched = {one.disk for one in planned.new}
        below = (layer for chain in basis.chains if chain.disk in touched for layer in chain.layers)
        require_recorded(below, machine=session.machine.name)
        require_free([planned.variables[1]] if planned.variables else [])
        require_free(overlay.layer.path for overlay in planned.overlays if not overlay.part)
        require_free(copy.layer.path for copy in planned.volumes if copy.layer.storage == "file")
        volumes.require_free(planned.volumes, there)
        free_space.require(
            free_space.of_create(session.machine, planned, session.context.home.data),
            machine=session.machine.name,
            hint=_elsewhere(session.machine, request),
        )
        return planned

    return make


async def _by_volume(machine: Machine, basis: Basis, request: CreateRequest, beside: Beside) -> dict[str, Ability]:
    """The disks of which the storage makes the snapshot; others are refused unless the snapshot may be mixed."""
    included = requests.disks(machine, request.disks, lacking=beside.unplugged)
    actives = {chain.disk: chain.active for chain in basis.chains if chain.disk in included}
    found = await volumes.probe(actives, thick=request.lvm_size)
    unable: dict[str, tuple[str, str]] = {disk: (one.why, one.remedy) for disk, one in found.unable.items()}
    if machine.adopted:
        adopt = "first let the guest write to a layer of qmpsnap's: " + call("snapshot", machine.name)
        foreign = (disk for disk in found.able if not actives[disk].owned)
        unable |= dict.fromkeys(foreign, ("its image is its owner's, and no job writes to it", adopt))
    if unable and not request.mixed:
        disk, (why, remedy) = next(iter(unable.items()))
        raise StateError(
            f"the storage of disk {disk} of machine {machine.name} cannot make snapshots: {why}",
            hint=remedy + "; or keep an ordinary layer of that disk: " + option("mixed"),
            machine=machine.name,
        )
    if not (able := found.able.keys() - unable.keys()):
        raise StateError(
            f"no disk of machine {machine.name} has storage that can make snapshots: {next(iter(unable.values()))[0]}",
            hint="take an ordinary snapshot: " + call("snapshot", machine.name),
            machine=machine.name,
        )
    return {disk: found.able[disk] for disk in able}


def _elsewhere(machine: Machine, request: CreateRequest) -> str:
    """What helps where there is no room: each verb has a way of its own, or none."""
    if request.memory and request.memory.quit:
        return "free some space there, or save the memory elsewhere: " + call("save", machine.name, "FILE")
    if request.memory:
        return "free some space there, or take the disks alone: " + call("snapshot", machine.name)
    disk = next(iter(request.disks or ()), machine.spec.disks[0].name)
    files = {disk: "PATH"}
    return "free some space there, or create the overlay elsewhere: " + call("snapshot", machine.name, files=files)


class _Attempt(Struct, frozen=True):
    """What carrying out a plan needs; ``expected`` are the chains that QEMU must have afterwards."""

    session: MachineSession
    operation: Operation[CreatePlan]
    plan: CreatePlan
    expected: tuple[Chain, ...]
    report: Report
    freezer: Freezer
    guard_ready: Callable[[], Awaitable[None]]

    @property
    def opens(self) -> bool:
        """Whether QEMU itself opens the new layers, by their paths."""
        return self.plan.by == "blockdev-snapshot-sync"

    async def mark(self, step: str) -> None:
        """Make a step durable."""
        await self.session.context.astore.mark(self.operation.id, "running", step=step)

    async def prepare(self) -> None:
        """Do what takes time and can be done while the guest goes on."""
        await self.guard_ready()
        active = {overlay.disk: overlay.backing for overlay in self.plan.overlays}
        await early_flush.flush(self.session.machine.spec, active)

    async def mark_opened(self, layers: Iterable[Layer]) -> None:
        """Make durable that QEMU may have acted, whatever we hear: recovery asks from here on, and rolls nothing back.

        Before that it has to have opened the new layers themselves, unless that is its part of the transaction.
        """
        context, machine = self.session.context, self.session.machine
        process = context.process(machine)
        made = [layer for layer in layers if layer.inode]  # not yet what the storage will make

        def mark() -> None:
            if self.opens:
                require_recorded(made, machine=machine.name)
            else:
                require_opened(process, made, machine=machine.name)
            context.store.mark(self.operation.id, "running", step=steps.TRANSACTION)

        await blocking(mark)

    async def transact(self, qemu: Monitor) -> None:
        """Put every overlay on top or none; if the guest is paused for it, with its variables as they are then."""
        if self.plan.hold or self.plan.memory:
            await nvram.copy(self.plan.variables)
        with self.freezer.within():
            await commands.transaction(qemu, transaction_of(self.plan))

    async def require_moved(self, qemu: Monitor, change: Change) -> None:
        """Make sure that the guest writes to the new layers; learn QEMU's names of the nodes that it has opened."""
        context, machine = self.session.context, self.session.machine
        await graph.require_agreement(qemu, self.expected, machine=machine.name)
        if self.opens:
            made = [layer for layer in change.layers if layer.inode]
            await to_read(lambda: require_opened(context.process(machine), made, machine=machine.name))
            await file_nodes.note(context, machine, qemu, made)


async def _carry_out(at: _Attempt) -> Change:
    plan, machine, qemu = at.plan, at.session.machine, at.session.qemu
    change = identified(plan.change, await make_overlays(at.session.context, machine, plan.overlays))
    await nvram.copy(plan.variables)
    if qemu:
        for overlay in () if at.opens else plan.overlays:
            await commands.blockdev_add(qemu, node_options(overlay, machine))
        if plan.memory:
            return await _with_memory(at, qemu, plan.memory, change)
        await at.prepare()
        await at.mark_opened(change.layers)
        async with at.freezer.frozen():
            before = time.monotonic()
            async with nvram.held(qemu, when=plan.hold, machine=machine.name):
                await at.transact(qemu)
            pause_ms = (time.monotonic() - before) * 1000
        if not plan.hold and await nvram.have_moved(plan.variables):
            await at.mark(steps.LOST)  # recovery must not find that they read alike again
            raise nvram.VariablesMoved(
                f"the UEFI variables of machine {machine.name} were written to while its snapshot was taken",
                hint="try again",
                machine=machine.name,
            )
        await at.require_moved(qemu, change)
        level, why = "fs" if at.freezer.reached else "crash", at.freezer.why
        change = replace(
            change,
            snapshots=tuple(
                replace(found, pause_ms=pause_ms, level=level, unquiesced=why, frozen_ms=at.freezer.frozen_ms)
                for found in change.snapshots
            ),
        )
    elif any(overlay.part for overlay in plan.overlays):
        # Once a file has only the name that was chosen, recovery cannot know it for ours: so forward.
        await at.mark(steps.TRANSACTION)
    change = await _cloned(at, change)
    await recover_create.settle(at.session.context, machine, at.operation, change)
    return change


async def _cloned(at: _Attempt, change: Change) -> Change:
    """Have the storage make its snapshots of the images, which are quiet now; the change with what they are."""
    copies = at.plan.volumes
    if not copies:
        return change
    await at.mark(steps.CLONING)
    return identified(
        change, await volumes.make(at.session.context, at.session.machine, at.operation.id, copies, "snapshot")
    )


async def _with_memory(at: _Attempt, qemu: Monitor, how: Memory, change: Change) -> Change:
    machine = at.session.machine
    async with memory.channel(qemu, how) as channel:
        await memory.shorten(at.session.context, machine, how)
        await at.prepare()
        await at.mark_opened(change.layers)  # and the guest may be paused by us
        try:
            async with at.freezer.frozen():
                held = await memory.hold(qemu, how, channel.arguments, lambda: at.transact(qemu), machine=machine.name)
        except DeadlinePassed:
            # It may be whole all the same, but it was held for too long: nobody wants it.
            with anyio.CancelScope(shield=True):
                await at.mark(steps.LOST)
            raise
        await at.mark(steps.SAVING)
        await at.require_moved(qemu, change)
        await memory.written(qemu, at.operation, report=at.report)
    try:
        state = await memory.finish(
            at.operation,
            how,
            snapshot=change.snapshots[0].name,
            digest=channel.digest,
            steps=held.steps,
            frozen=at.freezer.sent,
        )
    except QmpsnapError as error:
        if how.mode == "stopped" and not how.resume:
            error.add("the paused guest ran for an instant so that QEMU released its disks; it is paused again")
        with anyio.CancelScope(shield=True):
            await at.mark(steps.LOST)
        raise
    change, freezer = await _cloned(at, change), at.freezer
    change = recover_create.with_memory(
        change, state, pause_ms=held.pause_ms, unquiesced=freezer.why, frozen_ms=freezer.frozen_ms
    )
    step = steps.ENDING if how.quit else None
    await recover_create.settle(at.session.context, machine, at.operation, change, step=step)
    if how.quit:
        await recover_create.quit_saved(at.session.context, machine, qemu, at.operation)
    return change
