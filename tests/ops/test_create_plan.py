"""What ``snapshot create`` will do, as a value: no QEMU, no file, no store."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.errors import NameRefused, NameTaken, NotFoundError, StateError
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import CreatePlan
from qmpsnap.model.planning.inputs import Basis, PlanInputs
from qmpsnap.ops.snapshot import plan as create_plan
from qmpsnap.ops.snapshot.plan import CreateRequest
from tests.ops.bench import MIB, chain, home_at, machine, snapshot, with_base

CHAINS = (chain("vda", 1, 3), chain("vdb", 2, size=2 * MIB))


def plan(
    request: CreateRequest | None = None,
    *,
    of: Machine | None = None,
    chains: tuple[Chain, ...] = CHAINS,
    snapshots: tuple[Snapshot, ...] = (),
    mode: str = "live",
) -> CreatePlan:
    basis = Basis(name="web", record=of or machine(), chains=chains, snapshots=snapshots)
    at = PlanInputs(basis=basis, serial=OperationId(17), home=home_at(Path("/q")), mode=mode, now=1700000000.0)
    return create_plan.plan(at, request or CreateRequest())


# --- layers and points ----------------------------------------------------------------------------------------------


def test_every_disk_gets_an_empty_overlay_on_its_active_layer_in_the_machines_folder() -> None:
    made = [
        (overlay.disk, overlay.layer.id, overlay.layer.path, overlay.layer.backing, overlay.backing.id)
        for overlay in plan().overlays
    ]
    assert made == [
        ("vda", "vda-17", "/q/machines/web/vda-17.qcow2", "vda-3", "vda-3"),
        ("vdb", "vdb-17", "/q/machines/web/vdb-17.qcow2", "vdb-2", "vdb-2"),
    ]
    assert [(overlay.layer.virtual_size, overlay.layer.owned) for overlay in plan().overlays] == [
        (MIB, True),
        (2 * MIB, True),
    ]


def test_the_record_changes_to_the_overlays_and_one_snapshot_of_the_frozen_layers() -> None:
    planned = plan(CreateRequest(name="before", description="a note"), of=machine(current="parent"))
    assert planned.change.layers == tuple(overlay.layer for overlay in planned.overlays)
    assert planned.change.active == {"vda": "vda-17", "vdb": "vdb-17"}
    assert planned.change.current == "before"
    (taken,) = planned.change.snapshots
    assert taken.points == (
        Point(disk="vda", layer=CHAINS[0].active.id),
        Point(disk="vdb", layer=CHAINS[1].active.id),
    )
    assert (taken.name, taken.kind, taken.state, taken.parent) == ("before", "disk", "ok", "parent")
    assert (taken.created, taken.description, taken.operation) == (1700000000.0, "a note", 17)


def test_the_overlay_of_a_raw_base_is_qcow2() -> None:
    raw = with_base(chain("vda", 1), format="raw", path="/images/base.raw", owned=False)
    (overlay,) = plan(of=machine(DiskSpec(name="vda", image="/images/base.raw", format="raw")), chains=(raw,)).overlays
    assert (overlay.layer.format, overlay.layer.path) == ("qcow2", "/q/machines/web/vda-17.qcow2")
    assert overlay.backing == raw.active


# --- disks ----------------------------------------------------------------------------------------------------------

DISKS = (
    DiskSpec(name="vda", size=MIB),
    DiskSpec(name="scratch", size=MIB, snapshot=False),
    DiskSpec(name="iso", image="/i", read_only=True),
)
THREE = (chain("vda", 1), chain("scratch", 2), chain("iso", 3))


def test_disks_that_the_spec_leaves_out_and_read_only_ones_are_not_included() -> None:
    planned = plan(of=machine(*DISKS), chains=THREE)
    assert [overlay.disk for overlay in planned.overlays] == ["vda"]
    assert planned.change.snapshots[0].point("scratch") is None


def test_named_disks_are_included_also_one_that_the_spec_leaves_out_and_no_other() -> None:
    planned = plan(CreateRequest(disks=("scratch",)), of=machine(*DISKS), chains=THREE)
    assert planned.change.active == {"scratch": "scratch-17"}


def test_disks_come_in_the_machines_order_each_once_however_they_are_named() -> None:
    planned = plan(CreateRequest(disks=("vdb", "vda", "vdb")))
    assert [overlay.disk for overlay in planned.overlays] == ["vda", "vdb"]


def test_a_read_only_disk_by_name_is_refused() -> None:
    with pytest.raises(StateError, match="disk iso of machine web is read-only") as caught:
        plan(CreateRequest(disks=("vda", "iso")), of=machine(*DISKS), chains=THREE)
    assert (caught.value.exit_code, caught.value.machine) == (4, "web")


def test_an_unknown_disk_is_not_found_and_the_known_ones_named() -> None:
    with pytest.raises(NotFoundError, match="no disk 'vdz'") as caught:
        plan(CreateRequest(disks=("vdz",)))
    assert (caught.value.exit_code, caught.value.hint) == (3, "its disks: vda, vdb")


@pytest.mark.parametrize("disks", [(DISKS[2],), (DISKS[1], DISKS[2])])
def test_a_machine_with_nothing_to_snapshot_is_refused(disks: tuple[DiskSpec, ...]) -> None:
    with pytest.raises(StateError, match="no disk that a snapshot could include"):
        plan(of=machine(*disks), chains=THREE[1:])


def test_an_empty_choice_of_disks_is_refused() -> None:
    with pytest.raises(StateError, match="no disk"):
        plan(CreateRequest(disks=()))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        ((), "snap-1"),
        (("snap-1", "snap-2"), "snap-3"),
        (("snap-2",), "snap-1"),
        (("snap-1", "snap-3"), "snap-2"),
        (("other",), "snap-1"),
        (("snap-01", "snap-1"), "snap-2"),
    ],
)
def test_without_a_name_the_next_free_number_is_taken(taken: tuple[str, ...], free: str) -> None:
    planned = plan(snapshots=tuple(snapshot(name) for name in taken))
    assert planned.change.snapshots[0].name == free == planned.change.current


def test_a_taken_name_is_refused_with_the_time_since_when() -> None:
    with pytest.raises(NameTaken, match="snapshot before since 2023-11-14T22:13:20Z; nothing was changed") as caught:
        plan(CreateRequest(name="before"), snapshots=(snapshot("before", created=1700000000.0),))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["", "A", "-x", "../x", "a b", "a\n", "x" * 64])
def test_a_name_that_is_not_allowed_is_refused(name: str) -> None:
    with pytest.raises(NameRefused) as caught:
        plan(CreateRequest(name=name))
    assert caught.value.exit_code == 2


# --- what QEMU will be told -----------------------------------------------------------------------------------------


def test_a_running_machine_is_told_every_overlay_and_then_one_transaction() -> None:
    chains = (CHAINS[0], CHAINS[1])
    of = machine(DiskSpec(name="vda", size=MIB, cache="none"), DiskSpec(name="vdb", size=MIB, discard=False))
    direct, plain = {"direct": True, "no-flush": False}, {"direct": False, "no-flush": False}

    def add(disk: str, discard: str, cache: dict[str, bool]) -> tuple[str, dict[str, object]]:
        file = {
            "driver": "file",
            "filename": f"/q/machines/web/{disk}-17.qcow2",
            "node-name": f"{disk}-17.file",
            "discard": discard,
            "cache": cache,
        }
        node = {
            "node-name": f"{disk}-17",
            "driver": "qcow2",
            "read-only": False,
            "discard": discard,
            "cache": cache,
            "file": file,
            "backing": None,
        }
        return "blockdev-add", node

    assert create_plan.qmp_commands(plan(of=of, chains=chains), of) == [
        add("vda", "unmap", direct),
        add("vdb", "ignore", plain),
        (
            "transaction",
            {
                "actions": [
                    {"type": "blockdev-snapshot", "data": {"node": "vda-3", "overlay": "vda-17"}},
                    {"type": "blockdev-snapshot", "data": {"node": "vdb-2", "overlay": "vdb-17"}},
                ]
            },
        ),
    ]


@pytest.mark.parametrize(("mode", "live"), [("live", True), ("paused", True), ("stopped", False)])
def test_only_a_machine_that_has_a_qemu_is_told_anything(mode: str, *, live: bool) -> None:
    planned = plan(mode=mode)
    assert planned.live is live
    assert bool(create_plan.qmp_commands(planned, machine())) is live
    assert planned.change.snapshots[0].mode == mode


def test_a_plan_is_the_same_whenever_it_is_made() -> None:
    assert plan() == plan()
    assert replace(plan(mode="paused"), change=plan().change) == plan()
