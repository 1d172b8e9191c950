"""Running a mirror: the target made, the job followed, its end made the truth; a death at any point has one right end.

``planned`` -> file made beside its place -> ``made:<device>:<inode>`` -> it gets its name, QEMU opens it ->
``started:...`` -> ready -> told to go over (pivot) or to let go (finish) -> pending: both sides are equal and written
out -> ``finalizing:...`` -> finalize, graph verified -> ``settled:...`` with the change -> dismissed,
nodes closed, files that nobody needs removed. A finished copy is the user's: the store does not have it.
"""

from functools import partial

import anyio
from anyio import lowlevel
from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.image import staged
from qmpsnap.errors import ImageRefused, QmpError, StateError
from qmpsnap.hint import option
from qmpsnap.host.files import FileId
from qmpsnap.host.threads import completed, to_read
from qmpsnap.machine import worker
from qmpsnap.machine.open_files import require_opened, require_recorded
from qmpsnap.model.layers.blockdev import layer_options, node_name
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import JobId, NodeName
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Change, MirrorPlan, Operation
from qmpsnap.ops.base import admission, luks
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.jobs import beginning, cutover
from qmpsnap.ops.jobs.blockjob import BlockJob, qemu_for
from qmpsnap.ops.merge import job as merge
from qmpsnap.ops.session import file_nodes
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
    identity: FileId = FileId(0, 0)
    running: bool = False

    @classmethod
    def read(cls, step: str) -> "Phase":
        """The phase of a journalled step."""
        name, *rest = step.split(":")
        if len(rest) < 2:  # noqa: PLR2004 - device and inode
            return cls(name)
        birth = int(rest[rest.index("born") + 1]) if "born" in rest else 0
        return cls(name, FileId(int(rest[0]), int(rest[1]), birth), "running" in rest)

    @property
    def words(self) -> str:
        """What :meth:`read` reads."""
        file = self.identity
        return steps.of_file(self.name, file.device, file.inode, birth=file.birth, running=self.running)


class MirrorJob(BlockJob, frozen=True, kw_only=True):
    """The job of a mirror; ``identity`` is that of the target's file, all 0 where there is none (yet)."""

    step: MirrorPlan
    identity: FileId

    def words(self, phase: str, *, running: bool = False) -> str:
        """As :attr:`Phase.words`."""
        return Phase(phase, self.identity, running).words

    @property
    def moves_guest(self) -> bool:
        """Whether it is a pivot."""
        return self.step.mode == "pivot"

    @property
    def is_mirror(self) -> bool:
        """Always."""
        return True

    async def take_back(self, monitor: Monitor) -> None:
        """Nothing: QEMU replaces the layer as a whole or not at all."""
        await self.require_chain(monitor, self.step.chain, known=(*self.step.chain, self.step.target))

    @property
    def result(self) -> Layer:
        """The copy."""
        return self.step.target

    async def carry_on(self, monitor: Monitor) -> None:
        """See :class:`BlockJob`."""
        info = await jobs.follow_mirror(monitor, self.id, "ready", "pending", report=self.report)
        if info.status == "ready":
            await jobs.hurry(monitor, self.id)
        async with cutover.watched(self, monitor):
            await _go_over(self, monitor, info)

    async def settle(self, monitor: Monitor | None, *, running: bool = False) -> None:
        """See :class:`BlockJob`; a finished copy is not recorded."""
        plan, change = self.step, Change()
        if monitor:
            wanted = expected(plan) if plan.mode == "pivot" else plan.chain
            await self.require_chain(monitor, wanted, known=(*plan.chain, plan.target))
            if plan.by == "drive-mirror" and plan.live and plan.mode == "pivot":
                await file_nodes.note(self.context, self.machine, monitor, [plan.target])
        if plan.mode == "pivot":
            await staged.make_durable(plan.target.path, self.identity)
            change = replace(plan.change, layers=(_identified(self),))
        await self.record(change, running=running)

    async def close(self, monitor: Monitor) -> None:
        """See :class:`BlockJob`."""
        await jobs.dismiss(monitor, self.id)
        await merge.close_nodes(monitor, gone(self.step), machine=self.machine)

    async def let_go(self, monitor: Monitor) -> None:
        """See :class:`BlockJob`."""
        await jobs.cancel(monitor, self.id)
        await merge.close_nodes(monitor, (self.step.target,), machine=self.machine)


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
    """The commands that open the target and start the job; pure."""
    node = node_name(plan.target)
    start, arguments = jobs.mirror_arguments(
        job,
        source=node_name(plan.chain[-1]),
        root=root,
        target=node,
        shallow=plan.shallow,
        write_blocking=plan.write_blocking,
        limit=plan.bandwidth,
    )
    if plan.by == "drive-mirror":
        path, kind = plan.target.path, plan.target.format
        return [jobs.drive_mirror(arguments, target=node, path=path, image_format=kind)]
    if plan.nbd:
        options = plan.nbd.options(node)
    else:
        backing = node_name(plan.chain[-2]) if plan.target.backing else None
        disk = machine.require_disk(plan.disk)
        options = layer_options(plan.target, disk, backing=backing, read_only=False)
    return [("blockdev-add", options), (start, arguments)]


