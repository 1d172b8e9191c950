"""QEMUs and guards of one test: found by where they work, which is below the test's own home."""

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import psutil

import qmpsnap
from qmpsnap.machine import guard
from qmpsnap.model.home import Home


def kill_qemu(vm: qmpsnap.MachineHandle) -> bool:
    """Kill the machine's QEMU and its worker, those of them that run, and see them end; whether there was one."""
    return kill_qemus(Home.from_environment(os.environ, uid=os.geteuid()).run_dir(vm.name))


def kill_qemus(below: Path) -> bool:
    """Kill every QEMU that works below the folder, and see them end; whether there was one."""
    found = qemus(below)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    for pid in found:
        _see_end(pid)
    return bool(found)


def qemus(below: Path) -> list[int]:
    """Those that work below the folder; found without the store, which may be in the middle of it."""
    return [process.pid for process, words in _working(below) if "-nodefaults" in words]


async def no_guards() -> None:
    """Return once no guard is at work any more: seen twice in a row, as one that forks while we look is missed once."""
    quiet = 0
    with anyio.fail_after(60):
        while quiet < 2:
            quiet = 0 if guards() else quiet + 1
            await anyio.sleep(0.02)


def guards() -> list[psutil.Process]:
    """The guards below this test's home that still watch, and what they have become: recoveries.

    One that is just becoming a recovery has no arguments for that moment.
    """
    return [
        process
        for process, words in _working(Path(os.environ["QMPSNAP_HOME"]))
        if not any(words) or "recover" in words or guard.__file__ in words
    ]


def _working(below: Path) -> Iterator[tuple[psutil.Process, list[str]]]:
    """Every process that works below the folder and has not ended, with its arguments."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cwd").readlink().is_relative_to(below):
                process = psutil.Process(int(folder.name))
                words = process.cmdline()
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process, words
        except (OSError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _see_end(pid: int) -> None:
    """Until its last thread has ended: the first is a zombie before that, and the images are open still."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], 10)[0], f"process {pid} does not end"
        finally:
            os.close(descriptor)
