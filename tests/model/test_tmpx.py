"""Merges proved on a model of file contents: random histories first, then the issue's own cases one by one."""

from collections.abc import Collection
from typing import Any

import pytest
import collections, atexit
STAT = collections.Counter()
atexit.register(lambda: print(STAT))
from hypothesis import HealthCheck, Phase, settings
import collections, atexit
STAT = collections.Counter()
atexit.register(lambda: print(STAT))
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from qmpsnap.errors import NotFoundError, StateError
from qmpsnap.model import merge as rules
from qmpsnap.model.chain import Chain, Layer
from qmpsnap.model.merge import DiskReduction, Situation
from qmpsnap.model.names import LayerId
from qmpsnap.model.operation import Change, Merge, Removal
from tests.model.world import CLUSTER, World, check_world, mark_hidden, run_steps

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
            STAT["refused"]+=1
            return
        assert allowed, "must be refused"
        blind = rules.commit(at, chain, base=base, top=top)
        assert {s.name for s in blind.change.snapshots if s.state == "ok"}.isdisjoint(holding), "taken back"
        self.world.settle(name, opening)
        moved_to = {s.name for s in at.snapshots for point in s.points if point.layer == top}
        run_steps(self.world, name, [step]); STAT[step.kind, step.live, bool(step.rebased)]+=1
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
        allowed = (
            bool(between) and self.world.forest.layer(into).owned and self.world.users(into) <= {name}
        )  # fmt: skip
        states = self.world.guests[name].states()
        try:
            step = rules.stream(self.world.situation(name), chain, into=into, base=base)
        except StateError:
            assert not allowed, "refused without need"
            STAT["refused"]+=1
            return
        assert allowed, "must be refused"
        run_steps(self.world, name, [step]); STAT[step.kind, step.live, bool(step.rebased)]+=1
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
    database=None, phases=[Phase.generate], deadline=None,
    max_examples=600,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=True,
)


def commit_allowed(world: World, name: str, chain: Chain, base: LayerId, top: LayerId) -> bool:
    """Whether a commit harms nobody, judged by headers alone."""
    low, high = chain.ids.index(base), chain.ids.index(top)
    forest, ids = world.forest, chain.ids
    alone = all(
        world.above(layer) == {above} and not forest.writers_of(layer)
        for layer, above in zip(ids[low:high], ids[low + 1 : high + 1], strict=True)
    )
    return alone and forest.layer(base).owned and world.users(base) <= {name} and headers_free(world, name, chain, top)


def headers_free(world: World, name: str, chain: Chain, top: LayerId) -> bool:
    """Whether the header of each layer on ``top`` may be rewritten: ours, and open in no other disk's live chain."""
    open_now = world.open_in(name)
    job = next((disk for disk, ids in open_now.items() if top in ids and disk == chain.disk), None)
    job = job or next((disk for disk, ids in open_now.items() if top in ids), None)
    elsewhere = {layer for disk, ids in open_now.items() if disk != job for layer in ids}
    above = world.above(top)
    return all(world.forest.layer(x).owned for x in above) and not above & elsewhere


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
    for reduction in reductions:
        check_cheapest(world, name, at, reduction)
        STAT[reduction.choices[0].how if reduction.choices else "rm", len(reduction.layers)]+=1
        STAT[("clonename", not reduction.layers[-1].startswith(reduction.disk)) if reduction.layers else 0]+=1
        STAT["n red",len(reductions)]+=1
    run_steps(world, name, [step for reduction in reductions for step in reduction.steps])
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
    chain = Chain(merges[0].disk, ())
    free = headers_free(world, name, chain, run[-1])
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
        assert not forest.references_to(layer)
        assert not forest.writers_of(layer)
        above = world.above(layer)
        others = world.users(layer) - {name}
        if len(above) >= 2 or others:
            continue
        assert above, f"{layer} is kept for nobody"
        (child,) = above
        assert not (forest.layer(layer).owned and forest.layer(child).owned), f"{layer} could be one with {child}"
