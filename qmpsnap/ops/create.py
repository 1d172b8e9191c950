"""``snapshot create``: every disk's active layer is frozen under a new empty overlay, all disks in one transaction."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph, place
from qmpsnap.errors import DeadlinePassed, QmpsnapError, UsageError
from qmpsnap.machine import statefile
from qmpsnap.machine.opened import require_opened
from qmpsnap.model import steps
from qmpsnap.model.blockdev import layer_options, node_name
from qmpsnap.model.chain import Chain, Layer
from qmpsnap.model.home import Home
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import OperationId, check_description
from qmpsnap.model.operation import Change, CreatePlan, Memory, Operation, Overlay
from qmpsnap.model.snapshot import Point, Snapshot
from qmpsnap.model.vmstate import version_of
from qmpsnap.ops import asked, chosen, commit, memory, recover, recover_create, space
from qmpsnap.ops.commit import CommitRequest
from qmpsnap.ops.context import Context, blocking, require_spec
from qmpsnap.ops.means import Means, MemoryRequest, choose
from qmpsnap.ops.overlays import identified, make_overlays, overlay_on, require_free
from qmpsnap.ops.work import Work, working
from qmpsnap.qmp import commands, migration
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor


class CreateRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        name: the snapshot's name; None takes the next free ``snap-N`` (``saved-N`` for one after which QEMU ends).
        description: free text.
        disks: names of the disks to include; None takes all that the spec does not leave out.
        files: disk to absolute path of its new layer; those not named are put into the machine's folder.
        listed: False makes the new layers only: no snapshot is recorded, the current one stays current.
        memory: save the guest's memory as well, of the same instant; None takes the disks alone.
    """

    name: str | None = None
    description: str = ""
    disks: tuple[str, ...] | None = None
    listed: bool = True
    files: Mapping[str, str] = {}
    memory: MemoryRequest | None = None


def plan(
    machine: Machine,
    chains: Sequence[Chain],
    snapshots: Sequence[Snapshot],
    request: CreateRequest,
    *,
    serial: OperationId,
    home: Home,
    mode: str,
    now: float,
    means: Means | None = None,
) -> CreatePlan:
    """What will be done; pure.

    Args:
        machine: the machine.
        chains: its live chains.
        snapshots: those it has already.
        request: what was asked for.
        serial: number of the operation and of its new layers.
        home: where new images go.
        mode: ``live``, ``paused`` or ``stopped``.
        now: seconds since the epoch.
        means: how the memory can be saved, if it was asked for.

    Raises:
        NameRefused: the name is not allowed.
        NameTaken: the machine has a snapshot of that name.
        NotFoundError: no disk of that name.
        StateError: a disk cannot be snapshotted.
    """
    included = asked.disks(machine, request.disks)
    _require_included(machine, included, request.files)
    if request.memory:
        asked.require_all(machine, included)
    folder = home.machine_dir(machine.name)
    overlays = tuple(
        _overlay(machine, chain, serial, str(folder), request.files.get(chain.disk))
        for chain in chains
        if chain.disk in included
    )
    change = Change(
        layers=tuple(overlay.layer for overlay in overlays),
        active={overlay.disk: overlay.layer.id for overlay in overlays},
    )
    live = mode != "stopped"
    if not request.listed:
        return CreatePlan(machine=machine.name, live=live, overlays=overlays, change=change)
    prefix = "saved" if request.memory and request.memory.quit else "snap"
    name = asked.snapshot_name(machine, snapshots, request.name, prefix=prefix)
    snapshot = Snapshot(
        name=name,
        kind="full" if means else "disk",
        state="ok",
        parent=machine.current,
        created=now,
        description=check_description(request.description),
        mode=mode,
        points=tuple(Point(disk=overlay.disk, layer=overlay.backing.id) for overlay in overlays),
        operation=serial,
    )
    change = replace(change, snapshots=(snapshot,), current=name)
    memory = _memory(request.memory, means, serial, folder) if request.memory and means else None
    return CreatePlan(machine=machine.name, live=live, overlays=overlays, change=change, memory=memory)


def _memory(request: MemoryRequest, means: Means, serial: OperationId, folder: Path) -> Memory:
    path = request.file or str(folder / f"memory-{serial}.vmstate")
    return Memory(
        path=path,
        part=statefile.part(path, serial),
        mode=means.mode,
        layout=means.layout,
        compression=request.compression,
        hardware=means.hardware,
        why=means.why,
        resume=means.resume,
        cancellable=means.cancellable,
        reserve=means.reserve,
        quit=request.quit,
        degrade=request.degrade,
        max_pause_ms=request.max_pause_ms if means.resume else None,
    )


