"""Which layers are merged, how many bytes that moves, what prevents it: pure rules for commit, stream, delete."""

from collections.abc import Collection, Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import StateError
from qmpsnap.hint import call
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change, Merge, Removal
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.model.planning.state import Situation


def consumed_by_commit(at: Situation, disk: str, chain: Chain, *, base: LayerId, top: LayerId) -> tuple[Snapshot, ...]:
    """The machine's snapshots that a commit makes unreadable.

    Their points are from ``base`` to below ``top``; points inside an image, by a tag, are above ``base`` up to ``top``:
    the base keeps its own tags, and the tags of a removed image are lost.
    """
    low, high = _span(chain, base, top)
    lost = _Lost(chain, low, high)
    return tuple(s for s in at.snapshots if s.state == "ok" and (p := s.point(disk)) and lost.point(p))


def commit(at: Situation, chain: Chain, *, base: LayerId, top: LayerId) -> Merge:
    """A commit of the layers above ``base`` up to ``top`` into ``base``, if nobody else reads what would change."""
    low, high = _span(chain, base, top)
    into, highest = chain.layers[low], chain.layers[high]
    if not into.writable and not (highest == chain.active and into == chain.shielded):
        raise StateError(
            f"layer {into.id} ({into.shown}) was not created by qmpsnap and is never written to",
            hint=call("stream", at.machine, chain.disk) + " merges upwards instead",
            machine=at.machine,
        )
    for layer, above in zip(chain.layers[low:high], chain.layers[low + 1 : high + 1], strict=True):
        _refuse_readers(at, chain.disk, layer, above)
    gone = chain.layers[low + 1 : high + 1]
    live = at.running and _in_live(at, chain.disk, highest.id)
    job_chain = at.live[chain.disk] if live else at.forest.chain(chain.disk, highest.id)
    readers = at.forest.children(top)
    _refuse_strangers(at, chain.disk, top, "whose images would have to change")
    rebased = tuple(child for child in readers if child.id not in job_chain.ids)
    _refuse_headers(at, chain.disk, top, readers)
    _refuse_busy(at, chain.disk, {*chain.ids[low : high + 1], *(child.id for child in readers)}, live=live)
    # What lies below ``top`` is overwritten, whatever the caller has marked already.
    lost = _Lost(chain, low, high)
    consumed = tuple(replace(s, state="consumed") if any(map(lost.point, s.points)) else s for s in at.snapshots)
    moved = _moved_points(consumed, {layer.id for layer in gone}, into.id)
    # From now on ``into`` is what ``top`` was: also hidden, if nobody had a name for that.
    state = "ok" if highest.state == "shield" else highest.state
    keeper = replace(into, virtual_size=max(into.virtual_size, highest.virtual_size), state=state)
    active = {w.disk: into.id for w in at.forest.writers_of(top) if w.machine == at.machine}
    return Merge(
        kind="commit",
        disk=chain.disk,
        into=into,
        top=highest,
        base=None,
        root=job_chain.active.id,
        live=live,
        chain=job_chain.layers,
        # The job that commits layers below the active one writes zeros like any data before QEMU 10.0.
        moves=at.moves(gone, into, zeros="none" if highest.id == job_chain.active.id else "all"),
        rebased=rebased,
        removed=_files(gone),
        change=Change(
            layers=(keeper, *(replace(child, backing=into.id) for child in readers)),
            active=active,
            snapshots=tuple(new for old, new in zip(at.snapshots, moved, strict=True) if new != old),
            removed_layers=tuple(layer.id for layer in reversed(gone)),
        ),
    )


def stream(at: Situation, chain: Chain, *, into: LayerId, base: LayerId | None) -> Merge:
    """A stream of what lies between ``base`` and ``into`` into ``into``. No snapshot is harmed by it.

    Refused where there is nothing between, ``into`` is not ours, or another machine or another disk of the running
    guest reads it.
    """
    chain.layer(into)
    high = chain.ids.index(into)
    low = -1 if base is None else _span(chain, base, into)[0]
    target, between = chain.layers[high], chain.layers[low + 1 : high]
    if not between:
        raise StateError(
            f"there is no layer between {into} and {base or 'the bottom'} of disk {chain.disk}",
            machine=at.machine,
        )
    if not target.owned:
        raise StateError(
            f"layer {into} ({target.path}) was not created by qmpsnap and is never written to",
            hint=call("snapshot", at.machine) + " puts an overlay on it, which can absorb it",
            machine=at.machine,
        )
    _refuse_strangers(at, chain.disk, into, "and writing to it would change that machine")
    _refuse_tags(at, chain.disk, into)
    live = at.running and _in_live(at, chain.disk, into)
    _refuse_busy(at, chain.disk, {into}, live=live)
    job_chain = at.live[chain.disk] if live else at.forest.chain(chain.disk, into)
    alone = replace(target, backing=base)
    forest = at.forest.apply(at.machine, Change(layers=(alone,)))
    removed = unneeded(forest, reversed(between))
    return Merge(
        kind="stream",
        disk=chain.disk,
        into=target,
        top=target,
        base=None if base is None else chain.layers[low],
        root=job_chain.active.id,
        live=live,
        chain=job_chain.layers,
        moves=at.moves(between, target, zeros="near data"),
        removed=_files(removed),
        change=Change(layers=(alone,), removed_layers=tuple(layer.id for layer in removed)),
    )


