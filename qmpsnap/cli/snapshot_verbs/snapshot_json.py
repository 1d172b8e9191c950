"""A snapshot as the command line shows it: the sentence about one just taken, and its JSON."""

import argparse
from collections.abc import Sequence
from typing import Any

from qmpsnap.cli import output
from qmpsnap.cli.common import answering
from qmpsnap.model.layers.snapshot import Snapshot
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.timestamps import moment
from qmpsnap.store.store import Store

_WORDS = {"consumed": "invalidated"}
"""States as a person reads them, where JSON has another word for them."""


def state_word(state: str) -> str:
    """A snapshot's state in a table."""
    return _WORDS.get(state, state)


def print_taken(arguments: argparse.Namespace, snapshot: Snapshot, notes: Sequence[str]) -> None:
    """The snapshot that was taken, how long the guest was paused for it, and what it does not contain (``notes``)."""
    took = f", {snapshot.pause_ms:.1f} ms" if snapshot.pause_ms is not None else ""
    took += f", frozen for {snapshot.frozen_ms:.1f} ms" if snapshot.frozen_ms is not None else ""
    memory = f" and memory ({snapshot.vmstate.mode})" if snapshot.vmstate else " and memory" if snapshot.inside else ""
    disks = ", ".join(point.disk for point in snapshot.points)
    notes = [*notes, *confined(snapshot)]
    for one in snapshot.outside:
        output.note(f"not in the snapshot: {output.printable(one.sentence)}")
    text = f"snapshot {snapshot.name} of {disks}{memory} taken ({snapshot.mode}{took})"
    print_snapshot(arguments, snapshot, text, notes=notes)


def confined(snapshot: Snapshot) -> list[str]:
    """What is to be noted of a snapshot whose memory only this QEMU version can load; said on stderr as well."""
    if snapshot.confined:
        output.note(snapshot.confined)
    return [snapshot.confined] if snapshot.confined else []


def print_snapshot(arguments: argparse.Namespace, snapshot: Snapshot, text: str, **more: Any) -> None:
    """One snapshot, in the form that was asked for; ``text`` is its table, ``more`` stands beside it in JSON."""
    with answering(text) as store:
        document = document_of(store, arguments.machine, snapshot)
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "snapshot": document,
            "outside": [{"name": one.name, "file": one.file} for one in snapshot.outside],
            **more,
        },
        names=[snapshot.name],
        table=lambda: text,
        done=text,
    )


def document_of(store: Store, machine: str, snapshot: Snapshot, state: str | None = None) -> dict[str, Any]:
    """The JSON of one snapshot (docs/reference/json.md); ``state``: what its files tell where it is not said."""
    # What a commit has overwritten lies nowhere any more: at that place is what somebody else wrote.
    paths = {} if snapshot.state == "consumed" else _paths(store, snapshot)
    return {
        "name": snapshot.name,
        "kind": snapshot.kind,
        "state": state or snapshot.state,
        "parent": snapshot.parent,
        "current": store.machine(machine).current == snapshot.name,
        "created": moment(snapshot.created),
        "description": snapshot.description,
        "disks": {
            point.disk: {"layer": point.layer, "path": paths.get(point.layer), "tag": point.tag}
            for point in snapshot.points
        },
        "pause_ms": snapshot.pause_ms,
        "pause_exceeded": snapshot.pause_exceeded,
        "frozen_ms": snapshot.frozen_ms,
        "mode": snapshot.mode,
        "level": snapshot.level,
        "unquiesced": snapshot.unquiesced or None,
        "variables": snapshot.variables,
        "vmstate": _vmstate(snapshot.vmstate) if snapshot.vmstate else None,
        "inside": {"layer": inside.layer, "bytes": inside.bytes} if (inside := snapshot.inside) else None,
    }


def _vmstate(state: Vmstate) -> dict[str, Any]:
    return {
        "path": state.path,
        "bytes": state.bytes,
        "sha256": state.digest,
        "mode": state.mode,
        "layout": state.layout,
        "compression": state.compression,
        "steps_ms": state.steps_ms,
        "frozen": state.frozen,
        "qemu": state.hardware.qemu_version,
        "machine_type": state.hardware.machine_type,
    }


def _paths(store: Store, snapshot: Snapshot) -> dict[str, str]:
    return {point.layer: store.layer(point.layer).path for point in snapshot.points}
