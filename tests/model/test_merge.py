"""Merges proved on a model of file contents: random histories first, then the issue's own cases one by one."""

from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import NotFoundError, StateError
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change, Merge, Removal
from qmpsnap.model.planning import merging as rules
from qmpsnap.model.planning.merging import DiskReduction
from qmpsnap.model.planning.state import Situation
from tests.model.world import World, check_world, mark_hidden, run_steps

SIZE = 6
MIB = 1 << 20
DISKS = ("vda", "vdb")
CLUSTERS = st.lists(st.integers(-2, SIZE), max_size=6, unique=True)


# --- random histories -----------------------------------------------------------------------------------------------


class Histories(RuleBasedStateMachine):
    """Users, guests and merges in any order; every check of :mod:`tests.model.world` after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def _name(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.world.guests)), label="machine")

    def _pick(self, data: st.DataObject, choices: Collection[Any], label: str) -> Any:
        return data.draw(st.sampled_from(sorted(choices)), label=label)

    @initialize(
        disks=st.integers(1, 2),
        kind=st.sampled_from(["new", "new", "new", "image", "base"]),
        history=st.lists(CLUSTERS, max_size=4),
    )
    def define(self, disks: int, kind: str, history: list[list[int]]) -> None:
        tops, below = [], []
        for disk in DISKS[:disks]:
            top = self.world.image(disk, size=SIZE, owned=kind == "new")
            if kind == "base":
                self.world.files[top.id].cells.update({0: 900, 1: 901})
                below.append(top)
                top = self.world.image(disk, size=SIZE, backing=top.id)
            tops.append((disk, top))
        self.world.define("a", *tops, below=tuple(below))
        for clusters in history:
            self.world.create("a", f"s{self.world.serial()}")
            for disk in DISKS[:disks]:
                self.world.write("a", disk, *clusters)

    @rule(data=st.data(), clusters=CLUSTERS)
    def write(self, data: st.DataObject, clusters: list[int]) -> None:
        name = self._name(data)
        self.world.write(name, self._pick(data, self.world.guests[name].disks, "disk"), *clusters)

    @rule(data=st.data(), named=st.sampled_from([True, True, True, False]), every=st.booleans())
    def create(self, data: st.DataObject, *, named: bool, every: bool) -> None:
        name = self._name(data)
        disks = None if every else [self._pick(data, self.world.guests[name].disks, "disk")]
        self.world.create(name, f"s{self.world.serial()}" if named else None, disks)

    @rule(data=st.data(), discard=st.booleans())
    def revert(self, data: st.DataObject, *, discard: bool) -> None:
        name = self._name(data)
        good = [snapshot.name for snapshot in self.world.guests[name].snapshots if snapshot.state == "ok"]
        if good:
            self.world.revert(name, self._pick(data, good, "snapshot"), discard=discard)

    @precondition(lambda self: len(self.world.guests) < 3)
    @rule(
        data=st.data(),
        disks=st.sampled_from([["vda"], ["root"], ["root", "vda"]]),
        more=st.integers(0, 1),
        owned=st.sampled_from([True, True, True, False]),
    )
    def clone(self, data: st.DataObject, disks: list[str], more: int, *, owned: bool) -> None:
        frozen = [layer for layer in self.world.forest.layers if not self.world.forest.writers_of(layer)]
        if frozen:
            first = self._pick(data, frozen, "base")
            bases = [(disk, first if data.draw(st.booleans()) else self._pick(data, frozen, "base")) for disk in disks]
            free = next(name for name in "abcd" if name not in self.world.guests)
            self.world.clone(free, *bases, more=more, owned=owned)

    @precondition(lambda self: len(self.world.guests) > 1)
    @rule(data=st.data())
    def undefine(self, data: st.DataObject) -> None:
        self.world.undefine(self._name(data))

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        guest = self.world.guests[self._name(data)]
        guest.running = not guest.running

    def _span(self, data: st.DataObject, name: str) -> tuple[Chain, list[LayerId]] | None:
        """A chain of the machine, live or not, and two of its layers."""
        guest = self.world.guests[name]
        tops = {(disk, self.world.active(name, disk)) for disk in guest.disks}
        if data.draw(st.booleans(), label="branch"):
            tops |= {(point.disk, point.layer) for snapshot in guest.snapshots for point in snapshot.points}
        disk, top = self._pick(data, tops, "chain")
        chain = self.world.forest.chain(disk, top)
        if len(chain.layers) < 2:
            return None
        return chain, [chain.ids[x] for x in sorted(data.draw(_two(len(chain.layers)), label="span"))]

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        name = self._name(data)
        if not (found := self._span(data, name)):
            return
        chain, (base, top) = found
        at = self.world.situation(name)
        lost = rules.consumed_by_commit(at, chain.disk, chain, base=base, top=top)
        span = chain.ids[chain.ids.index(base) : chain.ids.index(top)]
        states = self.world.guests[name].states()
        holding = {s.name for s in at.snapshots for point in s.points if point.layer in span and s.state == "ok"}
        assert {snapshot.name for snapshot in lost} == holding
        opening = Change(snapshots=tuple(replace(snapshot, state="consumed") for snapshot in lost))
        allowed = commit_allowed(self.world, name, chain, base, top)
        try:
            step = rules.commit(at.after(opening), chain, base=base, top=top)
        except StateError:
            assert not allowed, "refused without need"
            return
        assert allowed, "must be refused"
        blind = rules.commit(at, chain, base=base, top=top)
        assert {s.name for s in blind.change.snapshots if s.state == "ok"}.isdisjoint(holding), "taken back"
        self.world.settle(name, opening)
        moved_to = {s.name for s in at.snapshots for point in s.points if point.layer == top}
        run_steps(self.world, name, [step])
        after = self.world.guests[name].states()
        assert {name for name in states if states[name] != after[name]} == holding
        for snapshot in moved_to:
            found_at = [s for s in self.world.guests[name].snapshots if s.name == snapshot]
            assert base in [point.layer for point in found_at[0].points]

    @rule(data=st.data(), whole=st.booleans())
    def stream(self, data: st.DataObject, *, whole: bool) -> None:
        name = self._name(data)
        if not (found := self._span(data, name)):
            return
        chain, (low, into) = found
        base = None if whole else low
        between = chain.ids[chain.ids.index(low) + 1 if base else 0 : chain.ids.index(into)]
        ours = self.world.forest.layer(into).owned and self.world.users(into) <= {name}
        allowed = bool(between) and ours and idle(self.world, name, chain.disk, into, {into})
        states = self.world.guests[name].states()
        try:
            step = rules.stream(self.world.situation(name), chain, into=into, base=base)
        except StateError:
            assert not allowed, "refused without need"
            return
        assert allowed, "must be refused"
        run_steps(self.world, name, [step])
        assert self.world.guests[name].states() == states

    @rule(data=st.data(), keep_layers=st.sampled_from([False, False, True]))
    def delete(self, data: st.DataObject, *, keep_layers: bool) -> None:
        name = self._name(data)
        names = [snapshot.name for snapshot in self.world.guests[name].snapshots]
        if names:
            some = st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=4, unique=True)
            delete(self.world, name, *data.draw(some, label="names"), metadata=keep_layers)

    @invariant()
    def all_is_well(self) -> None:
        check_world(self.world)


def _two(length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, length - 1), min_size=2, max_size=2, unique=True)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    deadline=None,
    max_examples=120,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
    phases=[Phase.reuse, Phase.generate],  # to shrink a history of forty steps takes minutes: add Phase.shrink by hand
)


def commit_allowed(world: World, name: str, chain: Chain, base: LayerId, top: LayerId) -> bool:
    """Whether a commit harms nobody, judged by headers alone."""
    low, high = chain.ids.index(base), chain.ids.index(top)
    forest, ids = world.forest, chain.ids
    alone = all(
        world.above(layer) == {above} and not forest.writers_of(layer)
        for layer, above in zip(ids[low:high], ids[low + 1 : high + 1], strict=True)
    )
    return (
        alone
        and forest.layer(base).owned
        and world.users(base) <= {name}
        and headers_free(world, top)
        and idle(world, name, chain.disk, top, {*ids[low : high + 1], *world.above(top)})
    )


def headers_free(world: World, top: LayerId) -> bool:
    """Whether the header of each layer on ``top`` may be rewritten."""
    return all(world.forest.layer(layer).owned for layer in world.above(top))


def idle(world: World, name: str, disk: str, into: LayerId, touched: Collection[LayerId]) -> bool:
    """Whether the guest has nothing that changes open but, perhaps, in the chain of that disk, where the job is."""
    chains = world.open_in(name)
    here = disk if into in chains.get(disk, ()) else None
    return not any(layer in touched for other, ids in chains.items() if other != here for layer in ids)


def delete(world: World, name: str, *names: str, metadata: bool = False) -> tuple[DiskReduction, ...]:
    """Delete snapshots as the verb does; judged to the byte. Returns what was planned."""
    guest = world.guests[name]
    chosen = [snapshot for snapshot in guest.snapshots if snapshot.name in names]
    assert len(chosen) == len(names)
    parents = {snapshot.name: snapshot.parent for snapshot in chosen}
    while guest.current in parents:
        guest.current = parents[guest.current]
    hidden = {layer.id for layer in world.forest.layers.values() if layer.state == "hidden"}
    candidates = {point.layer for snapshot in chosen for point in snapshot.points} | hidden
    world.settle(name, Change(removed_snapshots=names))
    world.settle(name, mark_hidden(world, name, candidates))
    if metadata:
        return ()
    at = world.situation(name)
    reductions = rules.reduce(at, candidates)
    for reduction in reductions:  # each is judged where those before it have been done: a way may be free by then
        check_cheapest(world, name, at, reduction)
        run_steps(world, name, reduction.steps)
        for step in reduction.steps:
            at = at.after(step.change)
    check_kept(world, name, candidates)
    return reductions


def check_cheapest(world: World, name: str, at: Situation, reduction: DiskReduction) -> None:
    """The way taken moves the fewest bytes of all that are allowed; the choices say so."""
    merges = [step for step in reduction.steps if isinstance(step, Merge)]
    assert merges or all(isinstance(step, Removal) for step in reduction.steps)
    if not merges:
        return
    assert all(step.disk in world.guests[name].disks for step in merges), "of a disk the machine does not have"
    run = reduction.layers
    total = sum(at.bytes[layer] for layer in run)
    disk, last = merges[0].disk, run[-1]
    assert idle(world, name, disk, last, run)
    free = headers_free(world, last) and idle(world, name, disk, last, {*run, *world.above(last)})
    ways = {
        layer: total - at.bytes[layer]
        for layer in run
        if at.forest.layer(layer).owned and (layer == run[-1] or free)
    }  # fmt: skip
    assert {choice.keeper: choice.bytes for choice in reduction.choices} == ways
    assert sum(step.moves for step in merges) == min(ways.values()) == reduction.choices[0].bytes
    assert [choice.bytes for choice in reduction.choices] == sorted(ways.values())
    assert {step.into.id for step in merges} == {reduction.choices[0].keeper}


def check_kept(world: World, name: str, candidates: Collection[LayerId]) -> None:
    """What a delete leaves, somebody needs."""
    forest = world.forest
    for layer in candidates:
        if layer not in forest.layers or forest.layer(layer).state != "hidden":
            continue  # went, or took the place of a layer that somebody wants
        if references := forest.references_to(layer):  # of snapshots that a commit has consumed, with its own content
            states = {world.guests[r.machine].states()[r.snapshot] for r in references}
            assert states == {"consumed"}
            continue
        assert not forest.writers_of(layer)
        above = world.above(layer)
        elsewhere = world.users(layer) != {name}  # another machine's, or nobody's: a leaf that never had a name
        if len(above) >= 2 or elsewhere or sum(layer in ids for ids in world.open_in(name).values()) >= 2:
            continue
        assert above, f"{layer} is kept for nobody"
        (child,) = above
        assert not (forest.layer(layer).owned and forest.layer(child).owned), f"{layer} could be one with {child}"


# --- the cases ----------------------------------------------------------------------------------------------


def tutorial(*, running: bool = True, owned: bool = True) -> tuple[World, tuple[LayerId, ...]]:
    """Three snapshots with something written after each: four layers, the snapshots at the lower three."""
    world = World()
    world.define("web", ("vda", world.image("vda", size=SIZE, owned=owned)))
    world.guests["web"].running = running
    world.write("web", "vda", 0, 1)
    for number in (1, 2, 3):
        world.create("web", f"s{number}")
        world.write("web", "vda", 1, number + 1)
    return world, world.ids("web")


def weighed(at: Situation, *mebibytes: float) -> Situation:
    """The situation with these file sizes along the chain of vda, base first."""
    sizes = [int(size * MIB) for size in mebibytes]
    return replace(at, bytes=dict(zip(at.live["vda"].ids, sizes, strict=True)))


def consume(world: World, base: LayerId, top: LayerId) -> tuple[str, ...]:
    """What the verb does before the job."""
    at = world.situation("web")
    lost = rules.consumed_by_commit(at, "vda", at.forest.chain("vda", top), base=base, top=top)
    world.settle("web", Change(snapshots=tuple(replace(snapshot, state="consumed") for snapshot in lost)))
    return tuple(snapshot.name for snapshot in lost)


def drop(at: Situation, *names: str) -> Situation:
    return at.after(Change(removed_snapshots=names))


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("base", "top", "lost", "points"),
    [
        (0, 1, ("s1",), (0, 0, 2)),
        (1, 2, ("s2",), (0, 1, 1)),
        (0, 2, ("s1", "s2"), (0, 1, 0)),
        (2, 3, ("s3",), (0, 1, 2)),
        (0, 3, ("s1", "s2", "s3"), (0, 1, 2)),
    ],
)
def test_the_tutorials_commits(
    base: int, top: int, lost: tuple[str, ...], points: tuple[int, ...], *, running: bool
) -> None:
    world, ids = tutorial(running=running)
    assert consume(world, ids[base], ids[top]) == lost
    step = rules.commit(world.situation("web"), world.chain("web", "vda"), base=ids[base], top=ids[top])
    run_steps(world, "web", [step])
    gone = ids[base + 1 : top + 1]
    assert world.ids("web") == tuple(layer for layer in ids if layer not in gone)
    assert (step.live, step.root) == (running, ids[3] if running else ids[top])
    assert [layer.id for layer in step.rebased] == ([] if running else list(ids[top + 1 : top + 2]))
    states = world.guests["web"].states()
    assert states == {name: "consumed" if name in lost else "ok" for name in ("s1", "s2", "s3")}
    landed = [ids[base] if ids[point] in gone else ids[point] for point in points]
    assert [world.point("web", name) for name in states] == landed


def test_a_commit_never_says_ok_of_what_it_overwrites() -> None:
    world, ids = tutorial()
    step = rules.commit(world.situation("web"), world.chain("web", "vda"), base=ids[0], top=ids[2])
    assert {snapshot.name: snapshot.state for snapshot in step.change.snapshots} == {
        "s1": "consumed",
        "s2": "consumed",
        "s3": "ok",
    }


@pytest.mark.parametrize("base", [None, 0, 1])
def test_a_stream_harms_no_snapshot_and_leaves_the_layers_they_need(base: int | None) -> None:
    world, ids = tutorial()
    below = None if base is None else ids[base]
    step = rules.stream(world.situation("web"), world.chain("web", "vda"), into=ids[3], base=below)
    run_steps(world, "web", [step])
    assert world.ids("web") == ((ids[3],) if base is None else (*ids[: base + 1], ids[3]))
    assert set(world.guests["web"].states().values()) == {"ok"}
    assert step.removed == ()


def test_a_stream_takes_along_what_no_snapshot_needs() -> None:
    world = World()
    world.define("web", ("vda", world.image("vda", size=SIZE)))
    world.create("web", "s1")
    world.create("web", None)
    ids = world.ids("web")
    step = rules.stream(world.situation("web"), world.chain("web", "vda"), into=ids[2], base=None)
    assert [layer.id for layer in step.removed] == [ids[1]]
    run_steps(world, "web", [step])


def test_a_stream_forgets_an_image_of_others_and_leaves_its_file() -> None:
    world, ids = tutorial(owned=False)
    delete(world, "web", "s1")
    assert ids[0] not in world.forest.layers
    assert ids[0] in world.files


@pytest.mark.parametrize(("low", "high", "how"), [(300, 2, "commit"), (2, 300, "stream")])
def test_delete_moves_the_smaller_layer(low: float, high: float, how: str) -> None:
    world, ids = tutorial()
    at = drop(weighed(world.situation("web"), 10, low, high, 10), "s2")
    (reduction,) = rules.reduce(at, [ids[1]])
    assert reduction.layers == (ids[1], ids[2])
    (step,) = reduction.steps
    assert isinstance(step, Merge)
    assert (step.kind, step.moves) == (how, 2 * MIB)
    assert [(choice.how, choice.bytes) for choice in reduction.choices] == [
        (how, 2 * MIB),
        ("stream" if how == "commit" else "commit", 300 * MIB),
    ]


def test_three_deleted_at_once_go_into_the_big_layer_in_the_middle() -> None:
    world, ids = tutorial()
    at = drop(weighed(world.situation("web"), 1, 300, 2, 3), "s1", "s2", "s3")
    (reduction,) = rules.reduce(at, ids[:3])
    below, above = reduction.steps
    assert isinstance(below, Merge)
    assert isinstance(above, Merge)
    assert (below.kind, below.into.id, below.base, below.moves) == ("stream", ids[1], None, 1 * MIB)
    assert (above.kind, above.into.id, above.top.id, above.moves) == ("commit", ids[1], ids[3], 5 * MIB)
    assert reduction.choices[0].how == "stream, then commit"
    delete(world, "web", "s1", "s2", "s3")
    assert len(world.ids("web")) == 1


def test_the_last_name_of_a_leaf_unlinks_it_and_what_it_alone_needed() -> None:
    world, ids = tutorial()
    world.revert("web", "s1", discard=False)
    auto = world.guests["web"].snapshots[-1].name
    (reduction, *_) = delete(world, "web", "s2", "s3", auto)
    assert isinstance(reduction.steps[0], Removal)
    assert set(world.forest.layers) == {ids[0], world.active("web", "vda")}


def branched() -> tuple[World, tuple[LayerId, ...]]:
    """s1's layer carries two branches: the one with s2 and s3, and the active one."""
    world, ids = tutorial()
    world.revert("web", "s1", discard=True)
    world.write("web", "vda", 5)
    return world, ids


