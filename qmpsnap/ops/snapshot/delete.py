"""``snapshot delete``: removes the names, then the layers that nothing needs any more, moving few bytes."""

from collections.abc import Collection, Sequence

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import StateError, StoreMismatch, UsageError
from qmpsnap.hint import call, option
from qmpsnap.host.threads import to_read
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Snapshot, require_snapshot
from qmpsnap.model.names import LayerId, job_id, layer_disk
from qmpsnap.model.operations.by import DeleteBy
from qmpsnap.model.operations.flatten import Clone, FlattenPlan
from qmpsnap.model.operations.operation import Change, Merge, MergePlan, Removal
from qmpsnap.model.planning import merging as rules
from qmpsnap.model.planning.merging import DiskReduction
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base import volumes
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.merge import flatten, job
from qmpsnap.ops.merge.commit import carry_out
from qmpsnap.ops.merge.preflight import require_possible
from qmpsnap.ops.session.planning_state import look, require_space
from qmpsnap.ops.session.session import inputs, looking, working
from qmpsnap.qmp import human
from qmpsnap.qmp.jobs import Report, unreported


class DeleteRequest(Struct, frozen=True, kw_only=True):
    """Which snapshots to delete, and whether those that grew from them.

    ``metadata``: only the names and state files; the layers stay as they are and are shown as unreferenced.
    ``bandwidth``: bytes per second that each job copies at most; 0 is without limit. ``by``: the command that deletes
    snapshots inside images; ``delvm`` deletes them from all images at once. ``flatten``: clones of the machine's that
    depend on what is deleted get a copy of it first; without it they refuse that.
    """

    names: tuple[str, ...]
    children: bool = False
    metadata: bool = False
    bandwidth: int = 0
    flatten: bool = False
    by: DeleteBy = "blockdev-snapshot-delete-internal-sync"


