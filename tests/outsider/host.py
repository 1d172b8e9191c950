"""What the host does to a command line: its clock, its disk, its limits, calls that fail."""

import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest

from tests.harness import failing
from tests.outsider.faults import Fault, Hit
from tests.outsider.typed import Answer

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
JUMPS = ("-4000d", "-3d", "-1h", "+1h", "+40d", "+4000d", "+0 x20")

CALLS = ("fsync", "fdatasync", "pwrite", "ftruncate", "rename", "unlink", "fsync fdatasync")
ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EACCES)
FAILING = """\
import sys
from tests.harness import failing
calls, after, times, error = sys.argv[1:5]
failing.fail(calls, after=int(after), times=int(times), error=int(error))
sys.argv = ["qmpsnap", *sys.argv[6:]]  # without the script, which is this one
from qmpsnap.cli.main import run
run()
"""


def clock_jumps(hit: Hit, words: list[str]) -> Answer:
    """The command line believes it to be another day; that changes nothing."""
    jump = JUMPS[int(hit.at * len(JUMPS))]
    env = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": jump, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    return hit.begin(words, env=env).wait()


def disk_is_full(hit: Hit, words: list[str]) -> Answer:
    """Little is left on the file system, until the command has ended."""
    hit.disturbs()
    hit.everybody = True
    left = int(hit.at**3 * (3 << 20))
    ballast = hit.world.images / "ballast"
    free = os.statvfs(hit.world.root)
    with ballast.open("wb") as file, contextlib.suppress(OSError):  # a guest may have taken some of it meanwhile
        os.posix_fallocate(file.fileno(), 0, max(4096, free.f_bavail * free.f_frsize - left))
    try:
        return hit.begin(words).wait()
    finally:
        ballast.unlink()


def files_are_limited(hit: Hit, words: list[str]) -> Answer:
    """``ulimit -f``: its own, not that of the QEMU that it starts."""
    hit.disturbs()
    size = int(4096 * 2 ** (hit.at * 10))
    return hit.begin(words, wrapper=["prlimit", f"--fsize={size}:unlimited"]).wait()


class Shim:
    """Calls of the C library that fail, once or from then on."""

    def __init__(self, library: Path) -> None:
        """The library as tests/harness/failing.py makes it."""
        self.library = library

    def __call__(self, hit: Hit, words: list[str]) -> Answer:
        """One kind of call, the n-th."""
        hit.disturbs()
        call = CALLS[int(hit.at * len(CALLS))]
        error = ERRORS[int(hit.which * len(ERRORS))]
        times = failing.FOR_EVER if hit.dice.random() < 0.4 else 1
        told = [call, str(int(hit.much**2 * 60)), str(times), str(error)]
        env = {"LD_PRELOAD": str(self.library)}
        return hit.begin(words, wrapper=[sys.executable, "-c", FAILING, *told], env=env).wait()


def there(folder: Path, *, small: bool) -> tuple[Fault, ...]:
    """What this host can do."""
    found = [Fault("file size limit", 2, files_are_limited)]
    if FAKETIME.exists():
        found.append(Fault("clock jumps", 3, clock_jumps))
    if small:
        found.append(Fault("disk full", 4, disk_is_full))
    with contextlib.suppress(pytest.skip.Exception):  # there is no gcc
        found.append(Fault("failing calls", 5, Shim(failing.built(folder))))
    return tuple(found)