def test_a_base_with_two_branches_is_kept_hidden_until_one_is_gone() -> None:
    world, ids = branched()
    assert delete(world, "web", "s1") == ()
    assert world.forest.layer(ids[0]).state == "hidden"
    delete(world, "web", "s2", "s3")
    assert len(world.forest.layers) == 1


def test_commit_into_a_layer_with_a_branch_is_refused() -> None:
    world, ids = branched()
    at = world.situation("web")
    with pytest.raises(StateError, match=f"layer {ids[0]} of disk vda would change, .* layer {ids[1]} \\(of web\\)"):
        rules.commit(at, at.live["vda"], base=ids[0], top=at.live["vda"].active.id)


def test_a_branch_that_reads_top_is_rewritten() -> None:
    world, ids = tutorial(running=False)
    world.revert("web", "s3", discard=False)
    consume(world, ids[1], ids[2])
    at = world.situation("web")
    step = rules.commit(at, at.live["vda"], base=ids[1], top=ids[2])
    assert {layer.id for layer in step.rebased} == {ids[3], world.active("web", "vda")}
    run_steps(world, "web", [step])


def test_a_clone_refuses_commit_and_is_named() -> None:
    world, ids = tutorial()
    world.clone("shop", ("vda", ids[1]))
    at = world.situation("web")
    for base, top in ((0, 1), (0, 2), (1, 2)):
        with pytest.raises(StateError, match="shop"):
            rules.commit(at, at.live["vda"], base=ids[base], top=ids[top])
    with pytest.raises(StateError, match="shop"):
        rules.stream(at, at.live["vda"], into=ids[1], base=None)
    step = rules.stream(at, at.live["vda"], into=ids[3], base=None)
    run_steps(world, "web", [step])
    delete(world, "web", "s1", "s2")
    assert ids[1] in world.forest.layers


