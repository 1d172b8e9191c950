"""The contract of ``qmpsnap.store.store.Store``; every backend is held to it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import (
    NameTaken,
    NotFoundError,
    NumberTaken,
    OperationPending,
    QmpsnapError,
    StateError,
    StoreMismatch,
)
from qmpsnap.model.layers.chain import Layer, LayerState
from qmpsnap.model.layers.snapshot import Point, Snapshot, SnapshotKind, SnapshotState
from qmpsnap.model.machines.record import Machine, Origin, Process
from qmpsnap.model.machines.spec import Cache, DiskSpec, Format, Forward, MachineSpec, NicSpec, Storage
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import (
    OPEN_STATES,
    Change,
    CreatePlan,
    DefinePlan,
    MergePlan,
    OperationState,
    Overlay,
    Plan,
    Removal,
)
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.store import Store
from tests.store.samples import (
    MACHINES,
    PROCESS,
    created,
    defined,
    everything,
    journalled,
    layer,
    machine,
    opened,
    settled,
    snapshot,
)

Open = Callable[[], Store]
"""Opens the same store (again)."""


@pytest.fixture(params=["sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    stores: list[SqliteStore] = []

    def sqlite() -> Store:
        stores.append(SqliteStore(tmp_path / "store.db", machines=MACHINES))
        return stores[-1]

    yield {"sqlite": sqlite}[request.param]
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()


# --- machines -------------------------------------------------------------------------------------------------------


def test_a_defined_machine_reads_as_it_was_recorded(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    assert store.machine("web") == machine("web")
    assert store.machines() == (machine("web"),)
    assert [chain.layers for chain in store.chains("web")] == [(base,)]
    assert store.snapshots("web") == ()


def test_machines_are_listed_by_name_whatever_the_order_of_their_definition(store: Store) -> None:
    for name in ("web", "db", "mail"):
        defined(store, name, layer(f"vda-{name}"))
    assert [found.name for found in store.machines()] == ["db", "mail", "web"]


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.machine("nope"),
        lambda store: store.chains("nope"),
        lambda store: store.snapshots("nope"),
        lambda store: store.forget("nope"),
        lambda store: store.apply("nope", Change()),
        lambda store: store.set_process("nope", PROCESS),
        lambda store: store.settle(opened(store, "nope").id, "nope", Change()),
        lambda store: store.layer(LayerId("nope")),
        lambda store: store.mark(OperationId(99), "failed"),
        lambda store: store.settle(OperationId(99), "web", Change()),
    ],
    ids=[
        "machine",
        "chains",
        "snapshots",
        "forget",
        "apply",
        "set_process",
        "settle",
        "layer",
        "mark",
        "settle-operation",
    ],
)
def test_an_unknown_name_is_not_found_and_nothing_changes(store: Store, call: Callable[[Store], object]) -> None:
    defined(store, "web", layer("vda-1"))
    before = everything(store)
    with pytest.raises(NotFoundError, match=r"nope|99") as caught:
        call(store)
    assert caught.value.exit_code == 3
    assert everything(store) == before


def test_a_change_without_an_operation_is_applied_whole_and_leaves_no_journal_row(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    settled(store, Change(snapshots=(snapshot("a", base), snapshot("b", base, parent="a")), current="a"))
    rows = store.operations("web")
    store.apply("web", Change(renamed={"a": "first"}))
    assert [(found.name, found.parent) for found in store.snapshots("web")] == [("first", None), ("b", "first")]
    assert store.machine("web").current == "first"
    before = everything(store)
    with pytest.raises(NameTaken):
        store.apply("web", Change(current=None, renamed={"b": "first"}))
    assert everything(store) == before
    assert store.operations("web") == rows


def test_the_hint_of_an_unknown_machine_names_the_known_ones(store: Store) -> None:
    defined(store, "web", layer("vda-1"))
    with pytest.raises(NotFoundError) as caught:
        store.machine("wbe")
    assert "web" in caught.value.hint


def test_a_taken_name_is_refused_and_the_first_machine_stays_as_it_was(store: Store) -> None:
    defined(store, "web", layer("vda-1"))
    before = everything(store)
    second = opened(store)
    with pytest.raises(NameTaken) as caught:
        store.settle(
            second.id,
            "web",
            Change(
                define=replace(machine("web"), uuid="another"),
                layers=(layer("vda-9"),),
                active={"vda": LayerId("vda-9")},
            ),
        )
    assert caught.value.exit_code == 4
    assert everything(store) == before
    assert store.layer_at(layer("vda-9").path) is None


def test_a_process_is_recorded_replaced_and_taken_away(store: Store) -> None:
    defined(store, "web", layer("vda-1"))
    store.set_process("web", PROCESS)
    assert store.machine("web").process == PROCESS
    later = Process(
        pid=70, start_ticks=80, boot_id="c", started=1, accel="kvm", qemu_version="10.0.0", nodes={"a": "#b"}
    )
    store.set_process("web", later)
    assert store.machine("web").process == later
    store.set_process("web", None)
    assert store.machine("web").process is None


# --- chains and snapshots -------------------------------------------------------------------------------------------


def test_a_chain_is_ordered_base_first_and_the_last_layer_is_active(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    middle = created(store, "first", base)
    top = created(store, "second", middle, parent="first")
    (chain,) = store.chains("web")
    assert chain.layers == (base, middle, top)
    assert chain.active == top


def test_chains_come_in_the_order_of_the_definition_whichever_disk_changed_last(store: Store) -> None:
    layers = {disk: layer(f"{disk}-1") for disk in ("vdc", "vda", "vdb")}
    change = Change(
        define=machine("web", disks=tuple(layers)),
        layers=tuple(layers.values()),
        active={disk: below.id for disk, below in layers.items()},
    )
    settled(store, change)
    top = layer("vdb-2", layers["vdb"])
    settled(store, Change(layers=(top,), active={"vdb": top.id}))
    assert [(chain.disk, chain.ids) for chain in store.chains("web")] == [
        ("vdc", ("vdc-1",)),
        ("vda", ("vda-1",)),
        ("vdb", ("vdb-1", "vdb-2")),
    ]


def test_snapshots_come_oldest_first_each_with_its_parent_and_points(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    middle = created(store, "zz-first", base)
    created(store, "aa-second", middle, parent="zz-first")
    assert store.snapshots("web") == (
        snapshot("zz-first", base),
        snapshot("aa-second", middle, parent="zz-first"),
    )
    assert store.machine("web").current == "aa-second"


def test_points_keep_their_order_and_their_tags(store: Store) -> None:
    base, other = layer("vda-1"), layer("vdb-1")
    defined(store, "web", base, other)
    points = (Point(disk="vdb", layer=other.id, tag="inside"), Point(disk="vda", layer=base.id))
    settled(store, Change(snapshots=(replace(snapshot("s", base), points=points, kind="internal"),)))
    assert store.snapshots("web")[0].points == points


def test_a_known_snapshot_is_replaced_whole_and_keeps_its_place(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    middle = created(store, "first", base)
    created(store, "second", middle, parent="first")
    other = Snapshot(
        name="first",
        kind="full",
        state="consumed",
        parent=None,
        created=77.0,
        description="replaced",
        mode="stopped",
        points=(Point(disk="vda", layer=middle.id, tag="t"),),
        operation=OperationId(9),
        pause_ms=1.25,
        level="fs",
        unquiesced="no agent",
    )
    settled(store, Change(snapshots=(other,)))
    assert store.snapshots("web") == (other, snapshot("second", middle, parent="first"))


def test_a_known_layer_is_replaced(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    moved = replace(base, path="/elsewhere/vda-1.raw", format="raw", inode=99, owned=False, state="consumed")
    settled(store, Change(layers=(moved,)))
    assert store.layer(base.id) == moved
    assert (store.layer_at(moved.path), store.layer_at(base.path)) == (moved, None)


def test_a_change_that_says_nothing_of_the_current_snapshot_leaves_it_and_none_clears_it(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    created(store, "first", base)
    settled(store, Change())
    assert store.machine("web").current == "first"
    settled(store, Change(current=None))
    assert store.machine("web").current is None


# --- snapshots renamed and removed, and who needs what --------------------------------------------------------------


def grown(store: Store) -> tuple[Layer, Layer, Layer]:
    """``web`` with snapshots first <- second on base <- middle <- top; second is current."""
    base = layer("vda-1")
    defined(store, "web", base)
    middle = created(store, "first", base)
    return base, middle, created(store, "second", middle, parent="first")


def test_a_renamed_snapshot_stays_parent_and_current(store: Store) -> None:
    base, middle, _ = grown(store)
    settled(store, Change(renamed={"first": "one", "second": "two"}))
    assert store.snapshots("web") == (snapshot("one", base), snapshot("two", middle, parent="one"))
    assert store.machine("web").current == "two"


@pytest.mark.parametrize(("old", "new"), [("nope", "fresh"), ("first", "second")], ids=["unknown", "taken"])
def test_a_rename_that_cannot_be_changes_nothing(store: Store, old: str, new: str) -> None:
    grown(store)
    before = everything(store)
    operation = opened(store)
    with pytest.raises(QmpsnapError) as caught:
        store.settle(operation.id, "web", Change(renamed={old: new}, current=None))
    assert caught.value.exit_code == {"nope": 3, "first": 4}[old]
    assert everything(store) == before


def test_what_grew_from_a_removed_snapshot_grows_from_its_parent_then(store: Store) -> None:
    base, middle, top = grown(store)
    created(store, "third", top, parent="second")
    settled(store, Change(removed_snapshots=("second",)))
    assert store.snapshots("web") == (snapshot("first", base), snapshot("third", top, parent="first"))
    settled(store, Change(removed_snapshots=("third",)))
    assert store.machine("web").current == "first"
    assert store.layer(middle.id) == middle  # a removed snapshot leaves its layers


def test_a_layer_that_somebody_needs_is_not_removed(store: Store) -> None:
    base, middle, top = grown(store)
    before = everything(store)
    for needed in (base, middle, top):
        operation = opened(store)
        with pytest.raises(StoreMismatch):
            store.settle(operation.id, "web", Change(removed_layers=(needed.id,)))
        store.mark(operation.id, "failed")
    assert everything(store) == before


def test_a_layer_that_nobody_needs_any_more_is_removed(store: Store) -> None:
    base, middle, top = grown(store)
    merged = replace(middle, backing=None)
    settled(store, Change(layers=(merged,), removed_snapshots=("first",), removed_layers=(base.id,)))
    assert store.layer_at(base.path) is None
    assert [chain.layers for chain in store.chains("web")] == [(merged, top)]


def test_the_forest_has_every_layer_writer_and_point_of_all_machines(store: Store) -> None:
    base, middle, top = grown(store)
    other = layer("vda-9", base)
    defined(store, "clone", other)
    forest = store.forest()
    assert dict(forest.layers) == {found.id: found for found in (base, middle, top, other)}
    assert {(found.machine, found.disk, found.layer) for found in forest.writers} == {
        ("web", "vda", top.id),
        ("clone", "vda", other.id),
    }
    assert [(found.machine, found.snapshot, found.disk, found.layer) for found in forest.references] == [
        ("web", "first", "vda", base.id),
        ("web", "second", "vda", middle.id),
    ]


# --- all or nothing -------------------------------------------------------------------------------------------------


def _impossible(base: Layer) -> dict[str, tuple[Change, type[QmpsnapError]]]:
    top = layer("vda-2", base)
    good = Change(layers=(top,), active={"vda": top.id})
    orphan = replace(snapshot("orphan", base), points=(Point(disk="vda", layer=LayerId("vda-none")),))
    return {
        "parent unknown": (replace(good, snapshots=(snapshot("s", base, parent="nope"),)), NotFoundError),
        "current unknown": (replace(good, current="nope"), NotFoundError),
        "point's layer unknown": (replace(good, snapshots=(orphan,)), StoreMismatch),
        "active layer unknown": (Change(layers=(top,), active={"vda": LayerId("vda-none")}), StoreMismatch),
        "backing unknown": (Change(layers=(replace(top, backing=LayerId("vda-none")),)), StoreMismatch),
        "path recorded twice": (Change(layers=(replace(top, path=base.path),)), StoreMismatch),
    }


@pytest.mark.parametrize("case", list(_impossible(layer("vda-1"))))
def test_a_change_that_cannot_be_leaves_nothing_and_its_operation_open(store: Store, case: str) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    before = everything(store)
    operation = opened(store)
    change, error = _impossible(base)[case]
    with pytest.raises(error) as caught:
        store.settle(operation.id, "web", change)
    assert caught.value.effect == "none"
    assert everything(store) == before
    assert store.layer_at(layer("vda-2").path) is None
    assert store.operations("web", only_open=True) == (operation,)
    store.settle(operation.id, "web", Change())  # the store is in working order


# --- the journal ----------------------------------------------------------------------------------------------------


def test_an_operation_is_recorded_as_planned_with_the_plan_it_will_follow(store: Store) -> None:
    base, top = layer("vda-1"), layer("vda-2", layer("vda-1"))
    serial = OperationId(store.next_serial())
    change = Change(layers=(layer(f"vda-{serial}"),), current="s", snapshots=(snapshot("s", base),))
    overlay = Overlay(disk="vda", layer=top, backing=base)
    plan = CreatePlan(machine="web", live=True, overlays=(overlay,), change=change)
    operation = store.open_operation(plan, store.basis("web"), serial=serial)
    assert (operation.id, operation.plan) == (serial, plan)
    assert (operation.verb, operation.state, operation.step, operation.error) == ("create", "planned", "planned", None)
    assert store.operations("web") == (operation,)


def test_while_an_operation_is_open_another_is_refused_and_says_which(store: Store) -> None:
    first = opened(store)
    with pytest.raises(OperationPending, match=f"operation {first.id}") as caught:
        opened(store)
    assert (caught.value.exit_code, caught.value.operation, caught.value.machine) == (8, str(first.id), "web")
    assert as_typed(caught.value.hint) == "qmpsnap recover web"
    assert store.operations("web") == (first,)
    assert opened(store, "other").machine == "other"


@pytest.mark.parametrize("state", get_args(OperationState))
def test_an_operation_is_open_in_just_the_open_states(store: Store, state: OperationState) -> None:
    operation = opened(store)
    store.mark(operation.id, state, step="settled", error="a reason")
    (found,) = store.operations("web")
    assert (found.state, found.step, found.error) == (state, "settled", "a reason")
    assert store.operations("web", only_open=True) == ((found,) if state in OPEN_STATES else ())


def test_a_mark_without_step_or_error_leaves_the_earlier_ones(store: Store) -> None:
    operation = opened(store)
    store.mark(operation.id, "running", step="settled", error="why")
    store.mark(operation.id, "unknown")
    (found,) = store.operations("web")
    assert (found.state, found.step, found.error) == ("unknown", "settled", "why")
    assert found.updated >= operation.updated


def test_a_step_that_operations_of_its_kind_do_not_have_is_refused(store: Store) -> None:
    operation = opened(store)
    with pytest.raises(ValueError, match=r"'define' has no step '0:started'"):
        store.mark(operation.id, "running", step="0:started")
    with pytest.raises(ValueError, match="no step 'a step'"):
        store.settle(operation.id, "web", Change(define=machine("web")), step="a step")
    assert (store.operations("web"), store.machines()) == ((operation,), ())


def test_settling_ends_the_operation(store: Store) -> None:
    operation = opened(store)
    store.settle(operation.id, "web", Change(define=machine("web")))
    assert [(found.state, found.step) for found in store.operations("web")] == [("settled", "settled")]


@pytest.mark.parametrize("state", ["settled", "failed"])
def test_what_has_ended_is_not_decided_again(store: Store, state: OperationState) -> None:
    operation = opened(store)
    store.mark(operation.id, state)
    ended = store.operations("web")
    with pytest.raises(StateError, match=f"operation {operation.id} has ended already \\({state}\\)"):
        store.mark(operation.id, "failed", error="late")
    with pytest.raises(StateError, match="ended already"):
        store.settle(operation.id, "web", Change(define=machine("web")))
    assert (store.operations("web"), store.machines()) == (ended, ())


def test_of_two_plans_with_one_number_the_second_is_refused_and_opens_nothing(store: Store) -> None:
    serial = OperationId(store.next_serial())
    plan = DefinePlan(machine="web", images=(), overlays=(), change=Change())
    basis = store.basis("web")
    other = opened(store, "other", serials=5)
    assert other.id == serial
    for taken in (serial, OperationId(serial + 4)):
        with pytest.raises(NumberTaken, match=f"the number {taken} "):
            store.open_operation(plan, basis, serial=taken, serials=5)
    assert (store.next_serial(), store.operations("web")) == (serial + 5, ())
    assert store.open_operation(plan, basis, serial=OperationId(serial + 7), serials=2).id == serial + 7
    assert store.next_serial() == serial + 9


NOBODYS = replace(layer("vdz-9"), inode=9)
OLD: list[tuple[str, Callable[[Store], None], str]] = [
    ("a snapshot", lambda store: store.apply("web", Change(renamed={"s": "t"})), "of machine web"),
    ("a chain", lambda store: store.apply("web", Change(active={"vda": LayerId("vda-1")})), "of machine web"),
    ("the machine", lambda store: store.set_process("web", PROCESS), "of machine web"),
    ("a layer", lambda store: store.apply("other", Change(layers=(replace(NOBODYS, birth=1),))), "layer vdz-9"),
    ("a layer that went", lambda store: store.apply("other", Change(removed_layers=(NOBODYS.id,))), "layer vdz-9"),
]


@pytest.mark.parametrize(("changes", "what"), [case[1:] for case in OLD], ids=[case[0] for case in OLD])
def test_a_plan_made_from_what_the_store_does_not_say_any_more_is_refused(
    store: Store, changes: Callable[[Store], None], what: str
) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    defined(store, "other", layer("vdb-1"))
    created(store, "s", base)
    store.apply("web", Change(layers=(NOBODYS,)))
    basis, serial = store.basis("web"), OperationId(store.next_serial())
    removal = Removal(disk="vda", removed=(NOBODYS,), change=Change())
    opening = Change(removed_snapshots=("s",))
    plan = MergePlan(verb="delete", machine="web", opening=opening, undo=Change(), steps=(removal,))
    changes(store)
    with pytest.raises(StateError, match=f"{what} changed during planning") as caught:
        store.open_operation(plan, basis, serial=serial)
    assert (caught.value.effect, caught.value.machine) == ("none", "web")
    assert (store.next_serial(), store.operations("web", only_open=True)) == (serial, ())


def test_what_is_no_file_is_told_by_its_identity_under_whatever_path(store: Store) -> None:
    """As the same volume has two names; another machine's operation that is open changes it."""
    known = replace(layer("vda-1"), path="/dev/vg/web", owned=False, device=0, inode=0)
    volume = replace(known, storage="host_device", identity="lvm:U-1")
    defined(store, "web", volume)
    assert store.layer(volume.id) == volume
    top = replace(layer("vda-2"), backing=volume.id)
    settled(store, Change(layers=(top,), active={"vda": top.id}))
    removal = Removal(disk="vda", removed=(volume,), change=Change())
    plan = MergePlan(verb="delete", machine="web", opening=Change(), undo=Change(), steps=(removal,))
    store.open_operation(plan, store.basis("web"), serial=OperationId(store.next_serial()))
    again = replace(volume, id=LayerId("vda-77"), path="/dev/mapper/vg-web")
    machine = Machine(name="new", uuid="u-new", host="here", spec=MachineSpec(name="new"), created=1)
    reads = DefinePlan(
        machine="new", images=(), overlays=(), change=Change(define=machine, layers=(again,), active={"vda": again.id})
    )
    with pytest.raises(OperationPending, match="on machine web is still open"):
        store.open_operation(reads, store.basis("new"), serial=OperationId(store.next_serial()))


