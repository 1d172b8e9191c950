"""The sentence about a snapshot that was just taken, and its JSON."""

import argparse
from collections.abc import Sequence
from typing import Any

from msgspec import to_builtins

from qmpsnap.cli import output
from qmpsnap.cli.common import answering
from qmpsnap.cli.listing.documents import document_of
from qmpsnap.model.layers.snapshot import Snapshot


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
        current = store.machine(arguments.machine).current
        paths = {point.layer: store.layer(point.layer).path for point in snapshot.points}
    document = document_of(
        snapshot,
        current=current,
        paths=paths,
        vmstate=to_builtins(snapshot.vmstate),
        inside=to_builtins(snapshot.inside),
        state=snapshot.state,
    )
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
