"""What ``snapshot revert`` will do, as a value, and how a broken one is ended: no QEMU."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.block.image.create import ImageTool
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.snapshot_verbs.revert import document_of, text_of
from qmpsnap.errors import NotFoundError, OperationPending, StateError
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.layers.vmstate import Inside, hardware_of
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.copies import VolumeMerge
from qmpsnap.model.operations.operation import Change, DefinePlan, RevertPlan
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.model.planning.layer_graph import Forest, Reference, Writer
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.revert import plan as revert_plan
from qmpsnap.ops.revert.plan import RevertRequest, Run
from qmpsnap.ops.revert.revert import Preview
from qmpsnap.ops.session.recovery import end_open
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.ops.bench import MIB, BenchContext, FakeQemu, chain, context_on, home_at, machine, snapshot
from tests.store.samples import journalled

LIVE = (chain("vda", 1, 3, 5), chain("vdb", 2, 4, 6))
LISTED = (snapshot("a", "vda-1", "vdb-2"), snapshot("b", "vda-3", "vdb-4", parent="a"))


def situation(
    chains: tuple[Chain, ...] = LIVE,
    snapshots: tuple[Snapshot, ...] = LISTED,
    *,
    more: tuple[Layer, ...] = (),
    writers: tuple[Writer, ...] = (),
) -> Situation:
    layers = {layer.id: layer for found in chains for layer in found.layers} | {layer.id: layer for layer in more}
    references = [Reference("web", s.name, p.disk, p.layer) for s in snapshots for p in s.points]
    own = [Writer("web", found.disk, found.active.id) for found in chains]
    forest = Forest(layers, (*own, *writers), tuple(references))
    basis = Basis(name="web", record=machine(current="b"), chains=chains, snapshots=snapshots, forest=forest)
    return Situation(basis=basis, running=True, bytes={})


def plan(
    at: Situation | None = None,
    name: str = "a",
    *,
    discard: bool = False,
    run: Run | None = None,
    mode: str = "live",
    of: Machine | None = None,
) -> RevertPlan:
    at = at or situation()
    basis = replace(at.basis, record=of) if of else at.basis
    inputs = PlanInputs(basis=basis, serial=OperationId(17), home=home_at(Path("/q")), mode=mode, now=1700000000.0)
    return revert_plan.plan(inputs, at, RevertRequest(name=name, discard=discard, run=run))


# --- what becomes active --------------------------------------------------------------------------------------------


def test_a_new_layer_on_each_point_becomes_active_and_the_machine_stands_at_the_snapshot() -> None:
    planned = plan()
    assert [(o.disk, o.layer.id, o.layer.path, o.layer.backing, o.backing.id) for o in planned.overlays] == [
        ("vda", "vda-17", "/q/machines/web/vda-17.qcow2", "vda-1", "vda-1"),
        ("vdb", "vdb-17", "/q/machines/web/vdb-17.qcow2", "vdb-2", "vdb-2"),
    ]
    assert planned.change.active == {"vda": "vda-17", "vdb": "vdb-17"}
    assert planned.change.current == "a"
    assert planned.snapshot == "a"


def test_a_disk_that_the_snapshot_does_not_include_is_not_touched() -> None:
    planned = plan(situation(snapshots=(snapshot("a", "vdb-2"),)))
    assert planned.change.active == {"vdb": "vdb-17"}
    assert [point.disk for point in planned.change.snapshots[0].points] == ["vdb"]


def test_a_point_outside_the_live_chain_is_a_branch_like_any_other() -> None:
    other = chain("vda", 1, 8).active
    planned = plan(situation(snapshots=(*LISTED, snapshot("c", "vda-8")), more=(other,)), "c")
    assert planned.overlays[0].backing == other


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_what_was_active_is_kept_as_a_snapshot_that_grew_from_the_current_one() -> None:
    (kept,) = plan().change.snapshots
    assert kept.points == (Point(disk="vda", layer=LayerId("vda-5")), Point(disk="vdb", layer=LayerId("vdb-6")))
    assert (kept.name, kept.kind, kept.state, kept.parent) == ("auto-17", "disk", "ok", "b")
    assert (kept.mode, kept.created, kept.operation) == ("live", 1700000000.0, 17)
    assert kept.description == "vda, vdb before the revert to a"
    assert plan().removed == ()
    assert plan().change.removed_layers == ()


def test_a_name_that_somebody_has_taken_is_passed_over() -> None:
    taken = (*LISTED, snapshot("auto-17", "vda-1"), snapshot("auto-17-2", "vda-1"))
    assert plan(situation(snapshots=taken)).change.snapshots[0].name == "auto-17-3"


def test_empty_layers_on_listed_points_go_instead() -> None:
    planned = plan()
    assert planned.unwritten is not None
    assert [layer.id for layer in planned.unwritten.layers] == ["vda-5", "vdb-6"]
    assert planned.unwritten.change == replace(
        planned.change, snapshots=(), removed_layers=(LayerId("vda-5"), LayerId("vdb-6"))
    )


@pytest.mark.parametrize(
    "at",
    [
        situation(snapshots=(LISTED[0],)),
        situation(snapshots=(LISTED[0], replace(LISTED[1], state="consumed"))),
        situation(snapshots=(LISTED[0], snapshot("b", "vda-3"))),
        situation((chain("vda", 5), LIVE[1]), LISTED, more=LIVE[0].layers[:2]),
        situation((Chain("vda", (*LIVE[0].layers[:2], replace(LIVE[0].active, owned=False))), LIVE[1])),
        situation(more=chain("vda", 5, 9).layers[1:]),
        situation(snapshots=(*LISTED, snapshot("odd", "vda-5"))),
    ],
    ids=["not listed", "consumed", "one of them not listed", "no layer below", "not ours", "a layer above", "a point"],
)
def test_empty_layers_stay_when_something_would_be_lost_with_them(at: Situation) -> None:
    assert plan(at).unwritten is None


def test_a_preview_tells_one_or_the_other() -> None:
    written, unwritten = Preview(plan=plan(), unwritten=False), Preview(plan=plan(), unwritten=True)
    assert (written.kept, written.removed) == ("auto-17", ())
    assert (unwritten.kept, [layer.id for layer in unwritten.removed]) == (None, ["vda-5", "vdb-6"])


# --- the UEFI variable store ----------------------------------------------------------------------------------------

WEB = machine(current="b")
UEFI = replace(WEB, spec=replace(WEB.spec, firmware="uefi"))
HARDWARE = hardware_of(UEFI.spec, uuid=UEFI.uuid, accel="tcg", qemu_version="7.2.22", host_cpu="some")
INSIDE = Inside(layer=LayerId("vda-1"), bytes=1, hardware=HARDWARE)
SET, COPY = replace(LISTED[0], variables="/q/vars-3.fd"), replace(LISTED[1], variables="/q/vars-5.fd")


@pytest.mark.parametrize("target", [SET, replace(LISTED[0], inside=INSIDE)], ids=["a copy", "a memory"])
def test_the_variable_store_is_kept_where_it_is_replaced(target: Snapshot) -> None:
    at = situation(snapshots=(target, LISTED[1]))
    assert plan(at, of=UEFI).keeps == plan(at, of=UEFI).change.snapshots[0].variables == "/q/machines/web/vars-17.fd"
    assert plan(at, of=UEFI, discard=True).keeps is None


def test_a_variable_store_that_stays_is_not_kept() -> None:
    assert plan(of=UEFI).keeps is None
    assert plan(situation(snapshots=(replace(LISTED[0], inside=INSIDE), LISTED[1]))).keeps is None  # a BIOS machine


@pytest.mark.parametrize(
    ("below", "copies"),
    [
        (LISTED[1], ()),
        (COPY, ("/q/vars-5.fd",)),
        (replace(COPY, state="consumed"), None),
        (replace(LISTED[1], inside=INSIDE), ("/q/vars-3.fd",)),
    ],
    ids=["without a copy", "with a copy", "consumed", "with a memory"],
)
def test_it_is_unwritten_if_it_reads_like_that_of_the_snapshot_below(
    below: Snapshot, copies: tuple[str, ...] | None
) -> None:
    unwritten = plan(situation(snapshots=(SET, below)), of=UEFI).unwritten
    assert (unwritten and unwritten.variables) == copies


# --- what is discarded ----------------------------------------------------------------------------------------------


def test_discarding_removes_what_nobody_needs_and_keeps_no_snapshot() -> None:
    planned = plan(discard=True)
    assert planned.change.snapshots == ()
    assert planned.change.removed_layers == ("vda-5", "vdb-6")
    assert [layer.id for layer in planned.removed] == ["vda-5", "vdb-6"]
    assert planned.unwritten is None


def test_discarding_goes_down_to_the_first_layer_that_somebody_needs() -> None:
    planned = plan(situation(snapshots=(LISTED[0],)), discard=True)
    assert planned.change.removed_layers == ("vda-5", "vda-3", "vdb-6", "vdb-4")


def test_discarding_leaves_what_another_machine_reads() -> None:
    clone = chain("vda", 3, 30).active
    at = situation(snapshots=(LISTED[0],), more=(clone,), writers=(Writer("clone", "vda", clone.id),))
    assert plan(at, discard=True).change.removed_layers == ("vda-5", "vdb-6", "vdb-4")


def test_discarding_forgets_a_layer_that_is_not_ours_and_leaves_its_file() -> None:
    foreign = Chain("vda", (*LIVE[0].layers[:2], replace(LIVE[0].active, owned=False)))
    planned = plan(situation((foreign, LIVE[1])), discard=True)
    assert planned.change.removed_layers == ("vda-5", "vdb-6")
    assert [layer.id for layer in planned.removed] == ["vdb-6"]


# --- how the machine is afterwards ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "run", "expected"),
    [
        ("live", None, (True, True, False)),
        ("paused", None, (True, True, True)),
        ("stopped", None, (False, False, False)),
        ("live", "paused", (True, True, True)),
        ("paused", "running", (True, True, False)),
        ("stopped", "running", (False, True, False)),
        ("stopped", "paused", (False, True, True)),
    ],
)
def test_it_is_as_before_or_as_asked(mode: str, run: Run | None, expected: tuple[bool, bool, bool]) -> None:
    planned = plan(mode=mode, run=run)
    assert (planned.live, planned.restart, planned.paused) == expected


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_unknown_snapshot_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="has no snapshot 'zzz'") as caught:
        plan(name="zzz")
    assert (as_typed(caught.value.hint), caught.value.machine) == ("qmpsnap snapshot list web lists them", "web")


def test_a_consumed_snapshot_is_refused_and_the_ways_out_are_told() -> None:
    with pytest.raises(StateError, match="snapshot a of machine web was invalidated") as caught:
        plan(situation(snapshots=(replace(LISTED[0], state="consumed"), LISTED[1])))
    assert as_typed(caught.value.hint) == "choose another one that qmpsnap snapshot list web lists"


def test_a_tag_is_taken_out_into_a_copy_with_the_same_backing() -> None:
    inside = replace(LISTED[1], kind="internal", points=(Point(disk="vda", layer=LayerId("vda-3"), tag="qs-9"),))
    planned = plan(situation(snapshots=(LISTED[0], inside)), "b")
    assert planned.overlays == ()
    assert [(c.disk, c.source.id, c.tag, c.layer.backing) for c in planned.copies] == [
        ("vda", "vda-3", "qs-9", "vda-1")
    ]
    assert planned.change.active == {"vda": planned.copies[0].layer.id}
    assert planned.inside is None


def test_a_volume_that_its_snapshot_is_merged_into_stays_the_active_one() -> None:
    own = replace(chain("vda", 5).active, path="/dev/vg0/web", format="raw")
    volume = replace(own, storage="host_device", identity="lvm:a")
    kept = replace(volume, id=LayerId("vda-9"), path=f"/dev/vg0/qs-{'0' * 32}-9-vda", identity="lvm:b")
    at = situation(
        (Chain(disk="vda", layers=(volume,)), LIVE[1]), (snapshot("a", "vda-9", "vdb-2"), LISTED[1]), more=(kept,)
    )
    assert revert_plan.merge_pairs(at, at.snapshots[0], machine().spec) == ((volume, kept),)
    merge = VolumeMerge(disk="vda", layer=volume, snapshot=kept, reserve=MIB, moves=7)
    inputs = PlanInputs(basis=at.basis, serial=OperationId(17), home=home_at(Path("/q")), mode="live")
    planned = revert_plan.plan(inputs, at, RevertRequest(name="a", discard=True), revert_plan.Storage((merge,)))
    assert (planned.merges, planned.clones, [one.disk for one in planned.overlays]) == ((merge,), (), ["vdb"])
    assert (planned.change.active, planned.change.layers[-1]) == ({"vdb": "vdb-17"}, kept)
    assert "vda-5" not in planned.change.removed_layers
    text = text_of(document_of(Preview(plan=planned, unwritten=False, moves=7)))
    assert f"  merge {kept.path} into /dev/vg0/web, and take it anew" in text.splitlines()
    assert text.endswith("bytes to move: 7")


def test_a_point_that_somebody_writes_to_is_refused() -> None:
    with pytest.raises(StateError, match="machine other writes to layer vda-1, which holds snapshot a"):
        plan(situation(writers=(Writer("other", "vda", LayerId("vda-1")),)))


# --- a broken one, on real files and a real store -------------------------------------------------------------------


@pytest.fixture
def tool() -> ImageTool:
    found = shutil.which(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing; in CI these tests must run")
        pytest.skip("qemu-img is not installed")
    return ImageTool(found)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "qmpsnap.db", machines=tmp_path / "machines") as opened:
        yield opened


async def broken(
    store: SqliteStore, folder: Path, tool: ImageTool, *, step: str, discard: bool = False, mode: str = "stopped"
) -> tuple[BenchContext, RevertPlan]:
    """A machine on ``vda-1 <- vda-2`` with a snapshot at ``vda-1``, and a revert to it that died after that step."""
    context = context_on(store, folder)
    web = machine(machine().spec.disks[0])
    place = context.home.machine_dir("web")
    place.mkdir(parents=True)
    live = chain("vda", 1, 2, folder=str(place))
    await tool.create_base(live.base.path, format="qcow2", virtual_size=MIB)
    made = await tool.create_overlay(live.active.path, backing=live.base, virtual_size=MIB)
    live = Chain("vda", (live.base, replace(live.active, device=made.device, inode=made.inode)))
    change = Change(
        define=web, layers=live.layers, active={"vda": live.active.id}, snapshots=(snapshot("a", "vda-1"),), current="a"
    )
    first = journalled(store, DefinePlan(machine="web", images=(), overlays=(), change=change), serials=2)
    store.settle(first.id, "web", change)
    request = RevertRequest(name="a", discard=discard)
    inputs = PlanInputs(
        basis=store.basis("web"), serial=OperationId(store.next_serial()), home=context.home, mode=mode, now=1.0
    )
    planned = revert_plan.plan(inputs, Situation(basis=inputs.basis, running=True, bytes={}), request)
    operation = journalled(store, planned)
    assert isinstance(operation.plan, RevertPlan)
    for overlay in operation.plan.overlays:
        await tool.create_overlay(overlay.layer.path, backing=overlay.backing, virtual_size=MIB)
    if step != "planned":
        store.mark(operation.id, "running", step=step)
    return context, operation.plan


def dirty(path: str) -> None:
    """One entry in the L1 table, as after the first write."""
    with Path(path).open("r+b") as file:
        file.seek(40)
        offset = int.from_bytes(file.read(8))
        file.seek(offset)
        file.write(b"\x80")


async def test_before_the_guest_had_to_end_it_is_undone(store: SqliteStore, tmp_path: Path, tool: ImageTool) -> None:
    context, planned = await broken(store, tmp_path, tool, step="planned")
    qemu = FakeQemu({"vda": ["vda-1", "vda-2"]})
    await end_open(MachineSession(context, store.machine("web"), qemu))
    assert qemu.said == []
    assert store.operations("web")[-1].state == "failed"
    assert not Path(planned.overlays[0].layer.path).exists()
    assert store.chains("web")[0].active.id == "vda-2"


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("discard", [False, True])
async def test_after_it_the_record_switches_and_the_files_decide_what_is_kept(
    store: SqliteStore, tmp_path: Path, tool: ImageTool, *, discard: bool, written: bool
) -> None:
    context, planned = await broken(store, tmp_path, tool, step="stopping", discard=discard)
    old = store.layer(LayerId("vda-2"))
    if written:
        dirty(old.path)
    await end_open(MachineSession(context, store.machine("web"), None))
    assert store.operations("web")[-1].state == "settled"
    assert store.operations("web")[-1].error is None
    active = store.chains("web")[0].active
    assert active.id == planned.overlays[0].layer.id
    found = Path(active.path).stat()
    assert (active.device, active.inode) == (found.st_dev, found.st_ino)
    kept = written and not discard
    assert Path(old.path).exists() == kept
    assert [s.name for s in store.snapshots("web")] == (["a", "auto-3"] if kept else ["a"])
    once = store.operations("web"), store.chains("web"), store.snapshots("web")
    assert await end_open(MachineSession(context, store.machine("web"), None)) == []
    assert (store.operations("web"), store.chains("web"), store.snapshots("web")) == once


async def test_another_file_in_the_place_of_a_layer_that_goes_is_not_removed(
    store: SqliteStore, tmp_path: Path, tool: ImageTool
) -> None:
    context, _ = await broken(store, tmp_path, tool, step="stopping", discard=True)
    old = Path(store.layer(LayerId("vda-2")).path)
    old.rename(tmp_path / "away")
    old.write_text("precious")
    with pytest.raises(OperationPending, match="is not the recorded image"):
        await end_open(MachineSession(context, store.machine("web"), None))
    assert old.read_text() == "precious"
    assert store.operations("web")[-1].step == "switched"
    old.unlink()
    await end_open(MachineSession(context, store.machine("web"), None))
    assert store.operations("web")[-1].state == "settled"


@pytest.mark.parametrize("step", ["stopping", "starting"])
async def test_a_machine_that_ran_and_stands_still_now_is_told_of(
    store: SqliteStore, tmp_path: Path, tool: ImageTool, step: str
) -> None:
    context, _ = await broken(store, tmp_path, tool, step=step, mode="live")
    await end_open(MachineSession(context, store.machine("web"), None))
    error = store.operations("web")[-1].error
    assert error == "interrupted; the machine was not started again"


async def test_a_machine_that_came_up_again_needs_no_word(store: SqliteStore, tmp_path: Path, tool: ImageTool) -> None:
    context, _ = await broken(store, tmp_path, tool, step="starting", mode="live")
    await end_open(MachineSession(context, store.machine("web"), FakeQemu({"vda": ["vda-1", "vda-2"]})))
    assert (store.operations("web")[-1].state, store.operations("web")[-1].error) == ("settled", None)