def test_no_serial_number_is_used_twice_not_even_after_a_failure_or_a_forgotten_machine(open_store: Open) -> None:
    store = open_store()
    first = opened(store, serials=3)
    store.mark(first.id, "failed")
    assert store.next_serial() == first.id + 3
    second = opened(store)
    assert second.id == first.id + 3
    store.settle(second.id, "web", Change(define=machine("web")))
    store.forget("web")
    third = opened(open_store())
    assert third.id == second.id + 1


# --- forgetting, and layers that machines share ---------------------------------------------------------------------


def test_forgetting_a_machine_returns_every_layer_that_it_alone_used(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    middle = created(store, "first", base)
    top = created(store, "second", middle, parent="first")
    gone = store.forget("web")
    assert sorted(found.id for found in gone) == sorted([base.id, middle.id, top.id])
    assert store.machines() == ()
    assert store.layer_at(base.path) is None
    defined(store, "web", base)  # its name and its layers can be recorded again


def test_a_layer_held_by_a_point_alone_goes_with_its_machine(store: Store) -> None:
    base, old, new = layer("vda-1"), layer("vda-2", layer("vda-1")), layer("vda-3", layer("vda-1"))
    defined(store, "web", base, old, new, active=new)
    settled(store, Change(snapshots=(snapshot("old", old),)))
    assert {found.id for found in store.forget("web")} == {base.id, old.id, new.id}


def test_two_machines_on_one_base_the_first_forgotten_leaves_it_the_second_returns_it(store: Store) -> None:
    base = layer("vda-1", path="/images/base.qcow2", owned=False)
    left, right = layer("vda-2", base), layer("vda-3", base)
    defined(store, "left", base, left)
    defined(store, "right", right)
    assert store.forget("left") == (left,)
    assert [chain.layers for chain in store.chains("right")] == [(base, right)]
    assert {found.id for found in store.forget("right")} == {base.id, right.id}


def test_a_layer_that_nothing_refers_to_goes_with_the_machine_that_it_was_made_for(store: Store) -> None:
    stray, elsewhere = layer("vda-9", path=f"{MACHINES}/other/vda-9.qcow2"), layer("vda-8", path="/elsewhere/mine")
    defined(store, "other", layer("vda-1"))
    settled(store, Change(layers=(stray, elsewhere)), "other")
    defined(store, "web", layer("vda-2"))
    assert [found.id for found in store.forget("web")] == ["vda-2"]
    assert store.layer(stray.id) == stray
    assert {found.id for found in store.forget("other")} == {"vda-1", stray.id, elsewhere.id}


def test_what_a_forgotten_machine_leaves_to_others_is_hidden_where_nobody_names_it(store: Store) -> None:
    base = layer("vda-1")
    defined(store, "web", base)
    middle = created(store, "first", base)
    created(store, "second", middle, parent="first")
    clone = layer("vda-9", middle)
    defined(store, "clone", clone)
    settled(store, Change(snapshots=(snapshot("own", base),)), "clone")
    store.forget("web")
    assert [found.state for found in store.chains("clone")[0].layers] == ["ok", "hidden", "ok"]
    assert store.layer(base.id) == base


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "MACHINES/web/vda-1.qcow2",
        "MACHINES-not/vda-1.qcow2",
        "/images//base.qcow2",
        "/images/./up/../base.qcow2",
        "//images/base.qcow2",
        "MACHINES//web/./vda-1.qcow2",
        "/images/ünï cödé, a=b\n.qcow2",
    ],
    ids=lambda path: path.replace(str(MACHINES), "POOL"),  # alike in every worker
)
def test_a_path_is_read_back_as_the_very_string_that_was_recorded(store: Store, path: str) -> None:
    path = path.replace("MACHINES", str(MACHINES))
    recorded = layer("vda-1", path=path)
    defined(store, "web", recorded)
    assert store.layer(recorded.id).path == path
    assert store.layer_at(path) == recorded


