"""QEMU's block graph as chains: by hand for each rule, and as QEMU 7.2 gave it (``graph-7.2.json``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qmpsnap.block import graph
from qmpsnap.block.graph import DiskGraph, by_disk, require_agreement
from qmpsnap.errors import StateError, StoreMismatch
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.names import LayerId
from qmpsnap.qmp.commands import BlockGraph, GraphEdge, GraphNode
from qmpsnap.qmp.session import COMMAND_DEADLINE
from tests.qmp.deaf import Deaf

RECORDED = Path(__file__).parent / "graph-7.2.json"
"""Virtio disk ``a`` under a mirror job, scsi ``b``, sata ``c``, nvme ``d``, scsi ``e`` throttled; an empty CD."""

VIRTIO = "/machine/peripheral/vda/virtio-backend"


def graph_of(*edges: str, backends: tuple[str, ...] = (VIRTIO,), jobs: tuple[str, ...] = ()) -> BlockGraph:
    """A graph from edges such as ``vda-2 backing vda-1``; names without an edge need only be among the backends."""
    triples = [edge.split(" ") for edge in edges]
    names = dict.fromkeys([*backends, *jobs, *(name for parent, _, child in triples for name in (parent, child))])
    numbers = {name: number for number, name in enumerate(names, 1)}
    kinds = dict.fromkeys(backends, "block-backend") | dict.fromkeys(jobs, "block-job")
    return BlockGraph(
        tuple(GraphNode(number, kinds.get(name, "block-driver"), name) for name, number in numbers.items()),
        tuple(GraphEdge(numbers[parent], numbers[child], name) for parent, name, child in triples),
    )


def chain(*ids: str, disk: str = "vda") -> Chain:
    layers: list[Layer] = []
    for identity in ids:
        backing = layers[-1].id if layers else None
        path = f"/m/{identity}.qcow2"
        layers.append(Layer(id=LayerId(identity), path=path, format="qcow2", backing=backing, virtual_size=1 << 20))
    return Chain(disk, tuple(layers))


PLAIN = (f"{VIRTIO} root vda-2", "vda-2 file vda-2.file", "vda-2 backing vda-1", "vda-1 file vda-1.file")
KNOWN = frozenset({"vda-1", "vda-2"})


# --- the walk -------------------------------------------------------------------------------------------------------


def test_a_plain_chain_is_read_base_first() -> None:
    assert by_disk(graph_of(*PLAIN), KNOWN) == {"vda": DiskGraph(("vda-1", "vda-2"), (), ())}


@pytest.mark.parametrize("hold", ["backing", "file"])
def test_what_stands_between_the_device_and_its_first_known_layer_is_above(hold: str) -> None:
    found = by_disk(graph_of(f"{VIRTIO} root f1", f"f1 {hold} f2", f"f2 {hold} vda-2", *PLAIN[1:]), KNOWN)
    assert found == {"vda": DiskGraph(("vda-1", "vda-2"), ("f1", "f2"), ())}


def test_below_the_first_known_layer_every_image_counts_known_or_not() -> None:
    found = by_disk(graph_of(*PLAIN, "vda-1 backing stranger"), KNOWN)
    assert found["vda"].nodes == ("stranger", "vda-1", "vda-2")


def test_a_chain_that_nobody_knows_has_no_nodes_and_all_of_it_above() -> None:
    found = by_disk(graph_of(*PLAIN), frozenset())
    assert (found["vda"].nodes, found["vda"].above[:2]) == ((), ("vda-2", "vda-1"))


@pytest.mark.parametrize("held", ["vda-1", "vda-2", "filter"])
def test_a_job_that_holds_any_node_of_the_chain_is_named(held: str) -> None:
    edges = (f"{VIRTIO} root filter", "filter backing vda-2", *PLAIN[1:], f"job7 source {held}")
    assert by_disk(graph_of(*edges, jobs=("job7",)), KNOWN)["vda"].jobs == ("job7",)


def test_a_job_elsewhere_is_not_this_disks() -> None:
    edges = (*PLAIN, "vdb root vdb-1", "job7 target vdb-1")
    found = by_disk(graph_of(*edges, backends=(VIRTIO, "vdb"), jobs=("job7",)), KNOWN | {"vdb-1"})
    assert {disk: walked.jobs for disk, walked in found.items()} == {"vda": (), "vdb": ("job7",)}


@pytest.mark.parametrize(
    ("backend", "disk"),
    [
        ("/machine/peripheral/vda/virtio-backend", "vda"),
        ("/machine/peripheral/vda", "vda"),
        ("vda", "vda"),
        ("/machine/peripheral-anon/device[0]/virtio-backend", None),
        ("/machine/unattached/device[3]", None),
        ("", None),
    ],
)
def test_a_backends_name_tells_the_disk_whatever_its_bus(backend: str, disk: str | None) -> None:
    found = by_disk(graph_of(f"{backend} root vda-1", backends=(backend,)), KNOWN)
    assert found == ({disk: DiskGraph(("vda-1",), (), ())} if disk else {})


def test_a_device_without_a_medium_is_left_out() -> None:
    assert list(by_disk(graph_of(*PLAIN, backends=(VIRTIO, "cd")), KNOWN)) == ["vda"]


def test_qemus_own_graph_is_read_right_on_every_bus() -> None:
    recorded = msgspec.json.decode(RECORDED.read_bytes(), type=BlockGraph)
    known = frozenset(name + over for name in "abcde" for over in ("", "2"))
    assert by_disk(recorded, known) == {
        "a": DiskGraph(("a", "a2"), ("#block170",), ("job0",)),
        "b": DiskGraph(("b", "b2"), (), ()),
        "c": DiskGraph(("c", "c2"), (), ()),
        "d": DiskGraph(("d", "d2"), (), ()),
        "e": DiskGraph(("e", "e2"), ("thr",), ()),
    }
    assert graph.node_names(recorded) >= known | {"thr", "m"}
    assert "job0" not in graph.node_names(recorded)


# --- store and QEMU -------------------------------------------------------------------------------------------------


class Fixed(Deaf):
    """A monitor with a graph, and the drivers of some of its nodes."""

    def __init__(self, answer: BlockGraph, drivers: Mapping[str, str] | None = None) -> None:
        self._graph = answer
        self._drivers = drivers or {}

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        deadline: float = COMMAND_DEADLINE,  # noqa: ARG002 - the protocol's
    ) -> Any:
        if command == "x-debug-query-block-graph":
            return msgspec.to_builtins(self._graph)
        assert (command, arguments) == ("query-named-block-nodes", {"flat": True})
        image = {"filename": "f", "format": "qcow2", "virtual-size": 1}
        return [
            {"node-name": name, "ro": False, "drv": driver, "file": f"/files/{name}", "image": image}
            for name, driver in self._drivers.items()
        ]


async def test_the_stores_chain_in_qemu_is_agreement() -> None:
    await require_agreement(Fixed(graph_of(*PLAIN)), [chain("vda-1", "vda-2")], machine="web")


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (chain("vda-1", "vda-3"), "QEMU's chain is vda-1, the store's is vda-1 <- vda-3"),
        (chain("vda-9"), "QEMU's chain is empty, the store's is vda-9"),
        (chain("vda-0", "vda-1", "vda-2"), "QEMU's chain is vda-1 <- vda-2, the store's is vda-0 <- vda-1 <- vda-2"),
        (chain("vda-1", "vda-2", disk="vdx"), "disk vdx of machine web: QEMU's chain is empty"),
    ],
    ids=["another-overlay", "another-chain", "a-base-more", "no-such-device"],
)
async def test_any_other_chain_in_qemu_is_a_mismatch_that_names_both(stored: Chain, told: str) -> None:
    qemu = Fixed(graph_of(*PLAIN))
    with pytest.raises(StoreMismatch) as caught:
        await require_agreement(qemu, [stored], machine="web")
    assert (caught.value.exit_code, caught.value.effect) == (7, "none")
    assert told in caught.value.message


async def test_an_image_that_somebody_put_on_top_is_a_mismatch_that_names_its_file() -> None:
    edges = (f"{VIRTIO} root theirs", "theirs backing vda-2", *PLAIN[1:])
    qemu = Fixed(graph_of(*edges), {"theirs": "qcow2", "vda-2": "qcow2"})
    with pytest.raises(StoreMismatch, match="writes disk vda to /files/theirs, a node that another client inserted"):
        await require_agreement(qemu, [chain("vda-1", "vda-2")], machine="web")


@pytest.mark.parametrize("driver", sorted(graph.FILTERS))
async def test_a_filter_on_top_is_accepted(driver: str) -> None:
    edges = (f"{VIRTIO} root limit", "limit file vda-2", *PLAIN[1:])
    await require_agreement(Fixed(graph_of(*edges), {"limit": driver}), [chain("vda-1", "vda-2")], machine="web")


async def test_a_job_on_the_disk_is_refused_by_its_name() -> None:
    qemu = Fixed(graph_of(*PLAIN, "job7 source vda-2", jobs=("job7",)))
    with pytest.raises(StateError, match="disk vda of machine web is busy with job job7") as caught:
        await require_agreement(qemu, [chain("vda-1", "vda-2")], machine="web")
    assert (caught.value.exit_code, caught.value.effect) == (4, "none")


async def test_every_disk_is_compared_not_only_the_first() -> None:
    edges = (*PLAIN, "vdb root vdb-1")
    qemu = Fixed(graph_of(*edges, backends=(VIRTIO, "vdb")))
    first = chain("vda-1", "vda-2")
    await require_agreement(qemu, [first, chain("vdb-1", disk="vdb")], machine="web")
    with pytest.raises(StoreMismatch, match="disk vdb"):
        await require_agreement(qemu, [first, chain("vdb-1", "vdb-2", disk="vdb")], machine="web")
