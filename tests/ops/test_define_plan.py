"""What ``define`` will do, as a value; and which images may not be written to because somebody reads them."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.block.image.header import FoundLayer
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import StateError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import DefinePlan
from qmpsnap.ops.lifecycle import define
from qmpsnap.ops.lifecycle.define import serials_needed
from qmpsnap.ops.lifecycle.disk_sources import DiskSource, Key, require_unshared
from tests.ops.bench import MIB, home_at, machine


def found(path: str, *, inode: int, size: int = MIB) -> FoundLayer:
    header = Header(format="qcow2", virtual_size=size, device=1, inode=inode, file_size=0)
    return FoundLayer(path=path, format="qcow2", header=header)


BASE, TOP = found("/i/base", inode=1), found("/i/top", inode=2, size=3 * MIB)
KNOWN = Layer(id=LayerId("vdx-4"), path="/i/base", format="qcow2", backing=None, virtual_size=MIB, device=1, inode=1)


def plan(of: Machine, sources: dict[str, DiskSource] | None = None, *, variables: bool = False) -> DefinePlan:
    every = {disk.name: DiskSource() for disk in of.spec.disks} | (sources or {})
    return define.plan(of, every, serial=OperationId(7), home=home_at(Path("/q")), variables=variables)


def test_a_disk_by_size_becomes_a_new_image_of_its_format() -> None:
    planned = plan(machine(DiskSpec(name="vda", size=MIB), DiskSpec(name="vdb", size=2 * MIB, format="raw")))
    assert [(image.id, image.path, image.format, image.virtual_size) for image in planned.images] == [
        ("vda-7", "/q/machines/web/vda-7.qcow2", "qcow2", MIB),
        ("vdb-8", "/q/machines/web/vdb-8.raw", "raw", 2 * MIB),
    ]
    assert planned.overlays == ()
    assert planned.change.active == {"vda": "vda-7", "vdb": "vdb-8"}
    assert all(image.owned and image.backing is None for image in planned.images)


def test_a_disk_by_base_becomes_an_overlay_over_layers_that_are_not_ours() -> None:
    planned = plan(machine(DiskSpec(name="vda", base="/i/top")), {"vda": DiskSource((BASE, TOP), (None, None))})
    base, top, overlay = planned.change.layers
    assert [(layer.id, layer.path, layer.backing, layer.owned) for layer in planned.change.layers] == [
        ("vda-7", "/i/base", None, False),
        ("vda-8", "/i/top", "vda-7", False),
        ("vda-9", "/q/machines/web/vda-9.qcow2", "vda-8", True),
    ]
    assert (base.inode, top.inode, overlay.virtual_size) == (1, 2, 3 * MIB)
    assert [(made.layer, made.backing) for made in planned.overlays] == [(overlay, top)]
    assert planned.images == ()
    assert planned.created == (overlay,)


def test_an_overlay_may_be_larger_than_its_base_never_smaller() -> None:
    for size, virtual in ((MIB, 3 * MIB), (5 * MIB, 5 * MIB)):
        disk = DiskSpec(name="vda", base="/i/top", size=size)
        planned = plan(machine(disk), {"vda": DiskSource((TOP,), (None,))})
        assert planned.overlays[0].layer.virtual_size == virtual


def test_a_disk_by_image_is_active_itself_and_no_file_is_made() -> None:
    planned = plan(machine(DiskSpec(name="vda", image="/i/top")), {"vda": DiskSource((BASE, TOP), (None, None))})
    assert (planned.created, planned.change.active) == ((), {"vda": "vda-8"})


def test_a_layer_that_the_store_knows_keeps_its_id_and_takes_no_number() -> None:
    source = DiskSource((BASE,), (KNOWN,))
    of = machine(DiskSpec(name="vda", base="/i/base"))
    planned = plan(of, {"vda": source})
    assert [layer.id for layer in planned.change.layers] == ["vda-7"]
    assert planned.overlays[0].backing == KNOWN
    assert serials_needed(of.spec, {"vda": source}) == 1


def test_two_disks_on_one_base_share_its_layers() -> None:
    of = machine(DiskSpec(name="vda", base="/i/top"), DiskSpec(name="vdb", base="/i/top"))
    sources = {"vda": DiskSource((BASE, TOP), (None, None)), "vdb": DiskSource((BASE, TOP), (None, None))}
    planned = plan(of, sources)
    assert [layer.id for layer in planned.change.layers] == ["vda-7", "vda-8", "vda-9", "vdb-10"]
    assert [overlay.layer.backing for overlay in planned.overlays] == ["vda-8", "vda-8"]
    assert serials_needed(of.spec, sources) == 4


@pytest.mark.parametrize(
    ("disks", "sources", "needed"),
    [
        ((), {}, 1),
        ((DiskSpec(name="vda", size=1),), {"vda": DiskSource()}, 1),
        ((DiskSpec(name="vda", image="/i/base"),), {"vda": DiskSource((BASE,), (KNOWN,))}, 1),
        ((DiskSpec(name="vda", image="/i/top"),), {"vda": DiskSource((BASE, TOP), (KNOWN, None))}, 1),
        ((DiskSpec(name="vda", base="/i/top"),), {"vda": DiskSource((BASE, TOP), (None, None))}, 3),
    ],
)
def test_as_many_numbers_are_taken_as_layers_are_new_and_one_at_least(
    disks: tuple[DiskSpec, ...], sources: dict[str, DiskSource], needed: int
) -> None:
    of = replace(machine(), spec=replace(machine().spec, disks=disks))
    assert serials_needed(of.spec, sources) == needed
    assert len(plan(of, sources).change.layers) <= needed


@pytest.mark.parametrize(("variables", "path"), [(True, "/q/machines/web/vars.fd"), (False, None)])
def test_a_variable_store_is_the_machines_own(*, variables: bool, path: str | None) -> None:
    assert plan(machine(), variables=variables).variables == path


# --- who reads, who writes ------------------------------------------------------------------------------------------

WRITTEN: dict[Key, str] = {(1, 2): "db"}
READ: dict[Key, str] = {(1, 1): "db", (1, 2): "db"}


def refuse(*disks: DiskSpec, known: Layer | None = None, others: bool = True, **sources: tuple[FoundLayer, ...]) -> str:
    """The message with which a machine of these disks is refused beside one that reads base and writes top."""
    every = {name: DiskSource(layers, (known,) * len(layers)) for name, layers in sources.items()}
    with pytest.raises(StateError) as caught:
        require_unshared(machine(*disks).spec, every, writers=WRITTEN if others else {}, readers=READ if others else {})
    assert (caught.value.exit_code, caught.value.effect) == (4, "none")
    return caught.value.message


@pytest.mark.parametrize("kind", ["image", "base"])
def test_an_image_that_another_machine_writes_to_is_refused_under_any_name(kind: str) -> None:
    disk = DiskSpec(name="vda", image="/x") if kind == "image" else DiskSpec(name="vda", base="/x")
    assert "which machine db writes to" in refuse(disk, vda=(BASE, found("/other/name/of/top", inode=2)))
    assert "which machine db writes to" in refuse(disk, vda=(TOP, found("/i/above", inode=3)))


def test_an_image_that_another_machine_reads_is_no_image_to_write_to_under_any_name() -> None:
    disk = DiskSpec(name="vda", image="/x")
    assert "which other machines read" in refuse(disk, vda=(found("/other/name/of/base", inode=1),))
    assert "which other machines read" in refuse(disk, known=KNOWN, others=False, vda=(BASE,))


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_disks_of_a_machine_none_writes_what_the_other_reads(*, turned: bool) -> None:
    disks = [DiskSpec(name="vda", image="/i/base"), DiskSpec(name="vdb", base="/i/base")]
    message = refuse(*(reversed(disks) if turned else disks), others=False, vda=(BASE,), vdb=(BASE,))
    assert "disk vda of web would write to /i/base, which its disk vdb reads" in message


def test_of_two_disks_of_a_machine_only_one_writes_an_image() -> None:
    disks = (DiskSpec(name="vda", image="/i/base"), DiskSpec(name="vdb", image="/i/base"))
    assert "would write to /i/base" in refuse(*disks, others=False, vda=(BASE,), vdb=(BASE,))


@pytest.mark.parametrize(
    "disks",
    [
        (DiskSpec(name="vda", base="/i/base"), DiskSpec(name="vdb", base="/i/base")),
        (DiskSpec(name="vda", image="/i/base", read_only=True), DiskSpec(name="vdb", base="/i/base")),
    ],
    ids=["two-clones", "read-only-and-clone"],
)
def test_any_number_may_read(disks: tuple[DiskSpec, ...]) -> None:
    sources = {disk.name: DiskSource((BASE,), (KNOWN,)) for disk in disks}
    require_unshared(machine(*disks).spec, sources, writers=WRITTEN, readers=READ)