# --- more than one user ---------------------------------------------------------------------------------------------


def test_opened_again_the_store_says_the_same(open_store: Open) -> None:
    store = open_store()
    base = layer("vda-1")
    defined(store, "web", base)
    created(store, "first", base)
    store.set_process("web", PROCESS)
    pending = opened(store)
    again = open_store()
    assert everything(again) == everything(store)
    assert again.operations("web", only_open=True) == (pending,)


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - told by the caller's assertion
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("shared", [True, False], ids=["one-store", "a-store-each"])
def test_threads_that_work_at_once_get_each_its_own_numbers_and_lose_nothing(open_store: Open, *, shared: bool) -> None:
    stores = [open_store()] * 4 if shared else [open_store() for _ in range(4)]
    taken: list[OperationId] = []

    def work(number: int) -> None:
        for turn in range(5):
            name = f"m{number}-{turn}"
            operation = opened(stores[number], name)
            taken.append(operation.id)
            stores[number].settle(operation.id, name, Change(define=machine(name)))

    _in_threads(4, work)
    assert len(stores[0].machines()) == 20
    assert sorted(taken) == list(range(1, 21))


def test_of_many_who_want_to_work_on_one_machine_at_once_one_may(open_store: Open) -> None:
    stores = [open_store() for _ in range(4)]
    won: list[OperationId] = []
    lost: list[OperationPending] = []

    def work(number: int) -> None:
        try:
            won.append(opened(stores[number]).id)
        except OperationPending as error:
            lost.append(error)

    _in_threads(4, work)
    assert (len(won), len(lost)) == (1, 3)


