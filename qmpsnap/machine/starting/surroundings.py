"""What a long-lived QEMU inherits from the process that starts it: nothing of the user's shell.

Working folder, session and umask are set where it is started. Signals that are ignored stay so for a program that is
started, but QEMU sets each that it heeds itself.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from qmpsnap.errors import HostCannot
from qmpsnap.model.layers.chain import Chain

_KEPT = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH",
})  # fmt: skip
_KEPT_PREFIXES = ("LC_", "QEMU_")

_LIMITS = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CORE,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_MEMLOCK,
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_NPROC,
)
"""All but the stack's, which is what every thread would get."""


def environment(ours: Mapping[str, str]) -> dict[str, str]:
    """What QEMU, and a wrapper around it, need of our environment."""
    return {name: value for name, value in ours.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}


@contextmanager
def unblocked() -> Iterator[None]:
    """For the block this thread, and what it starts, has no signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_limits(pid: int) -> None:
    """Raise the limits of a process that has just begun to the hard ones; as far as we may, its priority is usual."""
    with contextlib.suppress(OSError):  # it has ended, or has become another user's
        for limit in _LIMITS:
            hard = resource.prlimit(pid, limit)[1]
            resource.prlimit(pid, limit, (hard, hard))
    with contextlib.suppress(OSError):  # only root may raise it
        os.setpriority(os.PRIO_PROCESS, pid, 0)


def require_room(chains: Iterable[Chain], *, machine: str) -> None:
    """Make sure that no disk is larger than a file may be: the guest's writes beyond the limit would fail."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for chain in chains:
        if hard not in (resource.RLIM_INFINITY, -1) and chain.active.virtual_size > hard:
            raise HostCannot(
                f"disk {chain.disk} of machine {machine} has {chain.active.virtual_size} bytes, above the file size"
                f" limit of {hard}: the guest's writes beyond it would fail",
                hint="raise the hard limit (ulimit -Hf; 'fsize' in /etc/security/limits.conf, LimitFSIZE= of a unit)"
                " and log in again",
                machine=machine,
            )
