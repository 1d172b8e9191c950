"""``snapshot create``: every disk's active layer is frozen under a new empty overlay, all disks in one transaction."""

import time
from collections.abc import Mapping, Sequence

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph, place
from qmpsnap.block.qcow2 import Header
from qmpsnap.errors import NameTaken, QmpsnapError, StateError, UsageError
from qmpsnap.model.blockdev import layer_options, node_name
from qmpsnap.model.chain import Chain, Layer
from qmpsnap.model.home import Home
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import LayerId, OperationId, check_name, layer_id
from qmpsnap.model.operation import Change, CreatePlan, Operation, Overlay
from qmpsnap.model.snapshot import Point, Snapshot
from qmpsnap.model.spec import DiskSpec
from qmpsnap.ops import chosen, recover
from qmpsnap.ops.context import Context, blocking, require_spec
from qmpsnap.ops.work import Work, working
from qmpsnap.qmp import commands
from qmpsnap.qmp.session import Monitor

SETTLE_DEADLINE = 15.0
"""Seconds that finding out what became of a failed attempt may take, also when the caller was cancelled."""


class CreateRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for.

    Attributes:
        name: the snapshot's name; None takes the next free ``snap-N``.
        description: free text.
        disks: names of the disks to include; None takes all that the spec does not leave out.
        files: disk to absolute path of its new layer; those not named are put into the machine's folder.
        listed: False makes the new layers only: no snapshot is recorded, the current one stays current.
    """

    name: str | None = None
    description: str = ""
    disks: tuple[str, ...] | None = None
    listed: bool = True
    files: Mapping[str, str] = {}


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

    Raises:
        NameRefused: the name is not allowed.
        NameTaken: the machine has a snapshot of that name.
        NotFoundError: no disk of that name.
        StateError: a disk cannot be snapshotted.
    """
    included = _disks(machine, request.disks)
    _require_included(machine, included, request.files)
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
    name = _name(machine, snapshots, request.name)
    snapshot = Snapshot(
        name=name,
        kind="disk",
        state="ok",
        parent=machine.current,
        created=now,
        description=request.description,
        mode=mode,
        points=tuple(Point(disk=overlay.disk, layer=overlay.backing.id) for overlay in overlays),
        operation=serial,
    )
    change = replace(change, snapshots=(snapshot,), current=name)
    return CreatePlan(machine=machine.name, live=live, overlays=overlays, change=change)


def qmp_commands(plan: CreatePlan, machine: Machine) -> list[tuple[str, dict[str, object]]]:
    """The exact QMP commands of a live plan, in order; none for a stopped machine."""
    if not plan.live:
        return []
    adds = [("blockdev-add", _node_options(overlay, machine)) for overlay in plan.overlays]
    pairs = [(node_name(overlay.backing), node_name(overlay.layer)) for overlay in plan.overlays]
    return [*adds, ("transaction", commands.snapshot_transaction(pairs))]


async def preview(context: Context, name: str, request: CreateRequest) -> tuple[Machine, CreatePlan]:
    """The plan that :func:`run` would follow now, without a lock and without a change (``--dry-run``)."""
    machine = await blocking(context.store.machine, name)
    async with context.monitor(machine) as qemu:
        mode = await mode_of(qemu)
    if mode == "stopped":
        require_spec(machine, "make it start on a new layer")
    chains = await blocking(context.store.chains, name)
    snapshots = await blocking(context.store.snapshots, name)
    await chosen.require_free(context, name, request.files)
    serial = OperationId(await blocking(context.store.next_serial))
    return machine, plan(
        machine, chains, snapshots, request, serial=serial, home=context.home, mode=mode, now=time.time()
    )


async def run(context: Context, name: str, request: CreateRequest) -> Snapshot:
    """Take the snapshot; returns it as recorded.

    Raises:
        QmpsnapError: see :func:`plan`; besides, ``StoreMismatch`` when QEMU's chains are not the store's, and the
            families of lock, host, QEMU and deadline. Unless ``effect`` is ``unknown`` nothing has changed; then the
            next command, or ``recover``, finds out and ends it.
    """
    change = await _run(context, name, request)
    return change.snapshots[0]


async def add_layers(context: Context, name: str, request: CreateRequest) -> tuple[Layer, ...]:
    """Put the new layers on top without recording a snapshot; returns them.

    Raises:
        QmpsnapError: as :func:`run`.
    """
    change = await _run(context, name, replace(request, listed=False))
    return change.layers


async def _run(context: Context, name: str, request: CreateRequest) -> Change:
    async with working(context, name, "snapshot create") as work:
        chains = await blocking(context.store.chains, name)
        if work.qemu:
            await graph.require_agreement(work.qemu, chains, machine=name)
        else:
            require_spec(work.machine, "make it start on a new layer")
        await chosen.require_free(context, name, request.files)
        operation = await _open(context, work, chains, request)
        assert isinstance(operation.plan, CreatePlan)
        try:
            return await _carry_out(context, work, operation, operation.plan, chains)
        except BaseException as error:
            with anyio.move_on_after(SETTLE_DEADLINE, shield=True):
                await recover.after_failure(context, work.machine, work.qemu, operation, error)
            raise