def test_all_who_open_a_fresh_store_at_once_can_use_it(open_store: Open) -> None:
    def work(number: int) -> None:
        opened(open_store(), f"m{number}")

    _in_threads(6, work)


# --- whatever is recorded is read ----------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NAME = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
TIME = st.floats(0, 1e11)
UNSIGNED = st.integers(0, (1 << 64) - 1)
SIZE = st.integers(0, 1 << 62)
DISKS = ("vda", "vdb", "vdc")


@st.composite
def specs(draw: st.DrawFn) -> MachineSpec:
    disk = st.builds(
        DiskSpec,
        name=st.sampled_from(DISKS),
        size=st.none() | SIZE,
        image=st.none() | TEXT,
        format=st.sampled_from(get_args(Format)),
        cache=st.sampled_from(get_args(Cache)),
        read_only=st.booleans(),
        snapshot=st.booleans(),
    )
    forward = st.builds(Forward, host=st.integers(1, 65535), guest=st.integers(1, 65535))
    nic = st.builds(NicSpec, mac=st.none() | TEXT, forwards=st.lists(forward, max_size=2).map(tuple))
    return draw(
        st.builds(
            MachineSpec,
            name=NAME,
            append=TEXT,
            memory=SIZE,
            disks=st.lists(disk, max_size=3).map(tuple),
            nics=st.lists(nic, max_size=2).map(tuple),
            extra=st.lists(TEXT, max_size=2).map(tuple),
        )
    )


