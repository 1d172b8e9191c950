"""A snapshot as the command line shows it: its JSON (docs/reference/json.md)."""

from __future__ import annotations

from qmpsnap.model.timestamps import moment

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qmpsnap.model.layers.snapshot import Snapshot
    from qmpsnap.model.names import LayerId
    from qmpsnap.store.sqlite.listing import SnapshotRow

_WORDS = {"consumed": "invalidated"}
"""States as a person reads them, where JSON has another word for them."""


def state_word(state: str) -> str:
    """A snapshot's state in a table."""
    return _WORDS.get(state, state)


def shown(row: SnapshotRow, *, current: str | None, state: str) -> dict[str, Any]:
    """The JSON of a snapshot that is listed.

    Args:
        row: as the store has it.
        current: the snapshot that its machine stands on.
        state: what its files tell.
    """
    return document_of(row, current=current, paths=row.paths, vmstate=row.vmstate, inside=row.inside, state=state)


def document_of(
    snapshot: Snapshot | SnapshotRow,
    *,
    current: str | None,
    paths: Mapping[LayerId, str],
    vmstate: Mapping[str, Any] | None,
    inside: Mapping[str, Any] | None,
    state: str,
) -> dict[str, Any]:
    """The JSON of one snapshot.

    Args:
        snapshot: whatever it was read as.
        current: the snapshot that its machine stands on.
        paths: of its points' layers.
        vmstate: its memory in a file, as plain values.
        inside: its memory inside an image, as plain values.
        state: by the record, or what its files tell.
    """
    # What a commit has overwritten lies nowhere any more: at that place is what somebody else wrote.
    lies = {} if snapshot.state == "consumed" else paths
    return {
        "name": snapshot.name,
        "kind": snapshot.kind,
        "state": state,
        "parent": snapshot.parent,
        "current": current == snapshot.name,
        "created": moment(snapshot.created),
        "description": snapshot.description,
        "tags": snapshot.tags,
        "disks": {
            point.disk: {"layer": point.layer, "path": lies.get(point.layer), "tag": point.tag}
            for point in snapshot.points
        },
        "pause_ms": snapshot.pause_ms,
        "pause_exceeded": snapshot.pause_exceeded,
        "frozen_ms": snapshot.frozen_ms,
        "mode": snapshot.mode,
        "level": snapshot.level,
        "unquiesced": snapshot.unquiesced or None,
        "variables": snapshot.variables,
        "vmstate": _vmstate(vmstate) if vmstate else None,
        "inside": {"layer": inside["layer"], "bytes": inside["bytes"]} if inside else None,
    }


def _vmstate(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": state["path"],
        "bytes": state["bytes"],
        "sha256": state["digest"],
        "mode": state["mode"],
        "layout": state["layout"],
        "compression": state["compression"],
        "steps_ms": state.get("steps_ms", {}),
        "frozen": state.get("frozen", False),
        "qemu": state["hardware"]["qemu_version"],
        "machine_type": state["hardware"]["machine_type"],
    }