async def _open(context: Context, work: Work, chains: Sequence[Chain], request: CreateRequest) -> Operation:
    mode = await mode_of(work.qemu)
    snapshots = await blocking(context.store.snapshots, work.machine.name)

    def make(serial: OperationId) -> CreatePlan:
        return plan(
            work.machine, chains, snapshots, request, serial=serial, home=context.home, mode=mode, now=time.time()
        )

    return await blocking(context.store.open_operation, work.machine.name, make)


async def _carry_out(
    context: Context, work: Work, operation: Operation, plan: CreatePlan, chains: Sequence[Chain]
) -> Change:
    headers = await make_overlays(context, plan.overlays)
    pause_ms = None
    if work.qemu:
        pause_ms = await _transact(context, work.qemu, work.machine, operation, plan)
        overlays = {overlay.disk: overlay.layer for overlay in plan.overlays}
        expected = [chain.with_overlay(overlays[chain.disk]) if chain.disk in overlays else chain for chain in chains]
        await graph.require_agreement(work.qemu, expected, machine=work.machine.name)
    elif any(overlay.part for overlay in plan.overlays):
        # Once a file has only the name that was chosen, recovery cannot know it for ours: so forward.
        await blocking(lambda: context.store.mark(operation.id, "running", step="transaction"))
    await chosen.let_go(plan.overlays)
    change = recover.identified(plan.change, headers, pause_ms=pause_ms)
    await blocking(context.store.settle, operation.id, work.machine.name, change)
    return change


async def make_overlays(context: Context, overlays: Sequence[Overlay]) -> dict[LayerId, Header]:
    """Create every overlay, side by side; each removes its own file when it fails."""
    headers: dict[LayerId, Header] = {}

    async def make(overlay: Overlay) -> None:
        headers[overlay.layer.id] = await context.image.create_overlay(
            overlay.part or overlay.layer.path, backing=overlay.backing, virtual_size=overlay.layer.virtual_size
        )
        if overlay.part:
            await place.claim(overlay.part, overlay.layer.path)

    try:
        async with anyio.create_task_group() as group:
            for overlay in overlays:
                group.start_soon(make, overlay)
    except* QmpsnapError as errors:
        raise _first(errors) from errors
    return headers


def _first(errors: BaseExceptionGroup[QmpsnapError]) -> QmpsnapError:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, QmpsnapError)
    return found


async def _transact(context: Context, qemu: Monitor, machine: Machine, operation: Operation, plan: CreatePlan) -> float:
    """Open the overlays and put them on top; returns how long the guest may have noticed, in milliseconds."""
    *adds, (_, arguments) = qmp_commands(plan, machine)
    for _, options in adds:
        await commands.blockdev_add(qemu, options)
    # From here on QEMU may have acted whatever we hear: recovery asks instead of rolling back.
    await blocking(lambda: context.store.mark(operation.id, "running", step="transaction"))
    before = time.monotonic()
    await commands.transaction(qemu, arguments)
    return (time.monotonic() - before) * 1000


async def mode_of(qemu: Monitor | None) -> str:
    """``live``, ``paused`` or ``stopped``: how a snapshot taken now is taken."""
    if qemu is None:
        return "stopped"
    return "live" if (await commands.query_status(qemu)).running else "paused"


def _name(machine: Machine, snapshots: Sequence[Snapshot], name: str | None) -> str:
    taken = {snapshot.name: snapshot for snapshot in snapshots}
    if name is None:
        return next(free for number in range(1, len(taken) + 2) if (free := f"snap-{number}") not in taken)
    check_name(name, "snapshot")
    if name in taken:
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(taken[name].created))
        raise NameTaken(
            f"machine {machine.name} has a snapshot {name} since {since}; nothing was changed",
            hint="choose another name",
            machine=machine.name,
        )
    return name


def _disks(machine: Machine, wanted: tuple[str, ...] | None) -> frozenset[str]:
    if wanted is None:
        chosen = [disk.name for disk in machine.spec.disks if disk.snapshot and not disk.read_only]
    else:
        chosen = [_writable(machine, disk).name for disk in wanted]
    if not chosen:
        raise StateError(
            f"machine {machine.name} has no disk that a snapshot could include; nothing was changed",
            hint=f"qmpsnap show {machine.name} lists its disks",
            machine=machine.name,
        )
    return frozenset(chosen)


def _writable(machine: Machine, name: str) -> DiskSpec:
    disk = machine.require_disk(name)
    if disk.read_only:
        raise StateError(
            f"disk {name} of machine {machine.name} is read-only: it never changes; nothing was done",
            hint="leave it out of --disks",
            machine=machine.name,
        )
    return disk


def overlay_on(chain: Chain, serial: OperationId, folder: str) -> Layer:
    """A new empty layer on top of a chain."""
    identity = layer_id(chain.disk, serial)
    return Layer(
        id=identity,
        path=f"{folder}/{identity}.qcow2",
        format="qcow2",
        backing=chain.active.id,
        virtual_size=chain.active.virtual_size,
    )


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