@st.composite
def layers(draw: st.DrawFn) -> list[Layer]:
    """Layers of one tree: each backs onto an earlier one or onto nothing."""
    made: list[Layer] = []
    for number in range(draw(st.integers(1, 5))):
        made.append(
            Layer(
                id=LayerId(f"vda-{number}"),
                path=draw(st.sampled_from(["/images/", f"{MACHINES}/web/", "json:"])) + f"{number}" + draw(TEXT),
                format=draw(st.sampled_from(get_args(Format))),
                backing=draw(st.none() | st.sampled_from([below.id for below in made])) if made else None,
                virtual_size=draw(SIZE),
                device=draw(UNSIGNED),
                inode=draw(UNSIGNED),
                owned=draw(st.booleans()),
                state=draw(st.sampled_from(get_args(LayerState))),
                storage=draw(st.sampled_from(get_args(Storage))),
                identity=draw(TEXT),
            )
        )
    return made


@st.composite
def histories(draw: st.DrawFn) -> tuple[Machine, list[Layer], list[Snapshot]]:
    recorded = draw(layers())
    names = draw(st.lists(NAME, unique=True, max_size=4))
    point = st.builds(
        Point,
        disk=st.sampled_from(DISKS),
        layer=st.sampled_from([found.id for found in recorded]),
        tag=st.none() | TEXT,
    )
    snapshots = [
        Snapshot(
            name=name,
            kind=draw(st.sampled_from(get_args(SnapshotKind))),
            state=draw(st.sampled_from(get_args(SnapshotState))),
            parent=draw(st.none() | st.sampled_from(names[:number])) if number else None,
            created=draw(TIME),
            description=draw(TEXT),
            mode=draw(TEXT),
            points=tuple(draw(st.lists(point, unique_by=lambda found: found.disk, max_size=3))),
            operation=OperationId(draw(SIZE)),
            pause_ms=draw(st.none() | TIME),
            tags=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        )
        for number, name in enumerate(names)
    ]
    spec = draw(specs())
    defined = Machine(name=spec.name, uuid=draw(TEXT), host=draw(TEXT), spec=spec, created=draw(TIME))
    return defined, recorded, snapshots


