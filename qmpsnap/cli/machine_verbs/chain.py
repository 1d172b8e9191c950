"""``chain``: each disk's layers, which snapshot is where, and whether store, QEMU and disk agree."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, on_machine
from qmpsnap.errors import StoreMismatch

if TYPE_CHECKING:
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.ops.base.free_space import Shortage
    from qmpsnap.ops.outside.compare import ChainView


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add_for_vm(parsers, "chain", _chain, help="list the layers, sizes and snapshots of each disk, base first")
    command.add_argument("disk", metavar="DISK", nargs="?", help="only this disk")
    add_format(command)


def _chain(arguments: argparse.Namespace) -> int:
    async def look(vm: "MachineHandle") -> "tuple[tuple[ChainView, ...], tuple[Shortage, ...]]":
        return await vm.chains(arguments.disk), await vm.shortage()

    views, shortage = on_machine(arguments.machine, look)
    documents = [_document(view) for view in views]
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "disks": documents},
        names=[layer["layer"] for document in documents for layer in document["layers"]],
        table=lambda: "\n\n".join(_text(document) for document in documents),
    )
    output.warn(map(str, shortage))
    problems = [problem for document in documents for problem in document["problems"]]
    for problem in problems:
        output.note(f"disagreement: {output.printable(problem)}")
    return StoreMismatch.exit_code if problems and not any(view.busy for view in views) else 0


def _document(view: "ChainView") -> dict[str, Any]:
    return {
        "disk": view.disk,
        "running": view.running,
        "busy": view.busy,
        "layers": [
            {
                "layer": at.layer.id,
                "path": at.layer.path,
                "format": at.layer.format,
                "state": at.layer.state,
                "active": at.active,
                "virtual_size": at.layer.virtual_size,
                "bytes": at.bytes,
                "snapshots": list(at.snapshots),
                "problems": list(at.problems),
            }
            for at in view.layers
        ],
        "problems": [*view.problems, *(problem for at in view.layers for problem in at.problems)],
    }


def _text(document: dict[str, Any]) -> str:
    rows = [
        (
            at["layer"] + (" (active)" if at["active"] else ""),
            at["format"],
            output.size(at["bytes"]),
            ",".join(at["snapshots"]) or "-",
            at["path"],
        )
        for at in document["layers"]
    ]
    asked = "store, QEMU and headers" if document["running"] else "stopped; store and headers"
    if document["busy"]:
        asked = f"in use by {document['busy']}; store and headers"
    agreed = "disagreement, see below" if document["problems"] else f"{asked} agree"
    return f"{document['disk']}: {agreed}\n" + output.table(("LAYER", "FORMAT", "BYTES", "SNAPSHOTS", "PATH"), rows)