def test_a_clone_whose_active_layer_is_top_refuses_commit() -> None:
    world, ids = tutorial()
    world.clone("shop", ("vda", ids[2]))
    world.revert("web", "s2", discard=True)
    delete(world, "web", "s3")  # now ids[2] is the clone's alone
    shop = world.situation("shop")
    step = rules.commit(shop, shop.live["vda"], base=ids[2], top=shop.live["vda"].active.id)
    run_steps(world, "shop", [step])
    assert world.active("shop", "vda") == ids[2]
    world.revert("web", "s1", discard=True)
    at = world.situation("web")
    with pytest.raises(StateError, match="read by machine shop"):
        rules.commit(at, at.forest.chain("vda", ids[2]), base=ids[1], top=ids[2])


def orphaned(*, running: bool, disks: tuple[str, ...]) -> tuple[World, tuple[LayerId, ...]]:
    """A machine "shop" cloned on the layers of one that is gone: two layers are left to it alone."""
    world, ids = tutorial()
    world.clone("shop", *((disk, ids[1]) for disk in disks))
    world.guests["shop"].running = running
    world.undefine("web")
    return world, ids[:2]


def test_a_clones_disk_of_another_name_is_merged_in_its_own_qemu() -> None:
    world, ids = orphaned(running=True, disks=("root",))
    world.write("shop", "root", 3)
    (reduction,) = rules.reduce(world.situation("shop"), ids)
    assert reduction.disk == "root"
    run_steps(world, "shop", reduction.steps)
    assert all(step.live and step.disk == "root" for step in reduction.steps if isinstance(step, Merge))
    assert world.ids("shop", "root") == (ids[0],)


