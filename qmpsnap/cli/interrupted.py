"""What Ctrl-C or a limit of this process has left: the journal knows what became of the operation we were at."""

import errno
import os
from typing import TypeVar

from qmpsnap.cli.common import reading
from qmpsnap.errors import HostCannot, Interrupted, QmpsnapError
from qmpsnap.model.operation import OPEN_STATES, Operation

_LIMITS = {
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this host has no more files to open",
    errno.ENOMEM: "there is no more memory (ulimit -v)",
    errno.EAGAIN: "no more processes or threads can be started (ulimit -u, ulimit -v)",
    errno.EFBIG: "a file may not be as large (ulimit -f)",
}
_NO_THREAD = "can't start new thread"

E = TypeVar("E", bound=QmpsnapError)


def interrupted(machine: str | None) -> Interrupted:
    """The error to report.

    Args:
        machine: the machine that the command was about, if it was about one.
    """
    return _told(Interrupted("interrupted", machine=machine), machine)


def limited(machine: str | None, error: BaseException) -> HostCannot | None:
    """The error to report where the system has refused us something on the way; None where it is our own mistake.

    Args:
        machine: the machine that the command was about, if it was about one.
        error: what nobody has caught.
    """
    what = _refused(error)
    return _told(HostCannot(what, hint="qmpsnap doctor; ulimit -a", machine=machine), machine) if what else None


def _refused(error: BaseException) -> str | None:
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_refused, error.exceptions)), None)
    if isinstance(error, OSError):
        what = _LIMITS.get(error.errno or 0) or f"the system has refused something: {error.strerror or error}"
        return f"{what}: {error.filename}" if error.filename else what
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and isinstance(error.__cause__, MemoryError)):
        return _LIMITS[errno.ENOMEM]
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return _LIMITS[errno.EAGAIN]
    # A library that cannot be mapped.
    return f"{_LIMITS[errno.ENOMEM]}: {error}" if isinstance(error, ImportError) and error.path else None


def _told(error: E, machine: str | None) -> E:
    """The error, with what became of the operation that this process was at."""
    operation = None
    if machine:
        try:
            with reading() as store:
                operation = next(iter(store.operations(machine)[-1:]), None)
        except (QmpsnapError, OSError, MemoryError, RuntimeError):
            error.effect = "none" if isinstance(error, Interrupted) else "unknown"
    if machine is None or operation is None or operation.pid != os.getpid():
        return error
    error.add(f"operation {operation.id} ({operation.verb}) {_became(operation)}")
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
