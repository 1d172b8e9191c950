"""Store, QEMU and files side by side: what is told of each layer, and where the three disagree."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.block.graph import DiskGraph
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import NotFoundError
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change, DefinePlan
from qmpsnap.ops.outside import compare
from qmpsnap.ops.outside.compare import layer_problems, view
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.ops.bench import MIB, BenchContext, FakeQemu, chain, context_on, machine, snapshot
from tests.store.samples import journalled

CHAIN = chain("vda", 1, 3)


def header_of(layer: Layer, below: Layer | None) -> Header:
    """The header of a file that is just as recorded."""
    return Header(
        format=layer.format,
        virtual_size=layer.virtual_size,
        file_size=0,
        backing=below.path if below else None,
        allocated=4096,
        device=layer.device,
        inode=layer.inode,
    )


def headers(found: Chain = CHAIN) -> dict[LayerId, Header | str]:
    return {
        layer.id: header_of(layer, below) for below, layer in zip((None, *found.layers), found.layers, strict=False)
    }


def test_where_all_agree_each_layer_has_its_bytes_its_snapshots_and_no_problem() -> None:
    snapshots = (snapshot("a", "vda-1"), snapshot("b", "vda-1", "vdb-9"), snapshot("c", "vdb-1"))
    seen = view(CHAIN, headers(), snapshots, DiskGraph(("vda-1", "vda-3"), (), ()))
    assert [(layer.layer.id, layer.active, layer.bytes, layer.snapshots, layer.problems) for layer in seen.layers] == [
        ("vda-1", False, 4096, ("a", "b"), ()),
        ("vda-3", True, 4096, (), ()),
    ]
    assert (seen.disk, seen.problems) == ("vda", ())


def test_a_stopped_machine_is_not_compared_with_qemu() -> None:
    assert view(CHAIN, headers(), (), None).problems == ()


@pytest.mark.parametrize(
    ("nodes", "told"),
    [(("vda-1",), "QEMU's chain is vda-1"), ((), "QEMU's chain is unknown to the store")],
)
def test_another_chain_in_qemu_is_the_chains_problem(nodes: tuple[str, ...], told: str) -> None:
    assert view(CHAIN, headers(), (), DiskGraph(nodes, (), ())).problems == (told,)


def test_a_file_that_cannot_be_read_has_no_bytes_and_its_reason_as_the_problem() -> None:
    seen = view(CHAIN, headers() | {LayerId("vda-1"): "there is no image"}, (), None)
    assert [(layer.bytes, layer.problems) for layer in seen.layers] == [(None, ("there is no image",)), (4096, ())]


BASE, TOP = CHAIN.layers


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"inode": 99}, "/m/vda-3.qcow2 is not the recorded file"),
        ({"device": 99}, "/m/vda-3.qcow2 is not the recorded file"),
        ({"backing": "/m/other"}, "the header of /m/vda-3.qcow2 names /m/other as its backing file"),
        ({"backing": "/m/./vda-1.qcow2"}, "the header of /m/vda-3.qcow2 names /m/./vda-1.qcow2 as its backing file"),
        ({"backing": None}, "the header of /m/vda-3.qcow2 names nothing as its backing file"),
        ({"virtual_size": 7}, f"/m/vda-3.qcow2 has virtual size 7, recorded is {MIB}"),
    ],
)
def test_each_contradiction_is_one_sentence(changed: dict[str, object], told: str) -> None:
    assert layer_problems(TOP, BASE, replace(header_of(TOP, BASE), **changed)) == [told]


def test_several_contradictions_are_all_told() -> None:
    found = replace(header_of(TOP, BASE), inode=99, backing=None, virtual_size=7)
    assert len(layer_problems(TOP, BASE, found)) == 3


def test_a_base_of_ours_must_name_no_backing() -> None:
    found = replace(header_of(BASE, None), backing="/m/below")
    assert layer_problems(BASE, None, found) == ["the header of /m/vda-1.qcow2 names /m/below as its backing file"]


@pytest.mark.parametrize(
    ("changed", "backing"),
    [({"owned": False}, "base.qcow2"), ({"format": "raw"}, None)],
    ids=["foreign-relative", "raw"],
)
def test_what_we_did_not_write_is_not_held_against_a_layer(changed: dict[str, object], backing: str | None) -> None:
    layer = replace(TOP, **changed)
    assert layer_problems(layer, BASE, replace(header_of(layer, BASE), backing=backing)) == []


# --- with a store and files -----------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "qmpsnap.db", machines=tmp_path / "machines") as opened:
        yield opened


@pytest.fixture
def context(store: SqliteStore, tmp_path: Path) -> BenchContext:
    """A machine of two raw disks, as recorded."""
    layers = []
    for disk in ("vda", "vdb"):
        path = tmp_path / f"{disk}.raw"
        path.write_bytes(bytes(MIB))
        status = path.stat()
        found = chain(disk, 1).active
        layers.append(
            replace(found, path=str(path), format="raw", owned=False, device=status.st_dev, inode=status.st_ino)
        )
    active = {"vda": layers[0].id, "vdb": layers[1].id}
    change = Change(define=machine(), layers=tuple(layers), active=active)
    plan = DefinePlan(machine="web", images=(), overlays=(), change=change)
    store.settle(journalled(store, plan).id, "web", change)
    return context_on(store, tmp_path)


async def test_a_machine_at_rest_as_recorded_has_no_problem(context: BenchContext) -> None:
    seen = await compare.chains(context, "web")
    assert [(found.disk, found.problems, [layer.problems for layer in found.layers]) for found in seen] == [
        ("vda", (), [()]),
        ("vdb", (), [()]),
    ]
    assert await compare.state(context, machine()) == "stopped"


async def test_a_running_machine_is_compared_disk_by_disk(context: BenchContext) -> None:
    running = replace(context, qemu_now=FakeQemu({"vda": ["vda-1"]}))
    seen = await compare.chains(running, "web")
    assert [found.problems for found in seen] == [(), ("QEMU's chain is unknown to the store",)]
    assert await compare.state(running, machine()) == "running"


async def test_one_disk_is_looked_at_alone_and_an_unknown_one_not_found(context: BenchContext) -> None:
    assert [found.disk for found in await compare.chains(context, "web", "vdb")] == ["vdb"]
    with pytest.raises(NotFoundError, match="no disk 'vdz'"):
        await compare.chains(context, "web", "vdz")
    with pytest.raises(NotFoundError, match="no machine 'nope'"):
        await compare.chains(context, "nope")


async def test_a_file_that_is_gone_or_replaced_is_told(context: BenchContext, tmp_path: Path) -> None:
    (tmp_path / "vda.raw").unlink()
    (tmp_path / "vdb.raw").rename(tmp_path / "kept")
    (tmp_path / "vdb.raw").write_bytes(bytes(2 * MIB))
    (gone,), (replaced,) = (found.layers for found in await compare.chains(context, "web"))
    assert gone.bytes is None
    assert len(gone.problems) == 1
    assert "not the recorded file" in replaced.problems[0]
    assert f"has virtual size {2 * MIB}" in replaced.problems[1]