def test_a_layer_that_bears_the_name_of_another_machines_disk_is_merged_where_it_is_open() -> None:
    world, ids = orphaned(running=False, disks=("root",))
    at = world.situation("shop")
    run_steps(world, "shop", [rules.commit(at, at.live["root"], base=ids[1], top=at.live["root"].active.id)])
    world.create("shop", "mine")
    world.guests["shop"].running = True
    (reduction,) = rules.reduce(world.situation("shop"), [ids[0]])
    run_steps(world, "shop", reduction.steps)
    assert [(step.live, step.disk) for step in reduction.steps if isinstance(step, Merge)] == [(True, "root")]


@pytest.mark.parametrize("kind", ["commit", "stream"])
def test_a_branch_is_merged_beside_the_running_guest(kind: str) -> None:
    world, ids = branched()
    at = world.situation("web")
    chain = at.forest.chain("vda", ids[2])
    if kind == "stream":
        step = rules.stream(at, chain, into=ids[2], base=ids[0])
    else:
        consume(world, ids[1], ids[2])
        at = world.situation("web")
        step = rules.commit(at, chain, base=ids[1], top=ids[2])
    assert (step.live, step.root) == (False, ids[2])
    run_steps(world, "web", [step])


def test_a_layer_that_two_disks_of_a_running_guest_read_does_not_go() -> None:
    world, ids = orphaned(running=True, disks=("vda", "vdb"))
    at = world.situation("shop")
    with pytest.raises(StateError, match="has it open as disk"):
        rules.commit(at, at.live["vda"], base=ids[0], top=ids[1])
    world.guests["shop"].running = False
    at = world.situation("shop")
    run_steps(world, "shop", [rules.commit(at, at.live["vda"], base=ids[0], top=ids[1])])


