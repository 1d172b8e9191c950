"""Refusals by the system, in words: the one place that knows which foreign errors are not bugs of qmpsnap.

A refusal that allows a precise message is reported where it happens; this is for all others. Loaded before a limit of
the process can keep it from being loaded.
"""

import errno
import sys

from qmpsnap.errors import HostCannot, QmpsnapError

_LIMITS = {
    errno.EMFILE: "this process has reached its limit of open files (ulimit -n)",
    errno.ENFILE: "this host has reached its limit of open files",
    errno.ENOMEM: "out of memory (ulimit -v)",
    errno.EAGAIN: "no process or thread can be started (ulimit -u, ulimit -v)",
    errno.EFBIG: "the file exceeds the size limit (ulimit -f)",
}
_NO_THREAD = "can't start new thread"


def refused(error: BaseException) -> str | None:
    """What the system has refused; None if an uncaught error is a bug of qmpsnap."""
    if what := _said(error):
        sys.unraisablehook = lambda _: None  # what falls apart after that has nothing new to say
    return what


def translated(error: BaseException) -> QmpsnapError | None:
    """The error as callers know it, with effect ``unknown``; None if it is a bug, or an exit."""
    if isinstance(error, QmpsnapError):
        return error
    if not isinstance(error, Exception) or isinstance(error, BrokenPipeError):  # that is the caller's own output
        return None
    from qmpsnap.hint import call

    what = _said(error)
    return None if what is None else HostCannot(what, hint=call("doctor") + "; ulimit -a", effect="unknown")


def _said(error: BaseException) -> str | None:
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_said, error.exceptions)), None)
    if isinstance(error, OSError):
        what = _LIMITS.get(error.errno or 0) or f"a system call failed: {error.strerror or error}"
        return f"{what}: {error.filename}" if error.filename else what
    if isinstance(error, MemoryError):
        return _LIMITS[errno.ENOMEM]
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return _LIMITS[errno.EAGAIN]
    if isinstance(error, ImportError) and error.path:  # a library that cannot be mapped
        return f"{_LIMITS[errno.ENOMEM]}: {error}"
    # Who cleans up after a limit may stumble over what was never made, as asyncio does.
    before = error.__cause__ or error.__context__
    known = isinstance(before, MemoryError) or getattr(before, "errno", None) in _LIMITS
    return _said(before) if before and known else None
