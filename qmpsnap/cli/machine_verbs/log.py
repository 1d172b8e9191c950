"""``log``: the journal of a machine, what was done to it and how that ended. Reads the store alone."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, reading
from qmpsnap.model.timestamps import moment

if TYPE_CHECKING:
    from qmpsnap.model.operations.operation import Operation


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add_for_vm(parsers, "log", _log, help="list the operations of a machine and their outcome, oldest first")
    command.add_argument("--open", action="store_true", help="only open operations")
    add_format(command)


def _log(arguments: argparse.Namespace) -> None:
    with reading() as store:
        store.machine(arguments.machine)
        operations = [_document(found) for found in store.operations(arguments.machine, only_open=arguments.open)]
        pruned = store.pruned.of(arguments.machine)
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "operations": operations,
            "pruned": {"count": pruned.count, "until": moment(pruned.until)} if pruned else None,
        },
        names=[str(operation["operation"]) for operation in operations],
        table=lambda: output.table(
            ("OPERATION", "VERB", "STATE", "STEP", "STARTED", "ERROR"),
            [(o["operation"], o["verb"], o["state"], o["step"], o["started"], _said(o)) for o in operations],
        ),
    )
    if pruned and not arguments.open:
        output.note(f"{pruned.count} older operation(s), up to {moment(pruned.until)}, were removed from the log")


def _said(operation: dict[str, Any]) -> str:
    """The error of a failed operation, and the changes it made nevertheless."""
    if not operation["error"]:
        return "-"
    stays = operation["outcome"] if operation["state"] == "failed" else None
    return f"{operation['error']}; {stays}" if stays else str(operation["error"])


def _document(operation: "Operation") -> dict[str, Any]:
    return {
        "operation": operation.id,
        "verb": operation.verb,
        "state": operation.state,
        "step": operation.step,
        "started": moment(operation.started),
        "updated": moment(operation.updated),
        "pid": operation.pid,
        "error": operation.error,
        "effect": operation.effect,
        "outcome": operation.outcome,
    }
