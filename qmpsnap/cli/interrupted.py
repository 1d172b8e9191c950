"""What Ctrl-C has left: the journal knows what became of the operation that this process was at."""

import contextlib
import os

from qmpsnap.cli.common import reading
from qmpsnap.errors import Interrupted, QmpsnapError
from qmpsnap.model.operation import OPEN_STATES, Operation


def interrupted(machine: str | None) -> Interrupted:
    """The error to report.

    Args:
        machine: the machine that the command was about, if it was about one.
    """
    operation = None
    if machine:
        with contextlib.suppress(QmpsnapError), reading() as store:
            operation = next(iter(store.operations(machine)[-1:]), None)
    if machine is None or operation is None or operation.pid != os.getpid():
        return Interrupted("interrupted", machine=machine)
    error = Interrupted(f"interrupted; operation {operation.id} ({operation.verb}) {_became(operation)}")
    error.machine, error.operation = machine, str(operation.id)
    if operation.state in OPEN_STATES:
        error.effect, error.hint = "unknown", f"qmpsnap recover {machine} finds out and ends it"
    else:
        error.effect = operation.effect or ("applied" if operation.state == "settled" else "none")
    return error


def _became(operation: Operation) -> str:
    if operation.state in OPEN_STATES:
        return "is open"
    if operation.state == "settled":
        return "was completed"
    return f"was given up; {operation.outcome}" if operation.outcome else "was undone"