def qmp_commands(plan: CreatePlan, machine: Machine) -> list[tuple[str, dict[str, object]]]:
    """The exact QMP commands of a live plan, in order; none for a stopped machine."""
    if not plan.live:
        return []
    adds = [("blockdev-add", _node_options(overlay, machine)) for overlay in plan.overlays]
    transaction = ("transaction", _transaction(plan))
    if plan.memory is None:
        return [*adds, transaction]
    give, migrate = migration.handing_over(version_of(plan.memory.hardware.qemu_version))
    held = [("stop", {}), transaction, migrate] if plan.memory.resume else [transaction, migrate]
    after = ["quit"] if plan.memory.quit else ["cont"] if plan.memory.resume else []
    return [*adds, give, *held, *((command, {}) for command in after)]


async def preview(context: Context, name: str, request: CreateRequest) -> tuple[Machine, CreatePlan]:
    """The plan that :func:`run` would follow now, without a lock and without a change (``--dry-run``)."""
    machine = await blocking(context.store.machine, name)
    chains = await blocking(context.store.chains, name)
    async with context.monitor(machine) as qemu:
        if qemu is None:
            require_spec(machine, "make it start on a new layer")
        make = await _planner(context, Work(machine, qemu), chains, request)
    await chosen.require_free(context, name, request.files)
    return machine, make(OperationId(await blocking(context.store.next_serial)))


async def run(context: Context, name: str, request: CreateRequest, *, report: Report = unreported) -> Snapshot:
    """Take the snapshot; returns it as recorded.

    With ``memory`` the guest runs on as soon as its memory is fixed; the call returns once all of it is written.

    Raises:
        QmpsnapError: see :func:`plan` and :func:`choose`; besides, ``StoreMismatch`` when QEMU's chains are not the
            store's, and the families of lock, host, QEMU and deadline. Unless ``effect`` is ``unknown`` nothing has
            changed; then the next command, or ``recover``, finds out and ends it.
    """
    change = await _run(context, name, request, report)
    return change.snapshots[0]


async def add_layers(context: Context, name: str, request: CreateRequest) -> tuple[Layer, ...]:
    """Put the new layers on top without recording a snapshot; returns them.

    Raises:
        QmpsnapError: as :func:`run`.
    """
    change = await _run(context, name, replace(request, listed=False), unreported)
    return change.layers


async def _run(context: Context, name: str, request: CreateRequest, report: Report) -> Change:
    plan: CreatePlan | None = None
    try:
        async with working(context, name, "snapshot create") as work:
            chains = await blocking(context.store.chains, name)
            if work.qemu:
                await graph.require_agreement(work.qemu, chains, machine=name)
            else:
                require_spec(work.machine, "make it start on a new layer")
            await chosen.require_free(context, name, request.files)
            operation = await _open(context, work, chains, request)
            assert isinstance(operation.plan, CreatePlan)
            plan = operation.plan
            async with recover.attempting(context, work.machine, work.qemu, operation):
                expected = _expected(chains, plan)
                return await _carry_out(_Attempt(context, work, operation, plan, expected, report))
    except QmpsnapError as error:
        if plan and plan.memory and (degraded := await _without_memory(context, plan, error)):
            return degraded
        raise


async def _without_memory(context: Context, plan: CreatePlan, error: QmpsnapError) -> Change | None:
    """After the memory alone has failed: the disks' snapshot, if that was agreed to, else no trace of it."""
    assert plan.memory
    if error.effect == "applied" and plan.memory.degrade:
        names = {snapshot.name for snapshot in plan.change.snapshots}
        found = await blocking(context.store.snapshots, plan.machine)
        return replace(plan.change, snapshots=tuple(snapshot for snapshot in found if snapshot.name in names))
    if error.effect == "none":
        active = {chain.disk: chain.active.id for chain in await blocking(context.store.chains, plan.machine)}
        for overlay in plan.overlays:
            if active[overlay.disk] != overlay.layer.id:
                continue
            try:
                await commit.run(context, plan.machine, CommitRequest(disk=overlay.disk, base=overlay.backing.id))
            except QmpsnapError as left:  # no reason to tell less of why there is no snapshot
                error.add(f"layer {overlay.layer.id} of disk {overlay.disk} is left, without a name: {left.message}")
    return None


async def _open(context: Context, work: Work, chains: Sequence[Chain], request: CreateRequest) -> Operation:
    planner = await _planner(context, work, chains, request)

    def make(serial: OperationId) -> CreatePlan:
        planned = planner(serial)
        require_free(overlay.layer.path for overlay in planned.overlays if not overlay.part)
        space.require(
            space.of_create(work.machine, planned, context.home.data),
            machine=work.machine.name,
            hint="free some space there, or let the new layers lie elsewhere (--file)",
        )
        return planned

    return await blocking(context.store.open_operation, work.machine.name, make)


async def _planner(
    context: Context, work: Work, chains: Sequence[Chain], request: CreateRequest
) -> Callable[[OperationId], CreatePlan]:
    """The plan but for its number, of the machine as it is now."""
    mode = await asked.mode_of(work.qemu)
    means = await choose(context, work.machine, work.qemu, request.memory) if request.memory else None
    snapshots = await blocking(context.store.snapshots, work.machine.name)

    def make(serial: OperationId) -> CreatePlan:
        return plan(
            work.machine,
            chains,
            snapshots,
            request,
            serial=serial,
            home=context.home,
            mode=mode,
            now=time.time(),
            means=means,
        )

    return make


