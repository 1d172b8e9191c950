"""How a QEMU that somebody else launched is read and spoken to, from its answers alone."""

from pathlib import Path
from typing import Any

import pytest

from qmpsnap.block import foreign
from qmpsnap.block.image.header import FoundLayer, Header
from qmpsnap.errors import StateError
from qmpsnap.model.home import Home
from qmpsnap.model.machines.adoption import FOREIGN, Adoption
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, NodeName, OperationId
from qmpsnap.ops.adoption import adopt
from qmpsnap.ops.adoption.adopt import AdoptedDisk, Survey
from qmpsnap.ops.lifecycle.disk_sources import DiskSource
from qmpsnap.qmp.commands import Backend, BlockGraph, GraphEdge, GraphNode, ImageInfo, NodeInfo

HOME = Home(data=Path("/d"), run=Path("/r"), cache=Path("/c"))
ADOPTION = Adoption(
    socket="/s",
    uuid="u",
    disks={"vda": "virtio0"},
    nodes={LayerId("vda-1"): NodeName("#block1"), LayerId("vda-2"): NodeName("vda-1")},
)


def node(name: str, driver: str, file: str = "", size: int = 512) -> NodeInfo:
    return NodeInfo(node_name=name, ro=False, drv=driver, file=file, image=ImageInfo(file, driver, size))


NODES = [
    node("slow", "throttle", "json:{}"),
    node("fmt", "qcow2", "json:{}"),
    node("p1", "file", "/i/top"),
    node("#block3", "raw", "json:{}"),
    node("p2", "host_device", "/dev/x"),
    node("net", "nbd", "nbd://h/e"),
    node("odd", "vmdk", "/i/odd"),
]


def graph(*edges: tuple[str, str, str]) -> BlockGraph:
    """A graph of the device ``d`` and the nodes above, by (parent, edge, child)."""
    ids = {"d": 1} | {found.node_name: number for number, found in enumerate(NODES, start=2)}
    vertices = [
        GraphNode(1, "block-backend", "d"),
        *(GraphNode(ids[n.node_name], "block-driver", n.node_name) for n in NODES),
    ]
    return BlockGraph(tuple(vertices), tuple(GraphEdge(ids[a], ids[b], name) for a, name, b in edges))


WHOLE = (
    ("d", "root", "slow"),
    ("slow", "file", "fmt"),
    ("fmt", "file", "p1"),
    ("fmt", "backing", "#block3"),
    ("#block3", "file", "p2"),
)


def test_files_are_those_of_the_protocol_nodes_below() -> None:
    found = foreign.read_disk(Backend("d"), graph(*WHOLE), NODES)
    assert found.filters == ("slow",)
    assert [(layer.node, layer.format, layer.path) for layer in found.layers] == [
        ("#block3", "raw", "/dev/x"),
        ("fmt", "qcow2", "/i/top"),
    ]


def test_a_protocol_node_alone_is_a_raw_image() -> None:
    found = foreign.read_disk(Backend("d"), graph(("d", "root", "p1")), NODES)
    assert [(layer.node, layer.format) for layer in found.layers] == [("p1", "raw")]


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([("d", "root", "fmt"), ("fmt", "file", "net")], "over 'nbd' .nbd://h/e."),
        ([("d", "root", "odd")], "of format 'vmdk'"),
        ([("d", "root", "fmt"), ("fmt", "file", "p1"), ("fmt", "data-file", "p2")], "external data file"),
        ([("d", "root", "fmt"), ("fmt", "file", "p1"), ("fmt", "backing", "slow")], "between two of its layers"),
        ([("d", "root", "fmt")], "has no file"),
        ([], "no image"),
    ],
)
def test_what_is_not_made_of_files_is_refused(edges: list[tuple[str, str, str]], said: str) -> None:
    with pytest.raises(StateError, match=said):
        foreign.read_disk(Backend("d"), graph(*edges), NODES)


@pytest.mark.parametrize(
    ("drives", "names"),
    [
        ([("virtio0", "/machine/peripheral-anon/device[0]/virtio-backend")], ["virtio0"]),
        (
            [("", "/machine/peripheral/disk0/virtio-backend"), ("", "/machine/peripheral-anon/device[1]")],
            ["disk0", "vda"],
        ),
        ([("ide0-hd0", "/machine/unattached/device[4]"), ("D0", "/machine/peripheral/vda")], ["vdb", "vda"]),
        ([("", "scsi0"), ("scsi0", "/machine/unattached/device[2]")], ["scsi0", "vda"]),
        ([("", "a.b")] * 3, ["vda", "vdb", "vdc"]),
    ],
)
def test_names_of_disks(drives: list[tuple[str, str]], names: list[str]) -> None:
    assert adopt.names([Backend(device, qdev) for device, qdev in drives]) == names


