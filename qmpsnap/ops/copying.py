"""Running a mirror: the target made, the job followed, its end made the truth; a death at any point has one right end.

``planned`` -> file made beside its place -> ``made:<device>:<inode>`` -> it gets its name, QEMU opens it ->
``started:...`` -> ready -> told to go over (pivot) or to let go (finish) -> pending: both sides are equal and written
out -> ``finalizing:...`` -> finalize, graph verified -> ``settled:...`` with the change -> dismissed,
nodes closed, files that nobody needs removed. A finished copy is the user's: the store does not have it.
"""

from collections.abc import Callable

import anyio
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph, place
from qmpsnap.block.place import Identity
from qmpsnap.errors import ImageRefused, QmpError, StateError, StoreMismatch
from qmpsnap.model.blockdev import layer_options, node_name
from qmpsnap.model.chain import Layer
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import JobId, NodeName, OperationId, job_id
from qmpsnap.model.operation import Change, MirrorPlan, Operation
from qmpsnap.ops import finalize, merge
from qmpsnap.ops.context import Context, blocking
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor

HOLD_AFTER = 2.0
"""Seconds a guest may keep a job from its end; then its vCPUs are stopped until it is over."""


class Phase(Struct, frozen=True):
    """Where a mirror is, as the journal keeps it.

    Attributes:
        name: ``planned``, ``made``, ``started``, ``finalizing`` or ``settled``.
        identity: the target's file.
        running: the guest runs, but may have been stopped by us.
    """

    name: str
    identity: Identity = (0, 0)
    running: bool = False

    @classmethod
    def read(cls, step: str) -> "Phase":
        """The phase of a journalled step."""
        name, *rest = step.split(":")
        if len(rest) < 2:  # noqa: PLR2004 - device and inode
            return cls(name)
        return cls(name, (int(rest[0]), int(rest[1])), "running" in rest)


def wording(identity: Identity) -> Callable[[str], str]:
    """How the journal words a phase of a mirror onto that file."""
    return lambda name: f"{name}:{identity[0]}:{identity[1]}"


def expected(plan: MirrorPlan) -> tuple[Layer, ...]:
    """The chain after a pivot."""
    return (*(plan.chain[:-1] if plan.shallow else ()), plan.target)


def gone(plan: MirrorPlan) -> tuple[Layer, ...]:
    """The layers whose nodes are nobody's when the job is over, top first."""
    if plan.mode == "finish":
        return (plan.target,)
    left = {layer.id for layer in expected(plan)}
    return tuple(layer for layer in reversed(plan.chain) if layer.id not in left)


def qmp_commands(
    plan: MirrorPlan, machine: Machine, job: JobId, *, root: NodeName | None = None
) -> list[tuple[str, dict[str, object]]]:
    """The commands that open the target and start the job; pure.

    Args:
        plan: what will be done.
        machine: the machine.
        job: the job's id.
        root: from :func:`root_of`.
    """
    node = node_name(plan.target)
    if plan.nbd:
        options = plan.nbd.options(node)
    else:
        backing = node_name(plan.chain[-2]) if plan.target.backing else None
        disk = machine.require_disk(plan.disk)
        options = layer_options(plan.target, disk, backing=backing, read_only=False)
    return [
        ("blockdev-add", options),
        jobs.mirror_arguments(
            job,
            source=node_name(plan.chain[-1]),
            root=root,
            target=node,
            shallow=plan.shallow,
            write_blocking=plan.write_blocking,
        ),
    ]


async def run(
    context: Context, machine: Machine, qemu: Monitor | None, operation: Operation, *, report: Report = unreported
) -> None:
    """Carry out a mirror and settle it.

    Raises:
        QmpsnapError: something failed; the caller finds out what became of it.
    """
    plan = operation.plan
    assert isinstance(plan, MirrorPlan)
    async with merge.monitor_for(context, machine, qemu, plan) as monitor:
        identity = await _make(context, machine, operation.id, plan)
        job = job_id(operation.id, plan.disk)
        root = await root_of(monitor, plan)
        (_, options), (start, arguments) = qmp_commands(plan, machine, job, root=root)
        try:
            await commands.blockdev_add(monitor, options)
            await _require_size(monitor, plan)
            words = wording(identity)("started")
            await blocking(lambda: context.store.mark(operation.id, "running", step=words))
            await monitor.execute(start, arguments)
        except QmpError as error:
            if 'Failed to get "' not in error.message:
                raise
            raise StateError(
                f"{plan.target.path} is open in another process; nothing was changed",
                hint="end that process, or choose another target",
            ) from error
        await carry_on(context, machine, monitor, operation.id, plan, identity=identity, report=report)
    await tidy(context, operation.id, plan, identity=identity)


async def root_of(monitor: Monitor, plan: MirrorPlan) -> NodeName | None:
    """The topmost filter between the device and its chain, None where there is none."""
    known = frozenset(layer.id for layer in plan.chain)
    found = graph.by_disk(await graph.read(monitor), known).get(plan.disk)
    return NodeName(found.above[0]) if found and found.above else None


