"""Snapshots inside the images: one tag in each disk's active layer, with or without the guest's memory.

Only the disks' nodes take part: a raw UEFI variable store is no obstacle and gets a copy of its own. With memory the
guest is paused until all of it is written.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from msgspec import Struct

from qmpsnap.block.graph import NOTHING, Beside
from qmpsnap.errors import StateError, UsageError
from qmpsnap.hint import call, option
from qmpsnap.host.threads import to_read
from qmpsnap.machine.open_files import require_recorded
from qmpsnap.model.layers.blockdev import node_name
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.layers.vmstate import Hardware, Inside
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import OperationId, check_description
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.by import SaveBy
from qmpsnap.model.operations.operation import Change, InternalPlan, Operation
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.model.tags import check_tags
from qmpsnap.ops.base import free_space, luks, requests
from qmpsnap.ops.base.context import Context, guarded
from qmpsnap.ops.base.free_space import Need
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import require_free
from qmpsnap.ops.internal import tags
from qmpsnap.ops.memory.load import hardware_now
from qmpsnap.ops.memory.strategy import RESERVE_MORE, require_saveable, resident_bytes
from qmpsnap.ops.outside import other_devices
from qmpsnap.ops.session import early_flush, quiesce, recovery
from qmpsnap.ops.session.quiesce import Freezer, QuiesceRequest
from qmpsnap.ops.session.session import begin, inputs, looking, require_agreement, working
from qmpsnap.qmp import commands, human, jobs, transactions
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor

_OPENS = "open its images while it is stopped"


class InternalRequest(Struct, frozen=True, kw_only=True):
    """What a user asks for; fields as in :class:`qmpsnap.ops.snapshot.plan.CreateRequest`.

    ``memory``: the guest's memory, too; None: if there is a guest. Of the disks alone file systems can be frozen.
    """

    name: str | None = None
    description: str = ""
    tags: Mapping[str, str] = {}
    disks: tuple[str, ...] | None = None
    memory: bool | None = None
    quiesce: QuiesceRequest = QuiesceRequest()
    by: SaveBy = "snapshot-save"


def plan(
    at: PlanInputs,
    request: InternalRequest,
    *,
    hardware: Hardware | None,
    freezer: Freezer | None = None,
    beside: Beside = NOTHING,
) -> InternalPlan:
    """What will be done; pure. Arguments as for :func:`qmpsnap.ops.snapshot.create.plan`."""
    machine, chains, serial = at.machine, at.basis.chains, at.serial
    chosen = requests.disks(machine, request.disks, lacking=beside.unplugged)
    layers = {chain.disk: chain.active for chain in chains if chain.disk in chosen}
    for disk, layer in layers.items():
        if layer.format != "qcow2":
            raise StateError(
                f"disk {disk} of machine {machine.name} is {layer.format}: it cannot hold an internal snapshot",
                hint="put a qcow2 overlay on it first: " + call("snapshot", machine.name),
                machine=machine.name,
            )
    if hardware:
        requests.require_all(machine, chosen, lacking=beside.unplugged)
    name = requests.snapshot_name(machine, chains, at.basis.snapshots, request.name)
    tag = tag_of(machine, serial, at.now)
    has_variables = machine.spec.firmware == "uefi" and not machine.adopted
    variables = str(at.home.variables(machine.name)) if has_variables else None
    kept = str(at.home.variables_copy(machine.name, serial, tpm=machine.spec.tpm)) if variables else None
    vmstate = next(iter(layers.values())).id if hardware else None
    snapshot = Snapshot(
        name=name,
        kind="internal",
        state="ok",
        parent=machine.current,
        created=at.now,
        description=check_description(request.description),
        tags=check_tags(request.tags),
        mode=at.mode,
        points=tuple(Point(disk=disk, layer=layer.id, tag=tag) for disk, layer in layers.items()),
        operation=serial,
        inside=Inside(layer=vmstate, bytes=0, hardware=hardware) if vmstate and hardware else None,
        variables=kept,
        level="ram" if hardware else "crash",
        unquiesced=freezer.why if freezer else "",
        outside=requests.outside(machine, beside, request.disks),
    )
    return InternalPlan(
        machine=machine.name,
        tag=tag,
        live=at.mode != "stopped",
        layers=layers,
        vmstate=vmstate,
        variables=(variables, kept) if variables and kept else None,
        resume=requests.may_run(at.mode) and bool(vmstate or variables),
        change=Change(snapshots=(snapshot,), current=name),
        quiesce=freezer.wish if freezer else request.quiesce.wish,
        by=request.by,
    )


def tag_of(machine: Machine, serial: OperationId, now: float) -> str:
    """A snapshot's name inside the images.

    Not of the number alone: an image may have been another store's, and have that store's tags inside.
    """
    return f"qs-{serial}-{sha256(f'{machine.uuid}/{serial}/{now}'.encode()).hexdigest()[:8]}"


async def create(context: Context, name: str, request: InternalRequest, *, report: Report = unreported) -> Snapshot:
    """Take the snapshot; returns it as recorded."""
    _require_possible(request)
    async with working(context, name, "snapshot create") as session:
        basis = session.basis
        beside = await require_agreement(session, basis.chains, doing=_OPENS, wanted=request.disks)
        async with quiesce.prepared(context, session.machine, session.qemu, request.quiesce) as freezer:
            make = await _planner(session, basis, request, freezer, beside=beside)
            operation = await begin(session, basis, make, seen=beside.names)
            async with (
                guarded(context, session.machine, when=operation.plan.resume) as guard_ready,
                recovery.attempting(session, operation),
            ):
                await guard_ready()
                return await _carry_out(session, operation, basis.chains, freezer=freezer, report=report)


async def preview(context: Context, name: str, request: InternalRequest) -> tuple[Machine, InternalPlan]:
    """The plan that :func:`create` would follow now, without a lock and without a change."""
    _require_possible(request)
    async with looking(context, name) as session:
        basis = session.basis
        beside = await require_agreement(session, basis.chains, doing=_OPENS, wanted=request.disks)
        freezer = await quiesce.foreseen(session.machine, session.qemu, request.quiesce)
        make = await _planner(session, basis, request, freezer, beside=beside)
        at = await inputs(session, basis, seen=beside.names)
    return session.machine, await to_read(make, at)


def _require_possible(request: InternalRequest) -> None:
    if request.quiesce.wish != "skip" and request.memory is not False:
        raise UsageError(
            "an internal snapshot with memory cannot freeze the guest's file systems: the saved guest would stay"
            " frozen",
            hint="add " + option("memory", False) + ", or take a full snapshot",
        )
    if request.by == "savevm" and request.memory is False:
        raise UsageError("savevm always saves the memory", hint="omit " + option("memory", False))


def qmp_commands(planned: InternalPlan) -> list[tuple[str, dict[str, object]]]:
    """The exact QMP commands of a plan, in order; a stopped machine's go to a QEMU without a guest, disk by disk."""
    nodes = [node_name(layer) for layer in planned.layers.values()]
    if not planned.live:
        return [("transaction", transactions.internal_transaction([node], planned.tag)) for node in nodes]
    if planned.vmstate:
        job = tags.job_of(planned.change.snapshots[0].operation)
        by_human = human.command(f"savevm {planned.tag}")
        arguments = tags.memory_arguments(job, tag=planned.tag, layers=planned.layers, vmstate=planned.vmstate)
        act: list[tuple[str, dict[str, object]]] = [
            by_human if planned.by == "savevm" else ("snapshot-save", arguments)
        ]
    else:
        act = [("transaction", transactions.internal_transaction(nodes, planned.tag))]
    return [("stop", {}), *act, ("cont", {})] if planned.resume else act