class Choice(Struct, frozen=True):
    """One way to make a run of layers one: all goes into ``keeper``."""

    keeper: LayerId
    how: str
    bytes: int


class DiskReduction(Struct, frozen=True):
    """What deleting means for one run of layers: the ways there are, cheapest first, and the steps of the cheapest."""

    disk: str
    layers: tuple[LayerId, ...]
    choices: tuple[Choice, ...]
    steps: tuple[Merge | Removal, ...]


def reduce(at: Situation, candidates: Collection[LayerId]) -> tuple[DiskReduction, ...]:
    """Get rid of layers that no snapshot needs, moving as few bytes as possible and none twice.

    Returns one entry per run of layers. Layers that several others read stay, hidden.
    """
    found: list[DiskReduction] = []
    pending = {layer for layer in candidates if layer in at.forest.layers}
    while dead := _dead_leaves(at.forest, pending):
        disk = _first_disk(dead[0])
        change = Change(removed_layers=tuple(layer.id for layer in dead))
        found.append(DiskReduction(disk, (), (), (Removal(disk=disk, removed=_files(dead), change=change),)))
        pending -= {layer.id for layer in dead}
        at = at.after(change)
    for run in _runs(at, pending):
        reduction = _reduce_run(at, run)
        if reduction:
            found.append(reduction)
            for step in reduction.steps:
                at = at.after(step.change)
    return tuple(found)


def _reduce_run(at: Situation, run: Sequence[LayerId]) -> DiskReduction | None:
    """The cheapest way to make ``run`` (its last layer stays needed, the others are not) one layer."""
    layers = [at.forest.layer(layer) for layer in run]
    disk = _disk_of(at.forest, at.machine, layers[-1])
    ways: list[tuple[Choice, tuple[Merge, ...]]] = []
    for place, layer in enumerate(layers):
        try:
            steps = _merge_into(at, disk, layers, layer.id)
        except StateError:
            continue
        choice = Choice(layer.id, _how(place, len(run)), sum(step.moves for step in steps))
        ways.append((choice, steps))
    ways.sort(key=lambda way: (way[0].bytes, way[0].how))
    if not ways:
        return None
    return DiskReduction(disk, tuple(run), tuple(choice for choice, _ in ways), ways[0][1])


def _merge_into(at: Situation, disk: str, run: Sequence[Layer], keeper: LayerId) -> tuple[Merge, ...]:
    place = [layer.id for layer in run].index(keeper)
    top = run[-1].id
    steps: list[Merge] = []
    for kind in ("stream", "commit"):
        chain = at.live[disk] if _in_live(at, disk, top) else at.forest.chain(disk, top)
        if kind == "stream" and place > 0:
            step = stream(at, chain, into=keeper, base=run[0].backing)
        elif kind == "commit" and place < len(run) - 1:
            step = commit(at, chain, base=keeper, top=top)
            _refuse_loss(at, step)
        else:
            continue
        steps.append(step)
        at = at.after(step.change)
    return tuple(steps)


def _refuse_loss(at: Situation, step: Merge) -> None:
    """Refuse a way of getting rid of layers at which a snapshot is lost that nobody has named."""
    readable = {snapshot.name for snapshot in at.snapshots if snapshot.state == "ok"}
    if lost := sorted(s.name for s in step.change.snapshots if s.state == "consumed" and s.name in readable):
        raise StateError(f"snapshot {', '.join(lost)} would be lost", machine=at.machine)


def _how(place: int, length: int) -> str:
    if place == 0:
        return "commit"
    return "stream" if place == length - 1 else "stream, then commit"


def _runs(at: Situation, pending: Collection[LayerId]) -> list[list[LayerId]]:
    """Maximal runs of layers nobody needs but the one layer above each, followed by that last one above."""
    forest = at.forest
    single = {
        layer: children[0].id
        for layer in pending
        if not forest.references_to(layer)
        and not forest.writers_of(layer)
        and len(children := forest.children(layer)) == 1
        and forest.machines_above(layer) == {at.machine}
    }
    lowest = [layer for layer in single if forest.layer(layer).backing not in single]
    runs = []
    for layer in sorted(lowest):
        run = [layer]
        while run[-1] in single:
            run.append(single[run[-1]])
        runs.append(run)
    return runs


def _dead_leaves(forest: Forest, pending: Collection[LayerId]) -> tuple[Layer, ...]:
    """Layers of one disk that nobody reads at all."""
    dead = [forest.layer(layer) for layer in sorted(pending) if not forest.readers(layer)]
    return tuple(layer for layer in dead if _first_disk(layer) == _first_disk(dead[0]))


