"""Which layers become one, at what price, and who stands in the way: pure rules for commit, stream and delete."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import StateError
from qmpsnap.model.chain import Chain, Layer
from qmpsnap.model.forest import Forest
from qmpsnap.model.names import LayerId
from qmpsnap.model.operation import Change, Merge, Removal
from qmpsnap.model.snapshot import Snapshot


class Situation(Struct, frozen=True):
    """What a plan is made from.

    Attributes:
        machine: the machine's name.
        forest: all layers of the store.
        snapshots: the machine's, oldest first.
        live: the live chain of each disk.
        running: a QEMU runs the machine.
        bytes: what each layer's file occupies.
    """

    machine: str
    forest: Forest
    snapshots: tuple[Snapshot, ...]
    live: Mapping[str, Chain]
    running: bool
    bytes: Mapping[LayerId, int]

    def after(self, change: Change) -> "Situation":
        """The situation once a change has settled."""
        gone = {*change.removed_snapshots, *(snapshot.name for snapshot in change.snapshots)}
        parents = {s.name: s.parent for s in self.snapshots if s.name in change.removed_snapshots}
        kept = (s for s in self.snapshots if s.name not in gone)
        forest = self.forest.apply(self.machine, change)
        tops = {w.disk: w.layer for w in forest.writers if w.machine == self.machine}
        return replace(
            self,
            forest=forest,
            snapshots=tuple(replace(s, parent=_surviving(s.parent, parents)) for s in (*kept, *change.snapshots)),
            live={disk: forest.chain(disk, tops[disk]) for disk in self.live},
        )


def _surviving(name: str | None, removed: Mapping[str, str | None]) -> str | None:
    """The nearest ancestor, the snapshot itself included, that is not removed."""
    while name is not None and name in removed:
        name = removed[name]
    return name


def consumed_by_commit(at: Situation, disk: str, chain: Chain, *, base: LayerId, top: LayerId) -> tuple[Snapshot, ...]:
    """The machine's snapshots that a commit makes unreadable: their points lie from ``base`` to below ``top``."""
    low, high = _span(chain, base, top)
    lost = {layer.id for layer in chain.layers[low:high]}
    return tuple(s for s in at.snapshots if s.state == "ok" and (p := s.point(disk)) and p.layer in lost)


def commit(at: Situation, chain: Chain, *, base: LayerId, top: LayerId) -> Merge:
    """A commit of the layers above ``base`` up to ``top`` into ``base``.

    Args:
        at: the situation.
        chain: the chain both are in.
        base: the layer that is written to.
        top: the highest layer that goes.

    Raises:
        StateError: base is not below top, is not ours, or somebody else reads what would change.
    """
    low, high = _span(chain, base, top)
    into, highest = chain.layers[low], chain.layers[high]
    if not into.owned:
        raise StateError(
            f"layer {into.id} ({into.path}) was not made by qmpsnap and is never written to; nothing was changed",
            hint=f"qmpsnap stream {at.machine} {chain.disk} merges the other way",
            machine=at.machine,
        )
    for layer, above in zip(chain.layers[low:high], chain.layers[low + 1 : high + 1], strict=True):
        _refuse_readers(at, chain.disk, layer, above)
    gone = chain.layers[low + 1 : high + 1]
    live = at.running and _in_live(at, chain.disk, highest.id)
    job_chain = at.live[chain.disk] if live else at.forest.chain(chain.disk, highest.id)
    readers = at.forest.children(top)
    strangers = sorted({m for child in readers for m in at.forest.machines_above(child.id)} - {at.machine})
    if strangers:
        raise StateError(
            f"layer {top} is read by machine {', '.join(strangers)}, whose image would have to be rewritten;"
            " nothing was changed",
            hint=f"merge the other way: qmpsnap stream {at.machine} {chain.disk}",
            machine=at.machine,
        )
    moved = {layer.id for layer in gone}
    keeper = replace(into, virtual_size=max(into.virtual_size, highest.virtual_size), state="ok")
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
        moves=sum(at.bytes.get(layer.id, 0) for layer in gone),
        rebased=tuple(child for child in readers if child.id not in job_chain.ids),
        removed=gone,
        change=Change(
            layers=(keeper, *(replace(child, backing=into.id) for child in readers)),
            active=active,
            snapshots=_moved_points(at.snapshots, chain.disk, moved, into.id),
            removed_layers=tuple(layer.id for layer in reversed(gone)),
        ),
    )