async def carry_on(
    context: Context,
    machine: Machine,
    monitor: Monitor,
    operation: OperationId,
    plan: MirrorPlan,
    *,
    identity: Identity,
    report: Report = unreported,
) -> None:
    """Take a job that exists, in whatever state, to its end; also where another process of ours started it."""
    job = job_id(operation, plan.disk)
    info = await jobs.follow_mirror(monitor, job, "ready", "pending", report=report)
    was_running = False
    if info.status == "ready":
        await (jobs.complete if plan.mode == "pivot" else jobs.detach)(monitor, job)
        info, was_running = await _pending(context, monitor, operation, plan, identity=identity, report=report)
    with anyio.CancelScope(shield=True):  # past this point there is only forward, and it takes milliseconds
        try:
            with anyio.fail_after(merge.FINALIZE_DEADLINE):
                await _go_over(context, machine, monitor, operation, plan, identity=identity, info=info)
        finally:
            if was_running:
                await commands.control(monitor, "cont")
    report(replace(info, status="concluded"))


async def _pending(
    context: Context, monitor: Monitor, operation: OperationId, plan: MirrorPlan, *, identity: Identity, report: Report
) -> tuple[JobInfo, bool]:
    """Wait until both sides are equal; a guest that writes without end is stopped for it: True then."""
    job = job_id(operation, plan.disk)
    with anyio.move_on_after(HOLD_AFTER):
        return await jobs.follow(monitor, job, "pending", report=report), False
    running = plan.live and (await commands.query_status(monitor)).running
    if running:
        words = f"{wording(identity)('started')}:running"
        await blocking(lambda: context.store.mark(operation, "running", step=words))
        await commands.control(monitor, "stop")
    try:
        with anyio.fail_after(merge.FINALIZE_DEADLINE):
            return await jobs.follow(monitor, job, "pending", report=report), running
    except BaseException:
        if running:
            with anyio.move_on_after(5, shield=True):
                await commands.control(monitor, "cont")
        raise


async def _go_over(
    context: Context,
    machine: Machine,
    monitor: Monitor,
    operation: OperationId,
    plan: MirrorPlan,
    *,
    identity: Identity,
    info: JobInfo,
) -> None:
    job = job_id(operation, plan.disk)
    await finalize.go_over(
        context,
        monitor,
        operation,
        job,
        live=plan.live,
        pending=info.status == "pending",
        step=wording(identity),
        settle=lambda: settle(context, machine, monitor, operation, plan, identity=identity),
    )
    await jobs.dismiss(monitor, job)
    await merge.close_nodes(monitor, gone(plan))


async def settle(
    context: Context,
    machine: Machine,
    monitor: Monitor | None,
    operation: OperationId,
    plan: MirrorPlan,
    *,
    identity: Identity,
) -> None:
    """Verify that the graph is what the plan says, then record it.

    Raises:
        StoreMismatch: it is not; the operation stays open.
    """
    if monitor is not None:
        await _verify(monitor, machine, plan)
    change = Change()
    if plan.mode == "pivot":
        device, inode = identity
        change = replace(plan.change, layers=(replace(plan.target, device=device, inode=inode),))
        await place.make_durable(plan.target.path, identity)
    words = wording(identity)("settled")
    await blocking(lambda: context.store.settle(operation, machine.name, change, step=words))


async def tidy(context: Context, operation: OperationId, plan: MirrorPlan, *, identity: Identity) -> None:
    """See that a finished copy, closed by now, is on the disk; remove what nobody needs; end the operation."""
    if plan.mode == "finish" and not plan.nbd:
        await place.make_durable(plan.target.path, identity)
    await merge.remove_files(plan.removed)
    await blocking(lambda: context.store.mark(operation, "settled", step="settled"))


async def _verify(monitor: Monitor, machine: Machine, plan: MirrorPlan) -> None:
    wanted = tuple(layer.id for layer in (expected(plan) if plan.mode == "pivot" else plan.chain))
    known = frozenset(layer.id for layer in (*plan.chain, plan.target))
    found = graph.by_disk(await graph.read(monitor), known).get(plan.disk)
    if found is None or found.nodes != wanted:
        raise StoreMismatch(
            f"after the job, QEMU's chain of disk {plan.disk} is {' <- '.join(found.nodes) if found else 'empty'},"
            f" expected {' <- '.join(wanted)}",
            hint=f"qmpsnap chain {machine.name} {plan.disk} shows both sides",
            effect="unknown",
            machine=machine.name,
        )


async def _make(context: Context, machine: Machine, operation: OperationId, plan: MirrorPlan) -> Identity:
    """Make the target's file, if it is ours to make; its identity is durable before it gets its name."""
    target = plan.target
    identity = (target.device, target.inode)
    if plan.made:
        part = part_of(machine, operation, plan)
        if target.backing:
            backing, size = plan.chain[-2], target.virtual_size
            made = await context.image.create_overlay(part, backing=backing, virtual_size=size)
        else:
            made = await context.image.create_base(part, format=target.format, virtual_size=target.virtual_size)
        identity = (made.device, made.inode)
    words = wording(identity)("made")
    await blocking(lambda: context.store.mark(operation, "running", step=words))
    if plan.made:
        await place.put(part, target.path)
    return identity


def part_of(machine: Machine, operation: OperationId, plan: MirrorPlan) -> str:
    """Where the target is made; the tag is this operation's alone, in whatever store."""
    return place.part_of(plan.target.path, f"{machine.uuid[:8]}-{operation}")


async def _require_size(monitor: Monitor, plan: MirrorPlan) -> None:
    """Only now is it known how large an export is; QEMU mirrors onto nothing that is larger or smaller."""
    name, wanted = node_name(plan.target), plan.target.virtual_size
    size = next((node.image.virtual_size for node in await commands.query_nodes(monitor) if node.node_name == name), 0)
    if size != wanted:
        raise ImageRefused(
            f"{plan.target.path} has {size} bytes, disk {plan.disk} has {wanted}; nothing was changed",
            hint="a mirror's target is exactly as large as the disk",
        )