def unneeded(forest: Forest, layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Of these layers, given top first, those that nobody needs, each taking the next below with it."""
    gone: list[Layer] = []
    for layer in layers:
        if not forest.readers(layer.id):
            gone.append(layer)
            forest = forest.apply("", Change(removed_layers=(layer.id,)))
    return tuple(gone)


def _span(chain: Chain, base: LayerId, top: LayerId) -> tuple[int, int]:
    chain.layer(base)
    chain.layer(top)
    low, high = chain.ids.index(base), chain.ids.index(top)
    if low >= high:
        raise StateError(
            f"layer {base} is not below layer {top} in disk {chain.disk}",
            hint=f"from the base up: {' <- '.join(chain.ids)}",
        )
    return low, high


def _refuse_readers(at: Situation, disk: str, layer: Layer, above: Layer) -> None:
    """Refuse when anybody but the layer above and this machine's own snapshots reads ``layer``."""
    if others := at.forest.readers(layer.id, but_layer=above.id, but_snapshots_of=at.machine):
        raise StateError(
            f"layer {layer.id} of disk {disk} would change, but it is read by {'; '.join(others)}",
            hint=call("stream", at.machine, disk) + " merges without changing it",
            machine=at.machine,
        )


def _refuse_strangers(at: Situation, disk: str, layer: LayerId, consequence: str) -> None:
    """Refuse when another machine reads ``layer``, directly, through layers above, or by a snapshot."""
    if strangers := sorted(at.forest.machines_above(layer) - {at.machine}):
        raise StateError(
            f"layer {layer} of disk {disk} is read by machine {', '.join(strangers)}, {consequence}",
            hint=call("snapshot", at.machine) + " puts an overlay of its own on the disk",
            machine=at.machine,
        )


def _refuse_tags(at: Situation, disk: str, layer: LayerId) -> None:
    """Refuse to give another backing to an image with snapshots inside: they read it, too."""
    if inside := sorted({r.snapshot for r in at.forest.references_to(layer) if r.tag}):
        raise StateError(
            f"layer {layer} of disk {disk} holds internal snapshot {', '.join(inside)}, which needs the layers below"
            " unchanged",
            hint="delete that snapshot, or put an overlay on the layer: " + call("snapshot", at.machine),
            machine=at.machine,
        )


def _refuse_headers(at: Situation, disk: str, top: LayerId, readers: Sequence[Layer]) -> None:
    """Refuse when a layer that must name another backing is not ours."""
    if foreign := [f"layer {layer.id} ({layer.path})" for layer in readers if not layer.owned]:
        raise StateError(
            f"layer {top} of disk {disk} would be removed, but it is read by {'; '.join(foreign)}, which qmpsnap"
            " did not create",
            hint=call("stream", at.machine, disk) + " merges without removing it",
            machine=at.machine,
        )


def _refuse_busy(at: Situation, disk: str, touched: Collection[LayerId], *, live: bool) -> None:
    """Refuse when the running guest has a layer that changes open outside the chain the job runs in."""
    if not at.running:
        return
    for other, chain in at.live.items():
        if shared := [layer for layer in chain.ids if layer in touched and not (live and other == disk)]:
            raise StateError(
                f"layer {shared[0]} of disk {disk} would change, but the guest has it open as disk {other}, too",
                hint=f"try again while {at.machine} is stopped",
                machine=at.machine,
            )


class _Lost:
    """What a commit into ``chain.layers[low]`` of all up to ``high`` makes unreadable."""

    def __init__(self, chain: Chain, low: int, high: int) -> None:
        self._plain = {layer.id for layer in chain.layers[low:high]}
        self._tagged = {layer.id for layer in chain.layers[low + 1 : high + 1]}

    def point(self, point: Point) -> bool:
        return point.layer in (self._tagged if point.tag else self._plain)


def _lies_in(snapshot: Snapshot, layers: Collection[LayerId]) -> bool:
    return any(point.layer in layers for point in snapshot.points)


def _moved_points(snapshots: Sequence[Snapshot], moved: Collection[LayerId], into: LayerId) -> tuple[Snapshot, ...]:
    return tuple(
        replace(s, points=tuple(replace(p, layer=into) if p.layer in moved else p for p in s.points))
        if _lies_in(s, moved)
        else s
        for s in snapshots
    )


def _files(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Those whose files are removed with them, because qmpsnap created them."""
    return tuple(layer for layer in layers if layer.owned)


def _in_live(at: Situation, disk: str, layer: LayerId) -> bool:
    return disk in at.live and layer in at.live[disk].ids


def _disk_of(forest: Forest, machine: str, layer: Layer) -> str:
    """The disk of ``machine`` that reads the layer; a clone's disk may have another name than the layer's first."""
    pending = [layer.id]
    while pending:
        at = pending.pop()
        users = [(w.machine, w.disk) for w in forest.writers_of(at)]
        users += [(r.machine, r.disk) for r in forest.references_to(at)]
        if found := next((disk for user, disk in users if user == machine), None):
            return found
        pending.extend(child.id for child in forest.children(at))
    return _first_disk(layer)


def _first_disk(layer: Layer) -> str:
    # A layer's id begins with the name of the disk it was made for; a disk's name has no hyphen.
    return layer.id.partition("-")[0]