@given(history=histories())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_recorded_is_read_back_equal(open_store: Open, history: tuple[Any, ...]) -> None:
    recorded: Machine
    recorded, tree, snapshots = history
    store = open_store()
    for left in store.machines():
        store.forget(left.name)
    change = Change(
        define=recorded,
        layers=tuple(reversed(tree)),  # whatever the order
        active={f"disk{number}": found.id for number, found in enumerate(tree)},
        snapshots=tuple(snapshots),
        current=snapshots[-1].name if snapshots else None,
    )
    plan = CreatePlan(machine=recorded.name, live=True, overlays=(), change=change)
    operation = journalled(store, plan)
    assert store.operations(recorded.name, only_open=True) == (operation,)
    assert msgspec.json.decode(msgspec.json.encode(operation.plan), type=Plan) == plan
    store.settle(operation.id, recorded.name, change)
    assert store.machine(recorded.name) == replace(recorded, current=change.current or None)
    assert store.snapshots(recorded.name) == tuple(snapshots)
    assert [store.layer(found.id) for found in tree] == tree
    assert [chain.active for chain in store.chains(recorded.name)] == tree


def test_what_a_fork_went_on_from_is_kept_and_ephemeral_ones_are_known(store: Store) -> None:
    origin = Origin(machine="web", snapshot="warm", uuid="uuid-of-web", ephemeral=True, owner=PROCESS)
    for name, of in (("web", None), ("kept", replace(origin, ephemeral=False)), ("gone", origin)):
        operation = opened(store, name)
        disks = layer(f"{name}-1", path=f"{MACHINES}/{name}/vda-1.qcow2")
        new = replace(machine(name), origin=of)
        store.settle(operation.id, name, Change(define=new, layers=(disks,), active={"vda": disks.id}))
        assert store.machine(name).origin == of
    assert store.ephemeral() == ("gone",)
    fresh = replace(origin, identity="fresh", lacks=("a clock",))
    store.apply("gone", Change(origin=fresh))
    assert store.machine("gone").origin == fresh
    store.apply("gone", Change())
    assert store.machine("gone").origin == fresh
    store.forget("gone")
    assert store.ephemeral() == ()