async def run(session: MachineSession, operation: Operation[MirrorPlan], *, report: Report = unreported) -> None:
    """Carry out a mirror and settle it."""
    plan = operation.plan
    found = FileId(plan.target.device, plan.target.inode, plan.target.birth)
    job = MirrorJob(
        context=session.context,
        machine=session.machine,
        operation=operation.id,
        step=plan,
        identity=found,
        report=report,
    )
    async with qemu_for(job, session.qemu) as monitor:
        job = await _make(job)
        await _start(job, monitor)
        await job.carry_on(monitor)
    await tidy(job)


async def _make(job: MirrorJob) -> MirrorJob:
    """Make the target's file, if it is ours to make; its identity is durable before it gets its name."""
    plan = job.step
    target, part = plan.target, part_of(job)
    if plan.made:
        image, size = job.context.image, target.virtual_size
        async with luks.for_images(job.context, job.machine.name, job.machine.require_disk(plan.disk)) as key:
            if target.backing:
                made = await image.create_overlay(part, backing=plan.chain[-2], virtual_size=size, key=key)
            else:
                made = await image.create_base(part, format=target.format, virtual_size=size, key=key)
        await admission.new_files(job.context, job.machine, [part])
        job = replace(job, identity=FileId(made.device, made.inode, made.birth))
    await job.mark(steps.MADE)
    if plan.made:
        await staged.put(part, target.path, job.identity)
    return job


async def _start(job: MirrorJob, monitor: Monitor) -> None:
    """Let QEMU open the target and begin."""
    root = await root_of(monitor, job.step)
    require_no_filter(job.step, root)
    *opening, start = qmp_commands(job.step, job.machine, job.id, root=root)
    try:
        for _, options in opening:
            await commands.blockdev_add(monitor, options)
            await _require_size(monitor, job.step)
            await to_read(_require_target, job)
        if not opening and not job.step.nbd:
            await to_read(lambda: require_recorded([_identified(job)], machine=job.machine.name))
        await beginning.start(job, monitor, start, mark=partial(job.mark, steps.STARTED))
        if not opening:
            await _require_size(monitor, job.step)
            await to_read(_require_target, job)
    except QmpError as error:
        if 'Failed to get "' not in error.message:
            raise
        raise StateError(
            f"{job.step.target.path} is open in another process",
            hint="end that process, or choose another target",
        ) from error


async def root_of(monitor: Monitor, plan: MirrorPlan) -> NodeName | None:
    """The topmost filter between the device and its chain, None where there is none."""
    known = frozenset(layer.id for layer in plan.chain)
    found = graph.by_disk(await graph.read(monitor), known).get(plan.disk)
    return NodeName(found.above[0]) if found and found.above else None


