"""Whether a machine's QEMU runs: asked of ``/proc`` alone, without anything that is slow to load."""

from __future__ import annotations

import contextlib
import os

from qmpsnap.host.files import read
from qmpsnap.host.value import Value
from qmpsnap.machine.starting.run_files import PID_FILE

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    import subprocess
    from typing import Protocol

    class Recorded(Protocol):
        """What the store has of a QEMU that was started for a machine."""

        @property
        def pid(self) -> int:
            """Of its first thread."""

        @property
        def start_ticks(self) -> int:
            """Field 22 of ``/proc/PID/stat``: clock ticks since boot."""

        @property
        def boot_id(self) -> str:
            """``/proc/sys/kernel/random/boot_id`` at the start."""


_THREADS, _START_TICKS, _MEMORY = 17, 19, 20
"""Where ``/proc/PID/stat`` has threads, start time and virtual size, counted from its third field."""

children: dict[int, subprocess.Popen[bytes]] = {}
"""QEMUs that this very process started, so that they are reaped when they end."""


class Found(Value):
    """A QEMU that runs; ``accel`` as it was told, empty where it is the recorded one."""

    pid: int
    start_ticks: int
    accel: str


def find(
    recorded: Recorded | None, run_dir: str | os.PathLike[str], *, uuid: str, adopted: bool, not_of: str | None
) -> Found | None:
    """The live QEMU of a machine, or None.

    The recorded one counts when pid, start time and boot all agree. A QEMU whose starter died before it could record
    it is found by its own pid file and recognised by the machine's UUID among its arguments; one that is ending, which
    has none any more, by the folder that its last threads work in.

    Args:
        recorded: the one that the store has.
        run_dir: the machine's run folder.
        uuid: of the machine; empty where it has none.
        adopted: somebody else launches its QEMU.
        not_of: path of another home, of which this one is or was a copy: what works there, or was adopted, is its.
    """
    if recorded and is_alive(recorded) and not (not_of and (adopted or _works_in(recorded.pid, not_of))):
        return Found(recorded.pid, recorded.start_ticks, "")
    try:
        pid = int(read(f"{os.fspath(run_dir)}/{PID_FILE}"))
        arguments = read(f"/proc/{pid}/cmdline").split("\0")
    except (OSError, ValueError):
        return None
    here = os.path.realpath(run_dir)
    # Else it is of a copied folder.
    known = bool(uuid) and uuid in arguments and os.path.realpath(f"/proc/{pid}/cwd") == here
    if not known and not (has_no_memory(pid) and here in _thread_folders(pid)):
        return None
    flags = zip(arguments, arguments[1:])  # noqa: B905, RUF007 - pairs, and nothing to load for it
    accel = next((value.split(",")[0] for flag, value in flags if flag == "-accel"), "")
    ticks = start_ticks(pid)
    return None if ticks is None else Found(pid, ticks, accel)


def is_alive(process: Recorded) -> bool:
    """Whether that very process still runs: also one that was killed does, until the last of its threads has ended.

    Till then it has its images open, and a write of it that had begun comes to its end. A zombie has no other threads.
    """
    return process.boot_id == boot_id() and process.start_ticks == start_ticks(process.pid)


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped it, so that its monitor cannot answer."""
    return stat(pid)[:1] in (["T"], ["t"])


def folder(pid: int) -> str | None:
    """The folder it works in, for a QEMU of ours its run folder; None when that cannot be told."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115 - one that was removed is told as that
    except OSError:
        return None


def start_ticks(pid: int) -> int | None:
    """When it was started, in clock ticks since boot; None where it does not run."""
    fields = stat(pid)
    if fields and (fields[0] not in ("Z", "X") or int(fields[_THREADS]) > 1):
        return int(fields[_START_TICKS])
    if child := children.pop(pid, None):
        child.wait()  # ended already: this only reaps it
    return None


def has_no_memory(pid: int) -> bool:
    """Whether the first thread of a process has given its memory up, which it does before it closes its files."""
    return stat(pid)[_MEMORY : _MEMORY + 1] == ["0"]


def stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third (state) on; empty when there is no such process."""
    try:
        text = read(f"/proc/{pid}/stat")
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()  # the second field, the name, may hold anything


def boot_id() -> str:
    """Another one after each boot of this host."""
    return read("/proc/sys/kernel/random/boot_id").strip()


def _works_in(pid: int, home: str) -> bool:
    where = folder(pid)
    return where is not None and f"{where}/".startswith(f"{home.rstrip('/')}/")


def _thread_folders(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found.add(os.readlink(f"/proc/{pid}/task/{thread}/cwd"))  # noqa: PTH115
    return found
