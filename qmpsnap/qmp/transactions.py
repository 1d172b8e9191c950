"""Arguments of ``transaction``: snapshots of all disks at one instant, by each of QEMU's actions."""

from collections.abc import Sequence
from typing import Any

from qmpsnap.model.names import NodeName


def snapshot_transaction(pairs: Sequence[tuple[NodeName, NodeName]]) -> dict[str, Any]:
    """Arguments of the ``transaction`` that puts the overlay of each (node, overlay) on that node: all or none."""
    return {
        "actions": [
            {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}} for node, overlay in pairs
        ]
    }


def sync_transaction(overlays: Sequence[tuple[NodeName, NodeName, str]]) -> dict[str, Any]:
    """The same of each (node, overlay, its qcow2 file), which QEMU opens itself (``blockdev-snapshot-sync``)."""
    return {
        "actions": [
            {
                "type": "blockdev-snapshot-sync",
                "data": {
                    "node-name": node,
                    "snapshot-node-name": overlay,
                    "snapshot-file": path,
                    "format": "qcow2",
                    "mode": "existing",
                },
            }
            for node, overlay, path in overlays
        ]
    }


def internal_transaction(nodes: Sequence[NodeName], tag: str) -> dict[str, Any]:
    """Arguments of the ``transaction`` that puts a tag into each node's image (``blockdev-snapshot-internal-sync``)."""
    return {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": {"device": n, "name": tag}} for n in nodes]}
