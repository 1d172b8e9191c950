"""How a QEMU that somebody else launched is spoken to: its own names for disks and nodes, and ours for the same.

In a QEMU of our own a node's name is its layer's id. One that somebody else launched has other names (``#block123``,
or its owner's), and they are that process's: the same image may be open in another QEMU under another name. So they
are kept with the machine, not with the layer, and exchanged at its monitor; nothing above ever meets them.

QEMU names the file nodes of images that it opens for ``blockdev-snapshot-sync`` and ``drive-mirror`` itself; those are
kept with the process of any machine.
"""

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId, NodeName

_NODE_KEYS: Final = frozenset(
    {"node-name", "node", "overlay", "device", "top-node", "base-node", "backing", "target", "replaces", "vmstate"}
    | {"devices", "file"}
)
"""Arguments of QMP commands that name nodes."""

FOREIGN: Final = "not-ours:"
"""Put before a node that bears the id of another layer; no node can be named so, and none is."""


class Names(Struct, frozen=True):
    """The names that one QEMU has for our layers' nodes where they are not ours; ``<layer>.file`` is the node below.

    ``disks``: disk to the name of its backend; None where the backends are called as the disks.
    """

    nodes: Mapping[str, str]
    disks: Mapping[str, str] | None = None

    def sent(self, arguments: Any) -> Any:
        """Arguments of a command as this QEMU understands them."""
        if isinstance(arguments, dict):
            return {k: self._sent_name(v) if k in _NODE_KEYS else self.sent(v) for k, v in arguments.items()}
        if isinstance(arguments, list | tuple):
            return [self.sent(value) for value in arguments]
        return arguments

    def _sent_name(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.nodes.get(value, value)
        if isinstance(value, list):
            return [self._sent_name(name) for name in value]
        return self.sent(value)

    def told(self, command: str, answer: Any) -> Any:
        """An answer of this QEMU with our names in it."""
        ours = {node: layer for layer, node in self.nodes.items()}
        if command == "x-debug-query-block-graph" and isinstance(answer, dict):
            disks = None if self.disks is None else {backend: disk for disk, backend in self.disks.items()}
            return {**answer, "nodes": [_vertex(vertex, ours, disks) for vertex in answer.get("nodes", ())]}
        return _named(answer, ours)


class Taken(Struct, frozen=True, kw_only=True):
    """That qmpsnap launches an adopted machine's QEMU itself, once the one that runs has ended.

    ``variables``: the owner's store of UEFI variables, of which the machine gets a copy then; None with a BIOS.
    ``vmgenid``: it gets a generation ID, too.
    """

    spec: MachineSpec
    variables: str | None = None
    vmgenid: bool = False


class Adoption(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What there is to know of such a QEMU.

    Attributes:
        uuid: what it answers to ``query-uuid``; all zeros when it was given none.
        disks: disk to the name of its backend in the block graph: the drive's id, or the device's id or path.
        nodes: of the layers that it had open when it was adopted. Those that we add are named by their ids there, too.
        left_out: devices that the guest writes to and that were no disks to be taken over.
        taken: what the machine is once this QEMU has ended; None as long as only its owner launches it.
    """

    socket: str
    uuid: str
    disks: dict[str, str]
    nodes: dict[LayerId, NodeName]
    left_out: tuple[str, ...] = ()
    taken: Taken | None = None

    @property
    def names(self) -> Names:
        """Its names."""
        return Names({str(layer): node for layer, node in self.nodes.items()}, self.disks)


def _vertex(vertex: dict[str, Any], ours: Mapping[str, str], disks: Mapping[str, str] | None) -> dict[str, Any]:
    match vertex["type"]:
        case "block-driver":
            return {**vertex, "name": _ours(vertex["name"], ours)}
        case "block-backend" if disks is not None:
            # Devices that were left out must not be taken for a disk that happens to have their name.
            return {**vertex, "name": disks.get(vertex["name"], "")}
        case _:
            return vertex


def _named(answer: Any, ours: Mapping[str, str]) -> Any:
    if isinstance(answer, dict):
        return {
            key: _ours(value, ours) if key == "node-name" and isinstance(value, str) else _named(value, ours)
            for key, value in answer.items()
        }
    if isinstance(answer, list):
        return [_named(value, ours) for value in answer]
    return answer


def _ours(name: str, ours: Mapping[str, str]) -> str:
    if (layer := ours.get(name)) is not None:
        return layer
    return FOREIGN + name if name in ours.values() else name
