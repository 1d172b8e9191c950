"""Running merges: one block job after the other, each journalled so that a death at any point has one right end.

Per job: ``N:started`` (it may have written) -> ready, complete -> pending -> vCPUs stopped, all caches written out ->
``N:finalizing`` (both sides are equal; from here the result is the truth) -> finalize, graph verified -> ``N:settled``
with the change, in one SQL transaction -> vCPUs go on -> job dismissed, nodes closed, files removed.
"""

import contextlib
import functools
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from anyio import lowlevel
from msgspec.structs import replace

from qmpsnap.block import graph
from qmpsnap.block.image.backing import require_backing, set_backing
from qmpsnap.block.image.create import remove
from qmpsnap.block.image.staged import require_folder
from qmpsnap.errors import OperationPending, QmpError, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host.threads import to_end
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.open_files import require_recorded
from qmpsnap.model.layers.blockdev import layer_options, node_name
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import JobId, NodeName
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Merge, MergePlan, Operation, Removal
from qmpsnap.model.planning import sharing
from qmpsnap.ops.base import luks, volumes
from qmpsnap.ops.base.async_store import blocking
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.internal import tags
from qmpsnap.ops.jobs import beginning, cutover
from qmpsnap.ops.jobs.blockjob import BlockJob, qemu_for
from qmpsnap.ops.outside import layer_changes
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.jobs import Report, unreported
from qmpsnap.qmp.session import Monitor


class MergeJob(BlockJob, frozen=True, kw_only=True):
    """The job of one step of a plan, which is the ``number``-th there; started with the plan's ``bandwidth``."""

    step: Merge
    number: int
    bandwidth: int = 0

    def words(self, phase: str, *, running: bool = False) -> str:
        """As :func:`steps.of_job`."""
        return steps.of_job(self.number, phase, running=running)

    @property
    def moves_guest(self) -> bool:
        """Whether it is a commit of the active layer."""
        return self.step.kind == "commit" and self.step.top.id == self.step.chain[-1].id

    @property
    def is_mirror(self) -> bool:
        """As :attr:`moves_guest`."""
        return self.moves_guest

    async def require_files(self) -> None:
        """See :class:`BlockJob`; for the whole chain."""
        await to_end(functools.partial(require_recorded, self.step.chain, machine=self.machine.name))

    async def take_back(self, monitor: Monitor) -> None:
        """Give the layer whose header could not be written its old backing again, which reads the same."""
        step = self.step
        layer = step.into if step.kind == "stream" else _above(step)
        found = await _place(monitor, step, layer) if layer else None
        below = next((node_name(lower) for lower in step.chain if layer and lower.id == layer.backing), None)
        if layer and layer.owned and _reopens(self.machine, layer) and found and found.below != below:
            # QEMU 7.2 must not be asked how it is open: with a stream that is not dismissed that question ends it.
            read_only = not found.active and layer != step.into  # which the job keeps open for writing from 10.0 on
            await _reopen(monitor, self.machine, step, layer, below=below, read_only=read_only)
        await self.require_chain(monitor, step.chain, known=step.chain)

    @property
    def result(self) -> Layer:
        """The layer that is merged into."""
        return self.step.into

    async def carry_on(self, monitor: Monitor) -> None:
        """See :class:`BlockJob`."""
        info = await jobs.follow(monitor, self.id, "ready", "pending", report=self.report)
        if info.status == "ready":
            await jobs.hurry(monitor, self.id)
        async with cutover.watched(self, monitor):
            async with cutover.held_first(self, monitor) as held:
                if info.status == "ready":
                    await jobs.complete(monitor, self.id)
                    with cutover.in_time(self) if held else contextlib.nullcontext():
                        info = await jobs.follow(monitor, self.id, "pending", report=self.report)
                await lowlevel.checkpoint_if_cancelled()  # the last chance to cancel it
            # Past this point there is only forward, and it takes milliseconds.
            with cutover.in_time(self, shield=True):
                await self.require_files()
                await require_flushed(monitor, self.machine, self.step)
                await cutover.go_over(self, monitor, held=held)
                await self.close(monitor)
        self.report(replace(info, status="concluded"))

    async def settle(self, monitor: Monitor | None, *, running: bool = False) -> None:
        """See :class:`BlockJob`: QEMU has rewritten the header of its own chain, the others are rewritten here."""
        step = self.step
        rebased = [(layer, step.into) for layer in step.rebased]
        if monitor:
            gone = _gone(step)
            await self.require_chain(monitor, (layer for layer in step.chain if layer not in gone), known=step.chain)
            await _require_header(self)
            await _rewrite(self, rebased)
        elif step.kind == "commit":
            above = [(layer, step.into)] if (layer := _above(step)) else []
            await _rewrite(self, [*above, *rebased])
        else:
            await _rewrite(self, [(step.into, step.base)])
        await self.record(step.change, running=running)

    async def close(self, monitor: Monitor) -> None:
        """See :class:`BlockJob`: QEMU keeps nodes that left the chain; the next snapshot would find them busy."""
        await jobs.dismiss(monitor, self.id)
        await close_nodes(monitor, _gone(self.step), machine=self.machine)
        await freeze_again(monitor, self.machine, self.step)

    async def let_go(self, monitor: Monitor) -> None:
        """See :class:`BlockJob`."""
        await jobs.cancel(monitor, self.id)
        await freeze_again(monitor, self.machine, self.step)