class DeletePlan(Struct, frozen=True):
    """The plan and, for people, what it was chosen from.

    Attributes:
        names: the snapshots that go.
        reductions: the ways there are, per run of layers, the chosen one first.
        kept: layers that stay, hidden, because others read them.
        flattened: clones in a Ceph cluster that are to depend on these snapshots no more, before all else.
    """

    names: tuple[str, ...]
    reductions: tuple[DiskReduction, ...]
    kept: tuple[Layer, ...]
    plan: MergePlan
    flattened: tuple[Clone, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes to move, at most."""
        merged = sum(step.moves for step in self.plan.steps if isinstance(step, Merge))
        return merged + sum(clone.moves for clone in self.flattened)


def plan(at: Situation, request: DeleteRequest) -> DeletePlan:
    """What will be done; pure."""
    chosen = _choose(at, request)
    _require_by(at, chosen, request)
    names = tuple(snapshot.name for snapshot in chosen)
    points = _points(chosen)
    hidden = [layer for layer in points if layer in at.forest.layers]
    after_names = at.after(Change(removed_snapshots=names))
    if not request.metadata:
        hidden += [layer.id for layer in after_names.forest.layers.values() if _is_left(at, after_names, layer)]
        # What an earlier delete has left of a disk that is unplugged waits for a later one.
        hidden = [layer for layer in hidden if layer in points or layer_disk(layer) not in at.unplugged]
    candidates = [layer for layer in dict.fromkeys(hidden) if not after_names.forest.references_to(layer)]
    marked = tuple(
        replace(at.forest.layer(layer), state="hidden")
        for layer in candidates
        if not after_names.forest.writers_of(layer)
    )
    opening = Change(layers=marked, removed_snapshots=names)
    reductions = () if request.metadata else rules.reduce(at.after(opening), candidates)
    reduced = {layer for reduction in reductions for layer in reduction.layers}
    removed = {layer.id for reduction in reductions for step in reduction.steps for layer in step.removed}
    steps = tuple(step for reduction in reductions for step in reduction.steps)
    removed_with = None if request.metadata else {layer.id for step in steps for layer in step.removed}
    kept = tuple(replace(removal, by=request.by) for removal in _kept(at, chosen, removed_with))
    _require_attached(at, (*kept, *steps))
    return DeletePlan(
        names,
        reductions,
        tuple(layer for layer in marked if layer.id not in reduced | removed),
        MergePlan(
            verb="delete",
            machine=at.machine,
            opening=opening,
            # Gone is gone: what is left after a failure is a hidden layer, which the next delete takes along.
            undo=Change(),
            steps=(*kept, *steps),
            bandwidth=request.bandwidth,
        ),
    )


async def preview(
    context: Context, name: str, request: DeleteRequest
) -> tuple[DeletePlan, list[tuple[str, dict[str, object]]]]:
    """The plan that :func:`run` would follow now and the commands that start its jobs; locks and changes nothing."""
    async with looking(context, name, removes=not request.metadata) as session:
        at, made = await _plan(session, request)
        serial = (await inputs(session, at.basis)).serial
        commands = []
        for step in made.plan.steps:
            if isinstance(step, Removal) and step.by == "delvm":
                commands += [human.command(f"delvm {tag}") for tag in dict.fromkeys(tag for *_, tag in step.tags)]
            if isinstance(step, Merge):
                root = await job.root_of(session.qemu, step) if session.qemu and step.live else None
                limit = made.plan.bandwidth
                command, arguments = job.start_command(job_id(serial, step.disk), step, root=root, limit=limit)
                commands.append((command, session.machine.sent(arguments)))
        return made, commands


async def run(context: Context, name: str, request: DeleteRequest, *, report: Report = unreported) -> DeletePlan:
    """Delete; returns what was done. Where one is not there nothing is.

    When a job fails the snapshots are gone, and their layers stay hidden until the next delete.
    """
    async with working(context, name, "snapshot delete", removes=not request.metadata) as session:
        at, made = await _plan(session, request)
        if flattened := made.flattened:
            first = FlattenPlan(machine=name, clones=flattened)
            await flatten.carry_out(session, at.basis, first, report=report)
            at, made = await _plan(session, request)
        await carry_out(session, at.basis, made.plan, report=report)
        return replace(made, flattened=flattened)


async def _plan(session: MachineSession, request: DeleteRequest) -> tuple[Situation, DeletePlan]:
    at = await look(session, disks=())
    made = plan(at, request)
    await to_read(require_space, at, made.plan.steps, session.context.home.data)
    clones = await _clones(session, at, made)
    if request.flatten:
        made = replace(made, flattened=await flatten.clones_of(clones))
    try:
        await require_possible(session, at, made.plan.steps, flattened=clones if request.flatten else ())
    except StateError as error:
        if clones and not request.flatten:
            error.hint = "let these have a copy of what they read of it with " + option("flatten")
        raise
    return at, made


async def _clones(session: MachineSession, at: Situation, made: DeletePlan) -> list[Layer]:
    """The machine's own clones that depend on what is to go."""
    own = [layer for layer in at.forest.layers.values() if volumes.is_clone_of(layer, session.machine)]
    return await volumes.clones_of([layer for step in made.plan.steps for layer in step.removed], own)


def _require_by(at: Situation, chosen: Sequence[Snapshot], request: DeleteRequest) -> None:
    """Refuse what ``delvm`` would not delete: it knows of snapshots inside the images that the guest writes to."""
    if request.by != "delvm":
        return
    active = {chain.active.id for chain in at.live.values()} if at.running else set()
    for snapshot in chosen:
        if request.metadata or any(point.tag is None or point.layer not in active for point in snapshot.points):
            raise StateError(
                f"delvm cannot delete snapshot {snapshot.name} of machine {at.machine}: only a running QEMU can, and of"
                " the snapshots that are inside the layers its guest writes to",
                hint="omit " + option("by", request.by),
                machine=at.machine,
            )


def _require_attached(at: Situation, steps: Sequence[Merge | Removal]) -> None:
    """Refuse what would merge, remove or write to layers of a disk that QEMU has no device for."""
    touched = {step.disk for step in steps} | {
        tag[0] for step in steps if isinstance(step, Removal) for tag in step.tags
    }
    if gone := sorted(touched & at.unplugged):
        raise StoreMismatch(
            f"disk {', '.join(gone)} of machine {at.machine} was unplugged, but its layers would be merged or removed",
            hint="attach it again (device_add), or stop the machine: " + call("stop", at.machine),
            machine=at.machine,
        )


def _choose(at: Situation, request: DeleteRequest) -> list[Snapshot]:
    if not request.names:
        raise UsageError("no snapshot to delete is named", hint=call("snapshots", at.machine) + " lists them")
    for name in request.names:
        require_snapshot(at.snapshots, name, machine=at.machine)
    wanted = set(request.names)
    if request.children:
        for snapshot in at.snapshots:  # oldest first: a parent comes before what grew from it
            if snapshot.parent in wanted:
                wanted.add(snapshot.name)
    return [snapshot for snapshot in at.snapshots if snapshot.name in wanted]


def _kept(at: Situation, chosen: Sequence[Snapshot], removed: Collection[LayerId] | None) -> tuple[Removal, ...]:
    """What goes first: state files, copies of variable stores, tags inside images that stay.

    ``removed`` are the layers that go; None leaves the layers alone, tags and all.
    """
    points = [
        point
        for snapshot in chosen
        for point in snapshot.points
        if removed is not None and point.tag and point.layer not in removed
    ]
    for point in points:
        if strangers := sorted(at.forest.machines_above(point.layer) - {at.machine}):
            raise StateError(
                f"layer {point.layer} holds an internal snapshot and is read by machine {', '.join(strangers)}: it"
                " cannot be changed",
                hint="delete only the name with " + option("metadata"),
                machine=at.machine,
            )
        live = at.live.get(point.disk)
        if at.running and live and point.layer in live.ids and point.layer != live.active.id:
            raise StateError(
                f"layer {point.layer} holds an internal snapshot and is below the active layer of machine {at.machine}:"
                " QEMU can only read it",
                hint="stop the machine: "
                + call("stop", at.machine)
                + "; or delete only the name with "
                + option("metadata"),
                machine=at.machine,
            )
    removal = Removal(
        disk="",
        removed=(),
        change=Change(),
        states=tuple(snapshot.vmstate for snapshot in chosen if snapshot.vmstate),
        variables=tuple(snapshot.variables for snapshot in chosen if snapshot.variables),
        tags=tuple((point.disk, point.layer, point.tag) for point in points if point.tag),
    )
    return (removal,) if removal.states or removal.variables or removal.tags else ()


def _points(snapshots: Sequence[Snapshot]) -> list[LayerId]:
    return [point.layer for snapshot in snapshots for point in snapshot.points]


def _is_left(at: Situation, after_names: Situation, layer: Layer) -> bool:
    """Whether qmpsnap keeps a layer only for other readers or needs it no more, like one without a snapshot."""
    return layer.id in at.bytes and (layer.state == "hidden" or not after_names.forest.machines_above(layer.id))
