"""What Ctrl-C or a limit of this process has left: the journal knows what became of the operation we were at."""

import os
from typing import NamedTuple, TypeVar

from qmpsnap.cli.common import reading
from qmpsnap.effect import Effect
from qmpsnap.errors import HostCannot, Interrupted, QmpsnapError
from qmpsnap.model.operations.operation import OPEN_STATES, Operation

E = TypeVar("E", bound=QmpsnapError)

_CANNOT_TELL = (QmpsnapError, OSError, MemoryError, RuntimeError)


def interrupted(machine: str | None) -> Interrupted:
    """The error to report for Ctrl-C."""
    return _told(Interrupted("interrupted", machine=machine), machine)


def limited(machine: str | None, what: str) -> HostCannot:
    """The error to report where the system has refused us something on the way."""
    return _told(HostCannot(what, hint="qmpsnap doctor; ulimit -a", machine=machine), machine)


class Left(NamedTuple):
    """What a process has left: the number of its operation, and that one's effect where it has ended."""

    said: str
    operation: str | None = None
    effect: Effect | None = None


def left_open(machine: str, process: int) -> Left:
    """What became of the operation that this process was at."""
    try:
        operation = _last(machine)
    except _CANNOT_TELL:
        return Left("whether an operation is open is unknown")
    if operation is None or operation.pid != process:
        return Left("no operation is open")
    said = f"operation {operation.id} ({operation.verb}) {_became(operation)}"
    return Left(said, str(operation.id), None if operation.state in OPEN_STATES else _effect(operation))


def _told(error: E, machine: str | None) -> E:
    """The error, with what became of the operation that this process was at."""
    operation = None
    if machine:
        try:
            operation = _last(machine)
        except _CANNOT_TELL:
            error.effect = "none" if isinstance(error, Interrupted) else "unknown"
    if machine is None or operation is None or operation.pid != os.getpid():
        return error
    error.add(f"operation {operation.id} ({operation.verb}) {_became(operation)}")
    error.machine, error.operation = machine, str(operation.id)
    if operation.state in OPEN_STATES:
        error.effect, error.hint = "unknown", f"qmpsnap recover {machine} completes or undoes it"
    else:
        error.effect = _effect(operation)
    return error


def _effect(operation: Operation) -> Effect:
    return operation.effect or ("applied" if operation.state == "settled" else "none")


def _last(machine: str) -> Operation | None:
    with reading() as store:
        return next(iter(store.operations(machine)[-1:]), None)


def _became(operation: Operation) -> str:
    if operation.state in OPEN_STATES:
        return "is open"
    if operation.state == "settled":
        return "was completed"
    return f"was given up; {operation.outcome}" if operation.outcome else "was undone"