def stream(at: Situation, chain: Chain, *, into: LayerId, base: LayerId | None) -> Merge:
    """A stream of what lies between ``base`` and ``into`` into ``into``. No snapshot is harmed by it.

    Args:
        at: the situation.
        chain: the chain both are in.
        into: the layer that is written to.
        base: its backing afterwards; None makes it stand alone.

    Raises:
        StateError: base is not below ``into``, there is nothing between, or ``into`` is not ours.
    """
    high = chain.ids.index(into)
    low = -1 if base is None else _span(chain, base, into)[0]
    target, between = chain.layers[high], chain.layers[low + 1 : high]
    if not between:
        raise StateError(
            f"nothing lies between layer {into} and {base or 'the bottom'} of disk {chain.disk}; nothing was changed",
            machine=at.machine,
        )
    live = at.running and _in_live(at, chain.disk, into)
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
        moves=sum(at.bytes.get(layer.id, 0) for layer in between),
        removed=removed,
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

    Args:
        at: the situation, the snapshots gone already.
        candidates: the layers to look at.

    Returns:
        One entry per run of layers. Layers that several others read stay, hidden.
    """
    found: list[DiskReduction] = []
    pending = {layer for layer in candidates if layer in at.forest.layers}
    while dead := _dead_leaves(at.forest, pending):
        disk = _disk_of(dead[0])
        change = Change(removed_layers=tuple(layer.id for layer in dead))
        removed = tuple(layer for layer in dead if layer.owned)
        found.append(DiskReduction(disk, (), (), (Removal(disk=disk, removed=removed, change=change),)))
        pending -= {layer.id for layer in dead}
        at = at.after(change)
    for run in _runs(at, pending):
        reduction = _reduce_run(at, run)
        if reduction:
            found.append(reduction)
            for step in reduction.steps:
                at = at.after(step.change)
    return tuple(found)


def _reduce_run(at: Situation, run: Sequence[Layer]) -> DiskReduction | None:
    """The cheapest way to make ``run`` (its last layer stays needed, the others are not) one layer."""
    disk = _disk_of(run[0])
    total = sum(at.bytes.get(layer.id, 0) for layer in run)
    choices = sorted(
        (
            Choice(layer.id, _how(place, len(run)), total - at.bytes.get(layer.id, 0))
            for place, layer in enumerate(run)
            if layer.owned
        ),
        key=lambda choice: (choice.bytes, choice.how),
    )
    for choice in choices:
        try:
            steps = _merge_into(at, run, choice.keeper)
        except StateError:
            continue
        return DiskReduction(disk, tuple(layer.id for layer in run), tuple(choices), steps)
    return None


def _merge_into(at: Situation, run: Sequence[Layer], keeper: LayerId) -> tuple[Merge, ...]:
    disk = _disk_of(run[0])
    place = [layer.id for layer in run].index(keeper)
    steps: list[Merge] = []
    for kind in ("stream", "commit"):
        top = run[-1].id
        chain = at.live[disk] if _in_live(at, disk, top) else at.forest.chain(disk, top)
        if kind == "stream" and place > 0:
            step = stream(at, chain, into=keeper, base=run[0].backing)
        elif kind == "commit" and place < len(run) - 1:
            step = commit(at, chain, base=keeper, top=top)
        else:
            continue
        steps.append(step)
        at = at.after(step.change)
    return tuple(steps)


def _how(place: int, length: int) -> str:
    if place == 0:
        return "commit"
    return "stream" if place == length - 1 else "stream, then commit"


def _runs(at: Situation, pending: Collection[LayerId]) -> list[list[Layer]]:
    """Maximal runs of layers nobody needs but the one layer above each, followed by that last one above."""
    forest = at.forest
    single = {
        layer: children[0]
        for layer in pending
        if not forest.references_to(layer)
        and not forest.writers_of(layer)
        and len(children := forest.children(layer)) == 1
        and forest.machines_above(layer) <= {at.machine}
    }
    lowest = [layer for layer in single if forest.layer(layer).backing not in single]
    runs = []
    for layer in sorted(lowest):
        run = [forest.layer(layer)]
        while run[-1].id in single:
            run.append(single[run[-1].id])
        runs.append(run)
    return runs


def _dead_leaves(forest: Forest, pending: Collection[LayerId]) -> tuple[Layer, ...]:
    """Layers of one disk that nobody reads at all."""
    dead = [forest.layer(layer) for layer in sorted(pending) if not forest.readers(layer)]
    return tuple(layer for layer in dead if _disk_of(layer) == _disk_of(dead[0]))


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
            f"layer {base} is not below layer {top} in disk {chain.disk}; nothing was changed",
            hint=f"from the base up: {' <- '.join(chain.ids)}",
        )
    return low, high


def _refuse_readers(at: Situation, disk: str, layer: Layer, above: Layer) -> None:
    """Refuse when anybody but the layer above and this machine's own snapshots reads ``layer``."""
    if others := at.forest.readers(layer.id, but_layer=above.id, but_snapshots_of=at.machine):
        raise StateError(
            f"layer {layer.id} of disk {disk} would change, and it is read by {'; '.join(others)}; nothing was changed",
            hint=f"qmpsnap stream {at.machine} {disk} merges without harming anybody",
            machine=at.machine,
        )


def _moved_points(
    snapshots: Sequence[Snapshot], disk: str, moved: Collection[LayerId], into: LayerId
) -> tuple[Snapshot, ...]:
    changed = []
    for snapshot in snapshots:
        point = snapshot.point(disk)
        if point and point.layer in moved:
            points = tuple(replace(p, layer=into) if p.disk == disk else p for p in snapshot.points)
            changed.append(replace(snapshot, points=points))
    return tuple(changed)


def _in_live(at: Situation, disk: str, layer: LayerId) -> bool:
    return disk in at.live and layer in at.live[disk].ids


def _disk_of(layer: Layer) -> str:
    # A layer's id begins with the name of its disk; a disk's name has no hyphen.
    return layer.id.partition("-")[0]
