"""What is asked about one machine takes no longer for what others have, and says the same as a look at everything."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qmpsnap.errors import QmpsnapError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.stamp import Stamp
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, CreatePlan, DefinePlan, MergePlan, Overlay, Plan, Removal
from qmpsnap.model.planning import sharing
from qmpsnap.model.planning.layer_graph import Forest
from qmpsnap.store.records import Record
from qmpsnap.store.sqlite import journal
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.store.samples import MACHINES, journalled, layer, machine, settled, snapshot

NAMES = ("web", "db", "mail", "new")

Draw = st.DataObject


def grown(store: SqliteStore, draw: Draw) -> list[Layer]:
    """Machines on images of their own, on layers of others and on images that several read, and what is left over."""
    known: list[Layer] = []

    def add(folder: str, backing: Layer | None) -> Layer:
        identity = f"vda-{len(known) + 1}"
        path = draw.draw(st.sampled_from([f"{MACHINES}/{folder}/{identity}.qcow2", f"/images/{identity}.qcow2"]))
        # Few files for many layers: some are links to one another.
        one = replace(layer(identity, backing, path=path), inode=draw.draw(st.integers(0, 30)), device=3)
        known.append(one)
        return one

    for name in NAMES[:3]:
        mark = len(known)
        at = add(name, draw.draw(st.sampled_from([None, *known])))
        for _ in range(draw.draw(st.integers(0, 4))):
            at = add(name, draw.draw(st.sampled_from([at, *known[mark:]])))
        points = draw.draw(st.lists(st.sampled_from(known[mark:]), unique=True))
        taken = tuple(snapshot(f"s{number}", point) for number, point in enumerate(points))
        active = {"vda": at.id}
        store.restore(Record(machine=machine(name), layers=tuple(known[mark:]), active=active, snapshots=taken), None)
    return known


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@contextlib.contextmanager
def some_store() -> Iterator[SqliteStore]:
    """In memory: there is no file, and none is made."""
    with SqliteStore(MACHINES.parent / "store.db", machines=MACHINES, make=False) as store:
        store._database.connection.execute("PRAGMA foreign_keys=ON")
        yield store


def many(examples: int) -> Callable[..., object]:
    return settings(deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])


def component(whole: Forest, machine: str, *more: LayerId) -> set[LayerId]:
    """By the definition: from layer to layer until there is no other."""
    found = own(whole, machine) | {*more}
    while True:
        near = {one.backing for one in whole.layers.values() if one.id in found and one.backing}
        near |= {one.id for one in whole.layers.values() if one.backing in found}
        if near <= found:
            return found
        found |= near


def own(whole: Forest, machine: str) -> set[LayerId]:
    named = {writer.layer for writer in whole.writers if writer.machine == machine}
    named |= {reference.layer for reference in whole.references if reference.machine == machine}
    return named | {one.id for one in whole.layers.values() if one.path.startswith(f"{MACHINES}/{machine}/")}


def same(part: Forest, whole: Forest, layers: set[LayerId]) -> None:
    """The part has these layers, and says of each what the whole does."""
    assert {**part.layers} == {one: whole.layers[one] for one in layers}
    for one in layers:
        assert set(part.children(one)) == set(whole.children(one))
        assert part.writers_of(one) == whole.writers_of(one)
        assert part.references_to(one) == whole.references_to(one)
        assert set(part.readers(one)) == set(whole.readers(one))
        assert part.machines_above(one) == whole.machines_above(one)
        assert part.chain("vda", one) == whole.chain("vda", one)


@many(40)
@given(st.data())
def test_the_part_around_a_machine_says_of_its_layers_what_the_whole_does(draw: Draw) -> None:
    with some_store() as store:
        known = grown(store, draw)
        if draw.draw(st.booleans()):
            store.forget("db")
        whole = store.forest()
        more = [one.id for one in draw.draw(st.lists(st.sampled_from(known))) if one.id in whole.layers]
        for name in NAMES:
            same(store.forest_around(name, *more), whole, component(whole, name, *more))
            below = store.forest_below(name)
            assert below.layers.keys() == whole.below(own(whole, name)).keys()
            assert all(below.writers_of(one) == whole.writers_of(one) for one in below.layers)
            assert all(below.references_to(one) == whole.references_to(one) for one in below.layers)
            nobodys = [
                one.id
                for one in whole.layers.values()
                if not one.path.startswith(f"{MACHINES}/") and not whole.machines_above(one.id)
            ]
            same(store.basis(name).forest, whole, component(whole, name, *nobodys))
            assert store.basis(name, sharers=False).forest == below


def plan_of(name: str, known: list[Layer], draw: Draw) -> Plan:
    some = tuple(draw.draw(st.lists(st.sampled_from(known), unique_by=lambda one: one.id, min_size=1, max_size=3)))
    match draw.draw(st.sampled_from(["create", "remove", "define"])):
        case "create":
            fresh = replace(layer(f"vda-9{name}", some[0]), inode=draw.draw(st.integers(0, 30)))
            overlays = (Overlay(disk="vda", layer=fresh, backing=some[0]),)
            return CreatePlan(machine=name, live=False, overlays=overlays, change=Change())
        case "remove":
            gone = Removal(disk="vda", removed=some, change=Change(removed_layers=tuple(one.id for one in some)))
            return MergePlan(verb="delete", machine=name, opening=Change(), undo=Change(), steps=(gone,))
        case _:
            # Taken over as it is, by another name for the file, or read under an overlay.
            image = draw.draw(st.sampled_from([some[0], replace(layer("vda-99"), inode=some[0].inode, path="/i/x")]))
            top = replace(layer(f"vda-8{name}", image), path=f"{MACHINES}/{name}/8.qcow2", inode=0)
            fresh_layers = tuple(one for one in (image, top) if one.id not in {k.id for k in known})
            change = Change(define=machine(name), layers=fresh_layers, active={"vda": top.id})
            overlay = Overlay(disk="vda", layer=top, backing=image)
            return DefinePlan(machine=name, images=(), overlays=(overlay,), change=change)


def verdict(call: Callable[[], object]) -> tuple[object, ...]:
    try:
        call()
    except QmpsnapError as error:
        return type(error), error.message
    return ("goes on",)


@many(80)
@given(st.data())
def test_whoever_may_go_on_may_so_by_a_look_at_everything(draw: Draw) -> None:
    with some_store() as store:
        known = grown(store, draw)
        if draw.draw(st.booleans()):
            gone = store.forget("db")
            known = [one for one in known if one not in gone]
        for name in draw.draw(st.permutations(NAMES)):
            plan, basis = plan_of(name, known, draw), store.basis(name)
            others = sorted(
                (one for other in NAMES if other != name for one in store.operations(other, only_open=True)),
                key=lambda one: one.id,
            )
            whole = verdict(lambda p=plan, o=others: sharing.require_unshared(p.machine, p, store.forest(), o))  # type: ignore[misc]
            serial = OperationId(store.next_serial())
            assert verdict(lambda p=plan, b=basis, s=serial: store.open_operation(p, b, serial=s)) == whole  # type: ignore[misc]
            if draw.draw(st.integers(0, 3)) == 0:  # what an older qmpsnap has opened, for one
                with store._database.writing() as sql:
                    journal.unclaim(sql)


def alone(identity: str, backing: Layer | None = None, *, path: str = "") -> Layer:
    """A layer whose file is no other layer's."""
    return replace(layer(identity, backing, path=path), inode=int(identity.removeprefix("vda-")))