async def run(
    session: MachineSession, operation: Operation[MergePlan], *, first: int = 0, report: Report = unreported
) -> None:
    """Carry out a plan's steps from number ``first`` on and settle the operation.

    Raises:
        QmpsnapError: a job failed, was refused or lost; the caller finds out what became of it.
    """
    plan, context, machine = operation.plan, session.context, session.machine
    for number, step in enumerate(plan.steps[first:], start=first):
        if isinstance(step, Removal):
            settled = steps.of_job(number, steps.SETTLED)
            await context.astore.settle(operation.id, machine.name, step.change, step=settled)
            await remove_kept(session, step)
        else:
            job = MergeJob(
                context=context,
                machine=machine,
                operation=operation.id,
                step=step,
                number=number,
                bandwidth=plan.bandwidth,
                report=report,
            )
            async with qemu_for(job, session.qemu) as monitor:
                await _start(job, monitor)
                await job.carry_on(monitor)
        await remove_files(context, step.removed)
    await context.astore.mark(operation.id, "settled", step=steps.SETTLED)


async def _start(job: MergeJob, monitor: Monitor) -> None:
    root = await root_of(monitor, job.step)
    command = start_command(job.id, job.step, root=root, limit=job.bandwidth)
    await job.require_files()
    written = sharing.rewritten(job.step)
    await blocking(layer_changes.require_unwritten, job.context.store, written, job.machine.name)
    state, ids = await to_end(state_of, job.step.into.path), [layer.id for layer in written]

    async def mark(*, running: bool) -> None:
        words = steps.of_job(job.number, steps.STARTED, running=running, state=state)
        await job.context.astore.mark(job.operation, "running", step=words, writes=ids)

    await beginning.start(job, monitor, command, mark=mark)


def state_of(path: str) -> tuple[int, ...]:
    """What is another once a file was written to: ``st_mtime_ns``, ``st_ctime_ns`` and ``st_size``.

    No clock is asked: ours and a file server's differ, and both can be set back. Empty where there is no such file, or
    a block device, whose node does not tell.
    """
    try:
        status = Path(path).lstat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else ()