def test_an_image_of_others_on_top_is_never_rewritten() -> None:
    world, ids = tutorial()
    world.clone("shop", ("vda", ids[1]), owned=False)
    world.undefine("web")
    at = world.situation("shop")
    active = at.live["vda"].active.id
    with pytest.raises(StateError, match=f"{active} .* which qmpsnap did not create"):
        rules.commit(at, at.live["vda"], base=ids[0], top=ids[1])
    with pytest.raises(StateError, match="is never written to"):
        rules.stream(at, at.live["vda"], into=active, base=None)


def test_an_image_of_others_that_goes_leaves_the_store_and_keeps_its_file() -> None:
    world, ids = tutorial()
    world.clone("shop", ("vda", ids[1]), owned=False)
    world.undefine("web")
    at = world.situation("shop")
    active = at.live["vda"].active.id
    (step,) = [rules.commit(at, at.live["vda"], base=ids[1], top=active)]
    assert step.removed == ()
    run_steps(world, "shop", [step])
    assert active in world.files


def test_a_leaf_that_is_an_image_of_others_keeps_its_file() -> None:
    world, ids = tutorial()
    world.clone("shop", ("vda", ids[1]), owned=False)
    (leaf,) = world.ids("shop")[-1:]
    world.create("shop", "s1")
    world.revert("shop", "s1", discard=True)
    at = drop(world.situation("shop"), "s1")
    stray = at.after(Change(active={"vda": ids[0]}, removed_layers=(at.live["vda"].active.id,)))
    (reduction,) = rules.reduce(stray, [leaf])
    (step,) = reduction.steps
    assert (step.removed, step.change.removed_layers) == ((), (leaf,))