def test_many_nameless_disks() -> None:
    names = adopt.names([Backend("", "a.b")] * 60)
    assert (names[25], names[26], names[59]) == ("vdz", "vdaa", "vdbh")
    assert len(set(names)) == 60


def test_which_drives_are_disks() -> None:
    inserted = node("n", "raw")
    disks, left_out = adopt.choose(
        [
            Backend("a", "x", inserted=inserted),
            Backend("cd", "x", removable=True, inserted=inserted),
            Backend("empty", "x"),
            Backend("pflash0", "x", inserted=inserted),
            Backend("", "/machine/system.flash1", inserted=inserted),
            Backend("spare", None, inserted=inserted),
        ]
    )
    assert [disk.device for disk in disks] == ["a"]
    assert [reason.partition(":")[0] for reason in left_out] == [
        "cd",
        "empty",
        "pflash0",
        "/machine/system.flash1",
        "spare",
    ]


def test_names_go_out_as_theirs_and_come_back_as_ours() -> None:
    sent = {"actions": [{"type": "blockdev-snapshot", "data": {"node": "vda-2", "overlay": "vda-9"}}]}
    assert ADOPTION.names.sent(sent) == {
        "actions": [{"type": "blockdev-snapshot", "data": {"node": "vda-1", "overlay": "vda-9"}}]
    }
    assert ADOPTION.names.sent({"filename": "vda-1", "file": {"node-name": "vda-1"}, "devices": ["vda-1", "x"]}) == {
        "filename": "vda-1",
        "file": {"node-name": "#block1"},
        "devices": ["#block1", "x"],
    }
    answer: Any = {
        "nodes": [
            {"id": 1, "type": "block-backend", "name": "virtio0"},
            {"id": 2, "type": "block-backend", "name": "vda"},
            {"id": 3, "type": "block-driver", "name": "vda-1"},
            {"id": 4, "type": "block-driver", "name": "#block1"},
            {"id": 5, "type": "block-driver", "name": "vda-2"},
            {"id": 6, "type": "block-job", "name": "qs.1.vda"},
        ]
    }
    told = ADOPTION.names.told("x-debug-query-block-graph", answer)
    assert [vertex["name"] for vertex in told["nodes"]] == ["vda", "", "vda-2", "vda-1", f"{FOREIGN}vda-2", "qs.1.vda"]
    assert ADOPTION.names.told("query-named-block-nodes", [{"node-name": "#block1"}]) == [{"node-name": "vda-1"}]


def survey(*names: str) -> Survey:
    spec = MachineSpec(name="m", disks=tuple(DiskSpec(name=name, image=f"/i/{name}") for name in names))
    machine = Machine(name="m", uuid="u", host="h", spec=spec, created=0)

    def layer(name: str, path: str) -> foreign.ForeignLayer:
        return foreign.ForeignLayer(NodeName(name), "qcow2", path, 512)

    disks = tuple(
        AdoptedDisk(
            name=name,
            backend=name,
            found=foreign.ForeignDisk((layer(f"b-{name}", "/i/base"), layer(f"t-{name}", f"/i/{name}")), ()),
            read_only=False,
            cache="writeback",
        )
        for name in names
    )
    return Survey(
        machine=machine, adoption=Adoption(socket="/s", uuid="u", disks={}, nodes={}), disks=disks, left_out=()
    )


def sources(*names: str) -> dict[str, DiskSource]:
    def found(path: str) -> FoundLayer:
        return FoundLayer(path=path, format="qcow2", header=Header(format="qcow2", virtual_size=512, file_size=512))

    return {name: DiskSource((found("/i/base"), found(f"/i/{name}")), (None, None)) for name in names}


def test_every_layer_is_somebody_elses_and_every_node_is_remembered() -> None:
    planned = adopt.plan(survey("vda"), sources("vda"), serial=OperationId(4), home=HOME)
    assert planned.created == ()
    assert [(layer.id, layer.owned) for layer in planned.change.layers] == [("vda-4", False), ("vda-5", False)]
    assert planned.change.define is not None
    assert planned.change.define.adopted is not None
    assert planned.change.define.adopted.nodes == {"vda-4": "b-vda", "vda-5": "t-vda"}


def test_one_file_behind_two_nodes_is_refused() -> None:
    with pytest.raises(StateError, match="both read /i/base"):
        adopt.plan(survey("vda", "vdb"), sources("vda", "vdb"), serial=OperationId(4), home=HOME)