async def _require_header(job: MergeJob) -> None:
    """The next QEMU goes by the header: layers that it names must not go."""
    step = job.step
    layer, backing = (step.into, step.base) if step.kind == "stream" else (_above(step), step.into)
    if layer is None:
        return
    try:
        await require_backing(layer, backing)
    except StoreMismatch as error:
        name = job.machine.name
        raise OperationPending(
            error.message,
            hint=call("stop", name) + ", then " + call("recover", name) + ", which corrects the header",
            effect="unknown",
            machine=name,
        ) from error


async def _rewrite(job: MergeJob, pairs: Sequence[tuple[Layer, Layer | None]]) -> None:
    """Let each first layer's header name the second as its backing."""
    if not pairs:
        return
    disk = job.machine.require_layers_of(job.step.disk)
    async with luks.for_images(job.context, job.machine.name, disk) as key:
        for layer, backing in pairs:
            await set_backing(layer, backing, qemu_img=job.context.image.binary, key=key)


async def remove_files(context: Context, layers: Sequence[Layer]) -> None:
    """Remove files of layers that the store has forgotten; gone already is fine, another file is left alone.

    Raises:
        HostCannot: their folder is not there, as of a file system that is not mounted: with it they would come back.
    """
    sizes = await blocking(layer_changes.sizes, context.store, [layer.id for layer in layers])
    for layer in volumes.latest_first(layers):
        if layer.owned:
            await volumes.remove(layer, size=sizes.get(layer.id))


async def remove_kept(session: MachineSession, removal: Removal) -> None:
    """Remove what was kept for snapshots that are gone, beside and inside the images; fine when that is gone, too.

    A file that somebody has put in a state file's place is left alone.

    Raises:
        HostCannot: a folder is not there, as of a file system that is not mounted.
    """
    for path in (*(state.path for state in removal.states), *removal.variables):
        await to_end(require_folder, path)
    for state in removal.states:
        with contextlib.suppress(StoreMismatch):
            await remove(state.path, device=state.device, inode=state.inode, birth=state.birth)
    for path in removal.variables:
        await to_end(firmware_files.forget_variables, path)
    if removal.by == "delvm" and session.qemu:
        await tags.delete_everywhere(session.qemu, [tag for *_, tag in removal.tags])
    for disk, layer, tag in removal.tags:
        await tags.remove_tag(session.context, session.machine, session.qemu, disk=disk, layer=layer, tag=tag)


async def close_nodes(monitor: Monitor, layers: Iterable[Layer], *, machine: Machine) -> None:
    """Close the nodes of these layers, given top first, where QEMU has them."""
    theirs = machine.adopted.nodes if machine.adopted else {}
    for layer in layers:
        # Asked each time: a node that QEMU opened by itself, for somebody else's -drive, goes with the one above it.
        if (name := node_name(layer)) in graph.node_names(await graph.read(monitor)):
            try:
                await commands.blockdev_del(monitor, name)
            except QmpError:
                if (
                    layer.owned and layer.id not in theirs
                ):  # else the owner of QEMU may use this node for something else
                    raise


async def root_of(monitor: Monitor, step: Merge) -> NodeName:
    """The node that the device reads: a filter on top of the chain, where there is one, else the root itself."""
    known = frozenset(layer.id for layer in step.chain)
    found = graph.by_disk(await graph.read(monitor), known).get(step.disk)
    return NodeName(found.above[0] if found and found.nodes and found.above else step.root)


async def require_flushed(monitor: Monitor, machine: Machine, step: Merge) -> None:
    """Write the layer that was written to out, and hear of it when that fails: ``stop`` does it, too, but never tells.

    Raises:
        QmpError: it cannot be written out; what it has taken over must not count.
    """
    if _reopens(machine, step.into) and (found := await _place(monitor, step, step.into)):
        await _reopen(monitor, machine, step, step.into, below=found.below, read_only=False)


async def freeze_again(monitor: Monitor, machine: Machine, step: Merge) -> None:
    """Open the layer that was written to read-only again, where the guest does not write to it.

    QEMU leaves it writable when a commit of the active layer is cancelled and, from 10.0 on, after a stream.
    """
    found = await _place(monitor, step, step.into)
    if found is None or found.active or not _reopens(machine, step.into):
        return
    if not await is_frozen(monitor, step):
        await _reopen(monitor, machine, step, step.into, below=found.below, read_only=True)