def test_layers_that_are_all_of_others_stay() -> None:
    world = World()
    base = world.image("vda", size=SIZE, owned=False)
    world.define("web", ("vda", world.image("vda", size=SIZE, backing=base.id, owned=False)), below=(base,))
    assert rules.reduce(world.situation("web"), [base.id]) == ()


def test_runs_one_above_the_other_are_planned_one_after_the_other() -> None:
    world = World()
    world.define("web", ("vda", world.image("vda", size=SIZE)))
    for number in range(1, 6):
        world.write("web", "vda", *range(number))
        world.create("web", f"s{number}")
    reductions = delete(world, "web", "s1", "s3", "s4")  # s1 goes up into or down from s2's layer, s3 and s4 into s5's
    assert len(reductions) == 2
    assert len(world.ids("web")) == 3


def test_what_takes_a_hidden_layers_place_is_hidden() -> None:
    world, ids = branched()
    world.revert("web", "s3", discard=True)
    world.create("web", "s4")
    world.revert("web", "s3", discard=False)
    delete(world, "web", "s3")  # two branches read it: hidden
    assert world.forest.layer(ids[2]).state == "hidden"
    world.guests["web"].running = False
    consume(world, ids[1], ids[2])
    at = world.situation("web")
    run_steps(world, "web", [rules.commit(at, at.live["vda"], base=ids[1], top=ids[2])])
    assert world.forest.layer(ids[1]).state == "hidden"