def test_a_plan_is_refused_for_an_operation_that_is_not_indexed(path: Path) -> None:
    """Opened by an older qmpsnap, or before its files were given other names."""
    with SqliteStore(path, machines=MACHINES) as store:
        base = alone("vda-1")
        top = alone("vda-3", base)
        settled(store, Change(define=machine("web"), layers=(base, top), active={"vda": top.id}), "web")
        gone = Removal(disk="vda", removed=(base,), change=Change(removed_layers=(base.id,)))
        journalled(store, MergePlan(verb="delete", machine="web", opening=Change(), undo=Change(), steps=(gone,)))
        with store._database.writing() as sql:
            sql.execute("DELETE FROM claim")
            journal.unclaim(sql)
        clone = alone("vda-2", base, path=f"{MACHINES}/new/vda-2.qcow2")
        change = Change(define=machine("new"), layers=(clone,), active={"vda": clone.id})
        plan = DefinePlan(machine="new", images=(), overlays=(), change=change)
        with pytest.raises(QmpsnapError, match=r"operation 2 .delete. on machine web is still open"):
            journalled(store, plan)


def filled(store: SqliteStore, machines: int) -> None:
    """Machines of 20 layers and 20 snapshots each, with a journal, open operations and stamps of frozen images."""
    for number in range(machines):
        name = f"m{number}"
        layers = [alone(f"vda-{number + 1}000", path=f"{MACHINES}/{name}/0.raw")]
        for one in range(1, 20):
            path = f"{MACHINES}/m{number}/{one}.qcow2"
            layers.append(alone(f"vda-{number + 1}{one:03}", layers[-1], path=path))
        taken = tuple(snapshot(f"s{one}", at) for one, at in enumerate(layers))
        change = Change(define=machine(name), layers=tuple(layers), active={"vda": layers[-1].id}, snapshots=taken)
        settled(store, change, name)
        for _ in range(5):
            settled(store, Change(), name)
        top = alone(f"vda-{number + 1}999", layers[-1])
        overlay = Overlay(disk="vda", layer=replace(top, inode=0, path=f"{MACHINES}/{name}/o"), backing=layers[-1])
        journalled(store, CreatePlan(machine=name, live=True, overlays=(overlay,), change=Change()))
        store.frozen.record({one.id: Stamp(mtime_ns=1, size=1, ctime_ns=1) for one in layers})