def _needs(context: Context, machine: Machine, planned: InternalPlan) -> list[Need]:
    """What a tag needs: tables of its own in every image, and the guest's memory where that is saved."""
    process = context.process(machine)
    needs = [Need(str(context.home.data), free_space.STORE, "the store")]
    for layer in planned.layers.values():
        folder = str(Path(layer.path).parent)
        needs.append(Need(folder, free_space.LEFT, "an internal snapshot"))
        if layer.id == planned.vmstate and process:
            needs.append(Need(folder, resident_bytes(process.pid) + RESERVE_MORE, "the guest's memory"))
    return needs


async def _planner(
    session: MachineSession, basis: Basis, request: InternalRequest, freezer: Freezer, *, beside: Beside
) -> Callable[[PlanInputs], InternalPlan]:
    luks.require_plain(
        session.machine,
        "qmpsnap takes no internal snapshots of encrypted images",
        "take a snapshot with overlays: " + call("snapshot", session.machine.name),
    )
    if request.by == "savevm" and session.qemu:
        await _require_no_flash(session.machine, session.qemu)
    if (request.memory or request.by == "savevm") and not session.qemu:
        raise StateError(
            f"machine {session.machine.name} is stopped and has no memory to save", machine=session.machine.name
        )
    hardware = None
    if session.qemu and request.memory is not False:
        again = "take its disks alone: " + call("snapshot", session.machine.name, kind="internal", memory=False)
        await require_saveable(session.context.home, session.machine, session.qemu, basis.chains, hint=again)
        await other_devices.require_same(session.machine, session.qemu, hint=again, only_cards=True)
        hardware = await hardware_now(session.context, session.machine, session.qemu)

    def make(at: PlanInputs) -> InternalPlan:
        planned = plan(at, request, hardware=hardware, freezer=freezer, beside=beside)
        opened = (layer for chain in basis.chains if chain.disk in planned.layers for layer in chain.layers)
        require_recorded(opened, machine=session.machine.name)
        require_free([planned.variables[1]] if planned.variables else [])
        free_space.require(
            _needs(session.context, session.machine, planned),
            machine=session.machine.name,
            hint="free some space there",
        )
        return planned

    return make