def test_two_disks_of_a_running_guest_share_no_layer_that_changes() -> None:
    world, ids = tutorial()
    world.clone("shop", ("root", ids[2]), ("data", ids[2]))
    world.guests["shop"].running = True
    world.undefine("web")
    at = world.situation("shop")
    with pytest.raises(StateError, match="has it open as disk data"):
        rules.commit(at, at.live["root"], base=ids[0], top=ids[1])
    with pytest.raises(StateError, match="has it open as disk data"):
        rules.stream(at, at.live["root"], into=ids[1], base=None)
    assert rules.reduce(at, ids) == ()


def test_what_only_a_nameless_leaf_reads_is_not_merged_for_a_disk_the_machine_lacks() -> None:
    world, ids = tutorial()
    world.clone("shop", ("root", ids[1]))
    at = world.situation("shop")
    lonely = at.forest.apply("web", Change(active={"vda": ids[0]}, removed_snapshots=("s1", "s2", "s3")))
    assert rules.reduce(replace(at, basis=replace(at.basis, forest=lonely)), [ids[2]]) == ()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "top"), [(2, 1), (1, 1)])
def test_base_above_top_is_refused(base: int, top: int) -> None:
    world, ids = tutorial()
    at = world.situation("web")
    with pytest.raises(StateError, match=f"{ids[base]} is not below layer {ids[top]}") as refused:
        rules.commit(at, at.live["vda"], base=ids[base], top=ids[top])
    assert "vda-1 <- vda-" in refused.value.hint
    with pytest.raises(StateError, match="is not below"):
        rules.stream(at, at.live["vda"], into=ids[top], base=ids[base])