def steps(store: SqliteStore, call: Callable[[], object]) -> int:
    """Steps of SQLite's machine that a call takes."""
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return 0

    store._database.connection.set_progress_handler(counted, 1)
    try:
        call()
    finally:
        store._database.connection.set_progress_handler(None, 1)
    return count


def taken(store: SqliteStore) -> None:
    """All that the store is asked and told when a snapshot of ``web`` is taken and deleted again."""
    (chain,) = store.chains("web")
    serial = OperationId(store.next_serial())
    top = alone(f"vda-70{serial}", chain.active)
    change = Change(layers=(top,), active={"vda": top.id}, snapshots=(snapshot("s", chain.active),), current="s")
    overlay = Overlay(disk="vda", layer=top, backing=chain.active)
    plan = CreatePlan(machine="web", live=False, overlays=(overlay,), change=change)
    store.forest_below("web")
    store.forest_around("web")
    operation = store.open_operation(plan, store.basis("web", sharers=False), serial=serial)
    store.mark(operation.id, "running", step="transaction")
    store.settle(operation.id, "web", change)
    store.frozen.record({chain.active.id: Stamp(mtime_ns=1, size=1, ctime_ns=1)})
    store.frozen.stamps([chain.active.id])
    back = Change(removed_snapshots=("s",), active={"vda": chain.active.id}, removed_layers=(top.id,))
    gone = Removal(disk="vda", removed=(top,), change=back)
    merge = MergePlan(verb="delete", machine="web", opening=Change(), undo=Change(), steps=(gone,))
    serial = OperationId(store.next_serial())
    store.open_operation(merge, store.basis("web"), serial=serial)
    store.settle(serial, "web", back)
    store.apply("web", Change())


def test_what_is_done_to_one_machine_takes_no_longer_for_what_others_have(path: Path) -> None:
    """Counted in SQLite's own steps: no clock is asked."""
    with SqliteStore(path, machines=MACHINES) as store:
        base = alone("vda-1")
        settled(store, Change(define=machine("web"), layers=(base,), active={"vda": base.id}), "web")
        without = steps(store, lambda: taken(store))
        filled(store, 30)
        assert steps(store, lambda: taken(store)) <= without * 1.25  # indexes are a level deeper


def test_what_is_recorded_of_a_frozen_image_goes_with_the_operation_that_removes_it(path: Path) -> None:
    """Until then its size tells its file."""
    with SqliteStore(path, machines=MACHINES) as store:
        base = alone("vda-1")
        top = alone("vda-2", base)
        settled(store, Change(define=machine("web"), layers=(base, top), active={"vda": top.id}), "web")
        store.frozen.record({base.id: Stamp(mtime_ns=1, size=7, ctime_ns=1)})
        lowest = replace(top, backing=None)
        gone = Removal(disk="vda", removed=(base,), change=Change(layers=(lowest,), removed_layers=(base.id,)))
        plan = MergePlan(verb="stream", machine="web", opening=Change(), undo=Change(), steps=(gone,))
        operation = journalled(store, plan)
        store.settle(operation.id, "web", gone.change, step="0:settled")
        assert store.frozen.stamps([base.id])[base.id][0].size == 7
        store.mark(operation.id, "settled")
        assert store.frozen.stamps([base.id]) == {}


def test_a_machine_is_forgotten_in_a_time_that_grows_as_its_layers_do(tmp_path: Path) -> None:
    """Each layer is asked about once it may be needed by nobody, and not again for each one above it."""

    def forgotten(number: int) -> int:
        (tmp_path / str(number)).mkdir()
        with SqliteStore(tmp_path / str(number) / "store.db", machines=MACHINES) as store:
            layers = [alone("vda-0")]
            for place in range(1, number):
                layers.append(alone(f"vda-{place}", layers[-1]))
            settled(store, Change(define=machine("web"), layers=tuple(layers), active={"vda": layers[-1].id}), "web")
            return steps(store, lambda: store.forget("web"))

    assert forgotten(80) < 2.2 * forgotten(40)


def test_a_basis_that_was_read_before_is_what_stands(path: Path) -> None:
    """It is kept until something changes: here, in another process, or in a transaction that was undone."""
    with SqliteStore(path, machines=MACHINES) as store, SqliteStore(path, machines=MACHINES) as other:
        base = alone("vda-1")
        settled(store, Change(define=machine("web"), layers=(base,), active={"vda": base.id}), "web")
        found = store.basis("web")
        assert store.basis("web") is found
        assert store.basis("web", sharers=False) is not found
        larger = replace(base, virtual_size=2 * base.virtual_size)
        with store._database.foreseeing() as sql:
            store._apply(sql, "web", Change(layers=(larger,)))
            assert store.basis("web").chains[0].active == larger
        assert store.basis("web").chains[0].active == base
        other.apply("web", Change(layers=(larger,)))
        assert store.basis("web").chains[0].active == larger
        store.apply("web", Change(layers=(base,)))
        assert store.basis("web").chains[0].active == base