async def is_frozen(monitor: Monitor, step: Merge) -> bool:
    """Whether QEMU does not have the layer that was written to open for writing: all that it knows is in the file."""
    return all(node.ro for node in await commands.query_nodes(monitor) if node.node_name == node_name(step.into))


def _reopens(machine: Machine, layer: Layer) -> bool:
    """Whether QEMU can open a layer's node anew, all options of which must be known.

    That is so of its own, and of those of an owner whose images are ours, if he has named them: QEMU refuses
    ``blockdev-reopen`` of a name that it has made itself, as for ``-drive``.
    """
    if machine.adopted is None or layer.id not in machine.adopted.nodes:
        return True
    return layer.owned and not machine.adopted.nodes[layer.id].startswith("#")


class _Place(NamedTuple):
    """Where a layer is in QEMU's chain: the node below it, None at the bottom; on top it is the active one."""

    below: NodeName | None
    active: bool


async def _place(monitor: Monitor, step: Merge, layer: Layer) -> _Place | None:
    """None where it is not in the chain."""
    found = graph.by_disk(await graph.read(monitor), frozenset(layer.id for layer in step.chain)).get(step.disk)
    if found is None or node_name(layer) not in found.nodes:
        return None
    at = found.nodes.index(node_name(layer))
    return _Place(NodeName(found.nodes[at - 1]) if at else None, at == len(found.nodes) - 1)


async def _reopen(
    monitor: Monitor, machine: Machine, step: Merge, layer: Layer, *, below: NodeName | None, read_only: bool
) -> None:
    options = layer_options(layer, machine.require_layers_of(step.disk), backing=below, read_only=read_only)
    file: str | None = f"{node_name(layer)}.file"
    if machine.adopted and layer.id in machine.adopted.nodes:  # its owner names his nodes as he likes
        file = graph.child(await graph.read(monitor), node_name(layer), "file")
    await commands.blockdev_reopen(monitor, options | {"file": file})


def start_command(
    job: JobId, step: Merge, *, root: NodeName | None = None, limit: int = 0
) -> tuple[str, dict[str, object]]:
    """The QMP command that starts a step's job, which copies ``limit`` bytes per second, 0 without limit; pure."""
    speed = {"speed": limit} if limit else {}
    if step.kind == "commit":
        command, arguments = jobs.commit_arguments(
            job,
            root=NodeName(step.root),
            top=node_name(step.top),
            base=node_name(step.into),
            base_path=step.into.path,
        )
        return command, arguments | ({"device": root} if root else {}) | speed
    command, arguments = jobs.stream_arguments(
        job,
        into=node_name(step.into),
        base=node_name(step.base) if step.base else None,
        base_path=step.base.path if step.base else None,
    )
    return command, arguments | speed


def rewritten(step: Merge) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Layers whose headers a step makes name another backing: those in the job's QEMU, and those that we rewrite."""
    above = _above(step) if step.kind == "commit" else None
    return ((above,) if above else ()), step.rebased


def _above(step: Merge) -> Layer | None:
    """The layer in the job's chain whose backing a commit replaces; None where the active layer is committed."""
    return next((layer for layer in step.chain if layer.backing == step.top.id), None)


def _gone(step: Merge) -> tuple[Layer, ...]:
    """The layers that leave the chain the job runs in, top first: each is the other's reader."""
    ids = [layer.id for layer in step.chain]
    if step.kind == "commit":
        low, high = ids.index(step.into.id) + 1, ids.index(step.top.id) + 1
    else:
        low, high = (ids.index(step.base.id) + 1 if step.base else 0), ids.index(step.into.id)
    return tuple(reversed(step.chain[low:high]))