def test_a_layer_of_another_disk_is_not_found() -> None:
    world = World()
    world.define("web", *((disk, world.image(disk, size=SIZE)) for disk in DISKS))
    world.create("web", "s1")
    at = world.situation("web")
    own, other = at.live["vda"], at.live["vdb"]
    for call in (
        lambda: rules.commit(at, own, base=other.base.id, top=own.active.id),
        lambda: rules.commit(at, own, base=own.base.id, top=other.active.id),
        lambda: rules.stream(at, own, into=other.active.id, base=None),
        lambda: rules.stream(at, own, into=own.active.id, base=other.base.id),
        lambda: rules.consumed_by_commit(at, "vda", own, base=other.base.id, top=own.active.id),
    ):
        with pytest.raises(NotFoundError, match="disk vda has no layer vdb-"):
            call()


def test_a_stream_of_nothing_is_refused() -> None:
    world, ids = tutorial()
    at = world.situation("web")
    with pytest.raises(StateError, match="there is no layer between"):
        rules.stream(at, at.live["vda"], into=ids[3], base=ids[2])
    with pytest.raises(StateError, match="the bottom"):
        rules.stream(at, at.live["vda"], into=ids[0], base=None)


def test_a_commit_into_an_image_of_others_is_refused() -> None:
    world, ids = tutorial(owned=False)
    at = world.situation("web")
    with pytest.raises(StateError, match="was not created by qmpsnap") as refused:
        rules.commit(at, at.live["vda"], base=ids[0], top=ids[1])
    assert "qmpsnap stream web vda" in as_typed(refused.value.hint)


# --- the situation after a change -----------------------------------------------------------------------------------


def test_changed_snapshots_keep_their_place_and_lose_parents_that_go() -> None:
    world, _ = tutorial()
    at = world.situation("web")
    first, second, third = at.snapshots
    after = at.after(Change(snapshots=(replace(first, state="consumed"),), removed_snapshots=("s2",)))
    assert [(s.name, s.state, s.parent) for s in after.snapshots] == [("s1", "consumed", None), ("s3", "ok", "s1")]
    assert (second.parent, third.parent) == ("s1", "s2")