class _Attempt(Struct, frozen=True):
    """What carrying out a plan needs; ``expected`` are the chains that QEMU must have afterwards."""

    context: Context
    work: Work
    operation: Operation
    plan: CreatePlan
    expected: tuple[Chain, ...]
    report: Report

    async def mark(self, step: str) -> None:
        """Make a step durable."""
        await blocking(lambda: self.context.store.mark(self.operation.id, "running", step=step))

    async def transact(self, qemu: Monitor) -> None:
        """Put every overlay on top, or none."""
        await commands.transaction(qemu, _transaction(self.plan))


async def _carry_out(at: _Attempt) -> Change:
    plan, machine, qemu = at.plan, at.work.machine, at.work.qemu
    change = identified(plan.change, await make_overlays(at.context, machine, plan.overlays))
    if qemu:
        for overlay in plan.overlays:
            await commands.blockdev_add(qemu, _node_options(overlay, machine))
        require_opened(at.context.process(machine), change.layers, machine=machine.name)
        if plan.memory:
            return await _with_memory(at, qemu, plan.memory, change)
        # From here on QEMU may have acted whatever we hear: recovery asks instead of rolling back.
        await at.mark(steps.TRANSACTION)
        before = time.monotonic()
        await at.transact(qemu)
        pause_ms = (time.monotonic() - before) * 1000
        await graph.require_agreement(qemu, at.expected, machine=machine.name)
        change = replace(change, snapshots=tuple(replace(found, pause_ms=pause_ms) for found in change.snapshots))
    elif any(overlay.part for overlay in plan.overlays):
        # Once a file has only the name that was chosen, recovery cannot know it for ours: so forward.
        await at.mark(steps.TRANSACTION)
    await recover_create.settle(at.context, machine, at.operation, change)
    return change


async def _with_memory(at: _Attempt, qemu: Monitor, how: Memory, change: Change) -> Change:
    machine = at.work.machine
    async with memory.channel(qemu, how) as channel:
        await memory.shorten(at.context, machine, how)
        # From here on QEMU may have acted, and we may hold the guest.
        await at.mark(steps.TRANSACTION)
        try:
            held = await memory.hold(qemu, how, channel, lambda: at.transact(qemu))
        except DeadlinePassed:
            # It may be whole all the same, but it was held for too long: nobody wants it.
            with anyio.CancelScope(shield=True):
                await at.mark(steps.LOST)
            raise
        await at.mark(steps.SAVING)
        await graph.require_agreement(qemu, at.expected, machine=machine.name)
        await memory.written(qemu, at.operation, report=at.report)
    try:
        state = await memory.finish(at.operation, how, snapshot=change.snapshots[0].name, steps=held.steps)
    except QmpsnapError as error:
        if how.mode == "stopped" and not how.resume:
            error.add("to get its disks back from QEMU the paused guest had to run for an instant; it is paused again")
        with anyio.CancelScope(shield=True):
            await at.mark(steps.LOST)
        raise
    change = recover_create.with_memory(change, state, pause_ms=held.pause_ms)
    step = steps.ENDING if how.quit else None
    await recover_create.settle(at.context, machine, at.operation, change, step=step)
    if how.quit:
        await recover_create.quit_saved(at.context, machine, qemu, at.operation)
    return change


def _expected(chains: Sequence[Chain], plan: CreatePlan) -> tuple[Chain, ...]:
    """The live chains once the plan's overlays are active."""
    new = {overlay.disk: overlay.layer for overlay in plan.overlays}
    return tuple(chain.with_overlay(new[chain.disk]) if chain.disk in new else chain for chain in chains)


def _transaction(plan: CreatePlan) -> dict[str, object]:
    pairs = [(node_name(overlay.backing), node_name(overlay.layer)) for overlay in plan.overlays]
    return commands.snapshot_transaction(pairs)


def _overlay(machine: Machine, chain: Chain, serial: OperationId, folder: str, path: str | None) -> Overlay:
    layer = overlay_on(chain, serial, folder)
    if path is None:
        return Overlay(disk=chain.disk, layer=layer, backing=chain.active)
    part = place.part_of(path, f"{machine.uuid[:8]}-{serial}")
    return Overlay(disk=chain.disk, layer=replace(layer, path=path), backing=chain.active, part=part)


def _require_included(machine: Machine, included: frozenset[str], files: Mapping[str, str]) -> None:
    for disk in files:
        machine.require_disk(disk)
        if disk not in included:
            raise UsageError(
                f"a file is named for disk {disk} of machine {machine.name}, which the snapshot does not include;"
                " nothing was changed",
                hint="name the disk in --disks, or leave out its --file",
                machine=machine.name,
            )


def _node_options(overlay: Overlay, machine: Machine) -> dict[str, object]:
    return layer_options(overlay.layer, machine.require_disk(overlay.disk), backing=None, read_only=False)
