"""The chain of a disk of a QEMU that we did not start, read from its graph alone: which node stands for which file.

A node's own ``file`` may be a ``json:{...}`` of the whole tree; the plain name is that of the protocol node below it.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from qmpsnap.block.graph import FILTERS
from qmpsnap.block.image.header import conversion
from qmpsnap.errors import StateError
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.names import NodeName
from qmpsnap.qmp.commands import Backend, BlockGraph, NodeInfo

_PROTOCOLS: Final = ("file", "host_device")


class ForeignLayer(Struct, frozen=True):
    """A node and its file; ``path`` is as QEMU was given it, perhaps relative; ``file`` is the node that reads it."""

    node: NodeName
    format: Format
    path: str
    virtual_size: int
    file: NodeName = NodeName("")


class ForeignDisk(Struct, frozen=True):
    """A chain, base first, and the filters above it, from the device down."""

    layers: tuple[ForeignLayer, ...]
    filters: tuple[NodeName, ...]


def read_disk(backend: Backend, graph: BlockGraph, nodes: Sequence[NodeInfo]) -> ForeignDisk:
    """What stands behind one device; pure.

    Refused where an image is not a qcow2 or raw file or block device, or something stands between two layers.
    """
    reader = _Reader(backend.name, graph, nodes)
    root = reader.below(next((v.id for v in graph.nodes if (v.type, v.name) == ("block-backend", backend.name)), -1))
    at = root.get("root")
    filters = []
    while at is not None and reader.node(at).drv in FILTERS:
        filters.append(NodeName(reader.node(at).node_name))
        at = reader.lower(at)
    layers = []
    while at is not None:
        layers.append(reader.layer(at))
        at = reader.below(at).get("backing")
    if not layers:
        raise StateError(f"device {backend.name} has no image in QEMU's block graph")
    return ForeignDisk(tuple(reversed(layers)), tuple(filters))


class _Reader:
    def __init__(self, device: str, graph: BlockGraph, nodes: Sequence[NodeInfo]) -> None:
        self._device = device
        self._vertices = {vertex.id: vertex for vertex in graph.nodes}
        self._children: dict[int, dict[str, int]] = {}
        for edge in graph.edges:
            self._children.setdefault(edge.parent, {}).setdefault(edge.name, edge.child)
        self._nodes = {node.node_name: node for node in nodes}

    def node(self, at: int) -> NodeInfo:
        name = self._vertices[at].name
        if found := self._nodes.get(name):
            return found
        raise self._refused(f"node {name} appeared while the block graph was read")

    def below(self, at: int) -> Mapping[str, int]:
        return self._children.get(at, {})

    def lower(self, at: int) -> int | None:
        """What a filter filters."""
        children = self.below(at)
        return children.get("file", children.get("backing"))

    def layer(self, at: int) -> ForeignLayer:
        node = self.node(at)
        name = NodeName(node.node_name)
        if node.drv in _PROTOCOLS:
            return ForeignLayer(name, "raw", node.file, node.image.virtual_size, name)
        if node.drv in FILTERS:
            raise self._refused(f"filter node {name} ({node.drv}) is between two of its layers")
        if "data-file" in self.below(at):
            raise self._refused(f"node {name} has an external data file")
        if RbdImage.parse(node.file):  # a raw node, with options that we know
            return ForeignLayer(name, "raw", node.file, node.image.virtual_size, self._below(at, name))
        if node.drv in ("qcow2", "raw"):
            file = self._file(at)
            return ForeignLayer(
                name, "raw" if node.drv == "raw" else "qcow2", file.file, node.image.virtual_size,
                NodeName(file.node_name),
            )  # fmt: skip
        refused = self._refused(f"node {name} is of format {node.drv!r}, not qcow2 or raw")
        if "file" in self.below(at):
            refused.hint = f"end that QEMU; {conversion(self._file(at).file, node.drv)}"
        raise refused

    def _below(self, at: int, name: NodeName) -> NodeName:
        """The node that reads the data of a node."""
        below = self.below(at).get("file")
        return name if below is None else NodeName(self.node(below).node_name)

    def _file(self, at: int) -> NodeInfo:
        below = self.below(at).get("file")
        while below is not None and self.node(below).drv in FILTERS:
            below = self.lower(below)
        if below is None:
            raise self._refused(f"node {self.node(at).node_name} has no file")
        protocol = self.node(below)
        if protocol.drv not in _PROTOCOLS:
            raise self._refused(
                f"node {self.node(at).node_name} is read over {protocol.drv!r} ({protocol.file}), not from a file"
            )
        return protocol

    def _refused(self, why: str) -> StateError:
        return StateError(
            f"device {self._device} cannot be adopted: {why}",
            hint="only disks on qcow2 or raw files, block devices and raw RBD images can be adopted",
        )