def require_no_filter(plan: MirrorPlan, root: NodeName | None) -> None:
    """Refuse ``drive-mirror`` below a filter: QEMU would open the copy as that is open, not as the disk is."""
    if plan.by == "drive-mirror" and root:
        raise StateError(
            f"drive-mirror would open the copy of disk {plan.disk} with the settings of the filter {root} above it",
            hint="use " + option("by", "blockdev-mirror"),
            machine=plan.machine,
        )


async def _go_over(job: MirrorJob, monitor: Monitor, info: JobInfo) -> None:
    async with cutover.held_first(job, monitor) as first:
        held = first
        if info.status == "ready":
            await (jobs.complete if job.step.mode == "pivot" else jobs.detach)(monitor, job.id)
            info, held = await _pending(job, monitor, held=first)
    if not held:
        await lowlevel.checkpoint_if_cancelled()  # the last chance to cancel it
    # Past this point there is only forward, and it takes milliseconds.
    with cutover.in_time(job, shield=True):
        await cutover.go_over(job, monitor, held=held)
        await job.close(monitor)
    job.report(replace(info, status="concluded"))


async def _pending(job: MirrorJob, monitor: Monitor, *, held: bool) -> tuple[JobInfo, bool]:
    """Wait until both sides are equal; a guest that writes without end is held still for it: True then."""
    if held:
        with cutover.in_time(job):
            return await jobs.follow(monitor, job.id, "pending", report=job.report), True
    with anyio.move_on_after(HOLD_AFTER):
        return await jobs.follow(monitor, job.id, "pending", report=job.report), False
    running = job.step.live and (await commands.query_status(monitor)).live
    if running:
        await job.mark(steps.STARTED, running=True)
        await commands.control(monitor, "stop")
    try:
        with cutover.in_time(job):
            return await jobs.follow(monitor, job.id, "pending", report=job.report), running
    except BaseException:
        if running:
            await completed(commands.control(monitor, "cont"))
        raise


async def tidy(job: MirrorJob) -> None:
    """See that a finished copy, closed by now, is on the disk; remove what nobody needs; end the operation."""
    await write_out(job)
    await merge.remove_files(job.context, job.step.removed)
    await job.context.astore.mark(job.operation, "settled", step=steps.SETTLED)


async def write_out(job: MirrorJob) -> None:
    """See that a finished copy is on the disk."""
    if job.step.mode == "finish" and not job.step.nbd:
        await staged.make_durable(job.step.target.path, job.identity)


def part_of(job: MirrorJob) -> str:
    """Where the target is made; the tag is this operation's alone, in whatever store."""
    return staged.part_of(job.step.target.path, f"{job.machine.uuid[:8]}-{job.operation}")


def _require_target(job: MirrorJob) -> None:
    """Whatever was put at the target's name since it was looked at or made: only that file is written to."""
    context, machine, plan = job.context, job.machine, job.step
    if plan.nbd:
        return
    process = context.process(machine) if plan.live else worker.find(machine, context.home.run_dir(machine.name))
    require_opened(process, [_identified(job)], machine=machine.name)


def _identified(job: MirrorJob) -> Layer:
    file = job.identity
    return replace(job.step.target, device=file.device, inode=file.inode, birth=file.birth)


async def _require_size(monitor: Monitor, plan: MirrorPlan) -> None:
    """Only now is it known how large an export is; QEMU mirrors onto nothing that is larger or smaller."""
    name, wanted = node_name(plan.target), plan.target.virtual_size
    size = next((node.image.virtual_size for node in await commands.query_nodes(monitor) if node.node_name == name), 0)
    if size != wanted:
        raise ImageRefused(
            f"{plan.target.path} has {size} bytes, but disk {plan.disk} has {wanted}",
            hint="make the target exactly as large as the disk",
        )