async def _require_no_flash(machine: Machine, qemu: Monitor) -> None:
    """``savevm`` takes all that the guest can write to, and raw images hold no snapshot."""
    for backend in await commands.query_block(qemu):
        if backend.is_flash and backend.inserted and not backend.inserted.ro:
            raise StateError(
                f"savevm would put a snapshot into the flash {backend.shown} of machine {machine.name}, too"
                f" ({backend.inserted.file})",
                hint="use " + option("by", "snapshot-save"),
                machine=machine.name,
            )


async def _carry_out(
    session: MachineSession,
    operation: Operation[InternalPlan],
    chains: Sequence[Chain],
    *,
    freezer: Freezer,
    report: Report,
) -> Snapshot:
    planned = operation.plan
    if session.qemu and planned.by == "savevm":
        await tags.require_free_tag(session.qemu, planned.tag)
    if session.qemu:
        await early_flush.flush(session.machine.spec, planned.layers)
    await session.context.astore.mark(operation.id, "running", step=steps.STARTED)
    pause_ms = None
    if session.qemu:
        pause_ms = await tags.tag_live(session.qemu, tags.job_of(operation.id), planned, freezer, report)
        found = await commands.query_tags(session.qemu)
    else:
        await tags.keep_variables(planned)
        found = await tags.tag_stopped(session.context, session.machine, planned, chains)
    change = tags.settled(planned, found, pause_ms=pause_ms, freezer=freezer)
    await session.context.astore.settle(operation.id, planned.machine, change, step=steps.RECORDED)
    if session.qemu and planned.vmstate and planned.by == "snapshot-save":
        await jobs.dismiss(session.qemu, tags.job_of(operation.id))
    await session.context.astore.mark(operation.id, "settled", step=steps.SETTLED)
    return change.snapshots[0]
