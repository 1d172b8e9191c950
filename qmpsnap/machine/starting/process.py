"""The QEMU process: started to outlive us, and told again from any other process.

Without asyncio and subprocess on purpose: ``list`` asks here whether machines run and must stay quick.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from qmpsnap.errors import HostCannot
from qmpsnap.hint import call
from qmpsnap.host import files, write_errors
from qmpsnap.machine.starting import surroundings
from qmpsnap.machine.starting.argv import PID_FILE
from qmpsnap.machine.starting.logs import QEMU_LOG
from qmpsnap.machine.starting.privileges import PLAIN, Privileges
from qmpsnap.model.machines.record import Machine, Process

if TYPE_CHECKING:
    import subprocess

_WAITING = b"QEMU waiting for connection on: "
"""The line that each QEMU prints as it starts: it waits for our monitor session before it opens anything."""

_LOG_END = 65536
"""Bytes of a log's end among which the last that was said is looked for."""

_SESSION, _THREADS, _START_TICKS, _MEMORY = 3, 17, 19, 20
"""Where ``/proc/PID/stat`` has session, threads, start time and virtual size, counted from its third field."""

_children: "dict[int, subprocess.Popen[bytes]]" = {}
"""QEMUs that this very process started, so that they are reaped when they end."""


def spawn(
    argv: Sequence[str],
    run_dir: Path,
    *,
    inherited: Sequence[int] = (),
    rights: Privileges = PLAIN,
    logs: Path | None = None,
) -> Process:
    """Start QEMU in ``run_dir``, in a session of its own; its output is appended to a new ``qemu.log``."""
    import subprocess

    log = (logs or run_dir) / QEMU_LOG
    try:
        log.unlink(missing_ok=True)  # never written over: what has this name may be another file's second one
        descriptor = files.create_exclusive(log, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        what, remedy = write_errors.reason(log.parent, error)
        raise HostCannot(f"{log} cannot be created: {what}", hint=remedy) from error
    try:

        def begin() -> "subprocess.Popen[bytes]":
            with surroundings.unblocked():
                return subprocess.Popen(
                    argv,
                    cwd=run_dir,
                    env=surroundings.environment(os.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=descriptor,
                    stderr=descriptor,
                    start_new_session=True,
                    umask=0o077,
                    pass_fds=inherited,
                    **rights.popen,
                )

        child = rights.start(begin, argv[0])
        surroundings.raise_limits(child.pid)
    except OSError as error:
        raise HostCannot(f"{argv[0]} cannot be run: {error}", hint=call("doctor") + " shows what is missing") from error
    finally:
        os.close(descriptor)
    for ended in [pid for pid, known in _children.items() if pid != child.pid and known.poll() is not None]:
        del _children[ended]  # mostly a wrapper, whose end nobody waits for
    if reused := _children.get(child.pid):
        reused.returncode = 0  # ended and reaped by somebody else, or its pid could not be this one's
    _children[child.pid] = child
    # The child cannot be gone from /proc before it is reaped, and only `_start_ticks` reaps.
    return _record(child.pid, int(_stat(child.pid)[_START_TICKS]))


def find(machine: Machine, run_dir: Path, *, not_of: str | None = None) -> Process | None:
    """The live QEMU of a machine, or None.

    The recorded one counts when pid, start time and boot all agree. A QEMU whose starter died before it could record it
    is found by its own pid file and recognised by the machine's UUID among its arguments; one that is ending, which has
    none any more, by the folder that its last threads work in. ``not_of``: path of another home, of which this one is
    or was a copy: what works there, or was adopted, is its.
    """
    recorded = machine.process
    if recorded and is_alive(recorded) and not (not_of and (machine.adopted or _works_in(recorded, not_of))):
        return recorded
    try:
        pid = int((run_dir / PID_FILE).read_text())
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    known = bool(machine.uuid) and machine.uuid.encode() in arguments
    known = known and Path(f"/proc/{pid}/cwd").resolve() == run_dir.resolve()  # else it is of a copied folder
    if not known and not (_has_no_memory(pid) and run_dir.resolve() in _thread_folders(pid)):
        return None
    flags = itertools.pairwise(arguments)
    accel = next((value.split(b",")[0].decode() for flag, value in flags if flag == b"-accel"), "")
    ticks = _start_ticks(pid)
    return None if ticks is None else _record(pid, ticks, accel=accel)


def existing(pid: int) -> Process | None:
    """The record of a process that somebody else started; None when there is none of that pid."""
    ticks = _start_ticks(pid)
    if ticks is None:
        return None
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    started = time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    return replace(_record(pid, ticks), started=started)


def launched(first: Process, argv: Sequence[str], run_dir: Path) -> tuple[Process, ...]:
    """What still runs of a launch: a wrapper need not become QEMU, nor wait for it."""
    given = b"\0".join(os.fsencode(argument) for argument in argv[1:]) + b"\0"
    found = []
    for pid in _pids():
        fields = _stat(pid)
        # One that has left the session is known by QEMU's arguments, which nobody else has in this folder.
        if fields and (fields[_SESSION] == str(first.pid) or _was_given(pid, given, run_dir)):
            ticks = _start_ticks(pid)
            found += [] if ticks is None else [_record(pid, ticks)]
    return tuple(found)


def strays(machine: Machine, run_dir: Path) -> tuple[Process, ...]:
    """QEMUs of the machine in that run folder, also one whose starter died before it had written its pid file."""
    given = b"\0" + machine.uuid.encode() + b"\0"
    pids = _pids() if machine.uuid else []  # a machine that is still to be one has none
    ticks = {pid: _start_ticks(pid) for pid in pids if _was_given(pid, given, run_dir)}
    return tuple(_record(pid, since) for pid, since in ticks.items() if since is not None)


def _pids() -> list[int]:
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _was_given(pid: int, given: bytes, run_dir: Path) -> bool:
    proc = Path(f"/proc/{pid}")
    try:
        return given in (proc / "cmdline").read_bytes() and (proc / "cwd").samefile(run_dir)
    except OSError:  # it has ended, or is another user's
        return False


def is_alive(process: Process) -> bool:
    """Whether that very process still runs: also one that was killed does, until the last of its threads has ended.

    Till then it has its images open, and a write of it that had begun comes to its end. A zombie has no other threads.
    """
    return process.boot_id == _boot_id() and process.start_ticks == _start_ticks(process.pid)


def is_ending(process: Process) -> bool:
    """Whether that very process has no memory any more, so that nobody answers, and still has threads that end."""
    return is_alive(process) and _has_no_memory(process.pid)


def folder(process: Process) -> Path | None:
    """Its working folder, which is the run folder for a QEMU that qmpsnap launched; None if it is not known."""
    try:
        return Path(os.readlink(f"/proc/{process.pid}/cwd"))  # noqa: PTH115 - one that was removed is told as that
    except OSError:
        return None


def _works_in(process: Process, home: str) -> bool:
    where = folder(process)
    return where is not None and where.is_relative_to(home)


def is_stopped(process: Process) -> bool:
    """Whether a signal or a debugger has stopped it, so that its monitor cannot answer."""
    return _stat(process.pid)[:1] in (["T"], ["t"])


def terminate(process: Process) -> None:
    """Kill that very process, without a chance to hit a later one of the same pid; another user's is left alone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # With the descriptor open the pid cannot pass to another process between this look and the signal.
        if is_alive(process):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    finally:
        os.close(descriptor)


def log_tail(folder: Path, *, limit: int = 2000) -> str:
    """The end of what QEMU wrote to its log in ``folder``, printable."""
    try:
        with (folder / QEMU_LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_END))
            raw = file.read()
    except OSError:
        return ""
    said = b"\n".join(line for line in raw.split(b"\n") if _WAITING not in line)[-limit:]
    return "".join(c for c in said.decode(errors="replace") if c.isprintable() or c == "\n").strip()


def _record(pid: int, ticks: int, *, accel: str = "") -> Process:
    return Process(pid=pid, start_ticks=ticks, boot_id=_boot_id(), started=time.time(), accel=accel, qemu_version="")


def _start_ticks(pid: int) -> int | None:
    fields = _stat(pid)
    if fields and (fields[0] not in ("Z", "X") or int(fields[_THREADS]) > 1):
        return int(fields[_START_TICKS])
    if child := _children.pop(pid, None):
        child.wait()  # ended already: this only reaps it
    return None


def _has_no_memory(pid: int) -> bool:
    """Whether the first thread of a process has given its memory up, which it does before it closes its files."""
    return _stat(pid)[_MEMORY : _MEMORY + 1] == ["0"]


def _thread_folders(pid: int) -> set[Path]:
    found = set()
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found.add((thread / "cwd").readlink())
    return found


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third (state) on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()  # the second field, the name, may hold anything


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
