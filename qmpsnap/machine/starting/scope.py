"""A QEMU in a scope of its own: where systemd runs, it does not end with the session, cron job or unit that started it.

The QEMU is started as everywhere and then moved, so that without systemd, or with one that does not answer, nothing is
different but the control group, which ``/proc`` tells.
"""

import os
import pwd
import subprocess
from pathlib import Path
from typing import Literal

import anyio

from qmpsnap.machine.starting import surroundings
from qmpsnap.model.machines.record import Process

Manager = Literal["system", "user"]
"""Whose systemd it is: root asks the system's, everybody else their own."""

SYSTEMD = Path("/run/systemd/system")
"""It is there where systemd runs as the system manager (``sd_booted``)."""
USERS = Path("/run/user")
LINGERING = Path("/var/lib/systemd/linger")
PROGRAM = "busctl"
DEADLINE = 5.0
"""Seconds for systemd's answer and for the move."""


def manager(uid: int) -> Manager | None:
    """The systemd that a user can ask for a scope; None where there is none."""
    if not SYSTEMD.is_dir():
        return None
    if uid == 0:
        return "system"
    return "user" if (USERS / str(uid) / "systemd" / "private").exists() else None


def lingers(uid: int) -> bool:
    """Whether a user's systemd goes on after their last session has ended."""
    try:
        return (LINGERING / pwd.getpwuid(uid).pw_name).exists()
    except KeyError:
        return False


def unit(machine: str, pid: int) -> str:
    """The scope's name."""
    return f"qmpsnap-{machine}-{pid}.scope"


def call(asked: Manager, machine: str, *pids: int) -> list[str]:
    """The call that makes the scope of a QEMU and moves processes into it (``StartTransientUnit``); pure.

    The QEMU is the first of them.
    """
    return [
        *(PROGRAM, f"--{asked}", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"),
        *("org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", unit(machine, pids[0]), "fail"),
        *("3", "Description", "s", f"QEMU of qmpsnap's machine {machine}"),
        *("PIDs", "au", str(len(pids)), *map(str, pids), "CollectMode", "s", "inactive-or-failed"),
        "0",
    ]


async def enter(machine: str, process: Process, *helpers: int) -> None:
    """Move a QEMU, and helpers that it needs, into a scope of its own, if systemd is there and answers in time.

    :func:`group` tells what became of it.
    """
    import shutil

    uid = os.geteuid()
    asked = manager(uid)
    if asked is None or shutil.which(PROGRAM) is None:
        return
    environment = surroundings.environment(os.environ)
    if asked == "user":
        environment["XDG_RUNTIME_DIR"] = str(USERS / str(uid))
    with anyio.move_on_after(DEADLINE):
        try:
            done = await anyio.run_process(
                call(asked, machine, process.pid, *helpers),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                check=False,
            )
        except OSError:
            return
        # The answer is a job's name: systemd moves the process a moment later.
        while done.returncode == 0 and not is_own(machine, process):
            await anyio.sleep(0.01)


def group(process: Process) -> str:
    """The control group a process is in, as systemd has it; empty where that cannot be told."""
    try:
        lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
    except OSError:
        return ""
    found = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    return found.get("name=systemd") or found.get("") or ""


def is_own(machine: str, process: Process) -> bool:
    """Whether the process is in the scope that was made for it."""
    return group(process).rpartition("/")[2] == unit(machine, process.pid)


def warning(machine: str, process: Process) -> str:
    """A sentence if QEMU will end with the session or unit that started it, although systemd runs; else empty."""
    if not SYSTEMD.is_dir() or is_own(machine, process):
        return ""
    where = group(process) or "unknown"
    return (
        f"QEMU of machine {machine} has no scope of its own and may end with the session or unit that started it"
        f" (control group {where})"
    )
