"""What the system refuses a process that has come to one of its limits, in words; loaded before it can be refused."""

import errno
import sys

_LIMITS = {
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this host has no more files to open",
    errno.ENOMEM: "there is no more memory (ulimit -v)",
    errno.EAGAIN: "no more processes or threads can be started (ulimit -u, ulimit -v)",
    errno.EFBIG: "a file may not be as large (ulimit -f)",
}
_NO_THREAD = "can't start new thread"


def refused(error: BaseException) -> str | None:
    """What the system has refused us on the way; None where an error that nobody has caught is our own mistake."""
    if what := _said(error):
        sys.unraisablehook = lambda _: None  # what falls apart after that has nothing new to say
    return what


def _said(error: BaseException) -> str | None:
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_said, error.exceptions)), None)
    if isinstance(error, OSError):
        what = _LIMITS.get(error.errno or 0) or f"the system has refused something: {error.strerror or error}"
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
