"""The QEMU process: started to outlive us, and told again from any other process."""

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
from qmpsnap.machine.starting import alive, surroundings
from qmpsnap.machine.starting.alive import boot_id, children, has_no_memory, is_alive, start_ticks, stat
from qmpsnap.machine.starting.logs import QEMU_LOG
from qmpsnap.machine.starting.privileges import PLAIN, Privileges
from qmpsnap.model.machines.record import Machine, Process

if TYPE_CHECKING:
    import subprocess

_WAITING = b"QEMU waiting for connection on: "
"""The line that each QEMU prints as it starts: it waits for our monitor session before it opens anything."""

_LOG_END = 65536
"""Bytes of a log's end among which the last that was said is looked for."""

_SESSION, _START_TICKS = 3, 19
"""Where ``/proc/PID/stat`` has session and start time, counted from its third field."""


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
    for ended in [pid for pid, known in children.items() if pid != child.pid and known.poll() is not None]:
        del children[ended]  # mostly a wrapper, whose end nobody waits for
    if reused := children.get(child.pid):
        reused.returncode = 0  # ended and reaped by somebody else, or its pid could not be this one's
    children[child.pid] = child
    # The child cannot be gone from /proc before it is reaped, and only `start_ticks` reaps.
    return _record(child.pid, int(stat(child.pid)[_START_TICKS]))


def find(machine: Machine, run_dir: Path, *, not_of: str | None = None) -> Process | None:
    """The live QEMU of a machine, or None; see :func:`qmpsnap.machine.starting.alive.find`."""
    recorded = machine.process
    found = alive.find(recorded, run_dir, uuid=machine.uuid, adopted=machine.adopted is not None, not_of=not_of)
    if recorded and found and (found.pid, found.start_ticks) == (recorded.pid, recorded.start_ticks):
        return recorded
    return _record(found.pid, found.start_ticks, accel=found.accel) if found else None


def existing(pid: int) -> Process | None:
    """The record of a process that somebody else started; None when there is none of that pid."""
    ticks = start_ticks(pid)
    if ticks is None:
        return None
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    started = time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    return replace(_record(pid, ticks), started=started)


def launched(first: Process, argv: Sequence[str], run_dir: Path) -> tuple[Process, ...]:
    """What still runs of a launch: a wrapper need not become QEMU, nor wait for it."""
    given = b"\0".join(os.fsencode(argument) for argument in argv[1:]) + b"\0"
    found, folder = [], _status(run_dir)
    for pid in _pids():
        fields = stat(pid)
        # One that has left the session is known by QEMU's arguments, which nobody else has in this folder.
        if fields and (fields[_SESSION] == str(first.pid) or _was_given(pid, given, folder)):
            ticks = start_ticks(pid)
            found += [] if ticks is None else [_record(pid, ticks)]
    return tuple(found)


def strays(machine: Machine, run_dir: Path) -> tuple[Process, ...]:
    """QEMUs of the machine in that run folder, also one whose starter died before it had written its pid file."""
    given = b"\0" + machine.uuid.encode() + b"\0"
    pids = _pids() if machine.uuid else []  # a machine that is still to be one has none
    folder = _status(run_dir)
    ticks = {pid: start_ticks(pid) for pid in pids if _was_given(pid, given, folder)}
    return tuple(_record(pid, since) for pid, since in ticks.items() if since is not None)


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - there are many


def _was_given(pid: int, given: bytes, folder: os.stat_result | None) -> bool:
    try:
        # The folder first, which is asked more quickly and tells nearly all apart.
        if folder is None or not os.path.samestat(os.stat(f"/proc/{pid}/cwd"), folder):  # noqa: PTH116
            return False
        return given in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended, or is another user's
        return False


def _status(folder: Path) -> os.stat_result | None:
    try:
        return folder.stat()
    except OSError:
        return None


def is_ending(process: Process) -> bool:
    """Whether that very process has no memory any more, so that nobody answers, and still has threads that end."""
    return is_alive(process) and has_no_memory(process.pid)


def folder(process: Process) -> Path | None:
    """Its working folder, which is the run folder for a QEMU that qmpsnap launched; None if it is not known."""
    found = alive.folder(process.pid)
    return None if found is None else Path(found)


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
    return Process(pid=pid, start_ticks=ticks, boot_id=boot_id(), started=time.time(), accel=accel, qemu_version="")
