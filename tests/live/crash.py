"""Deaths with kill -9: of a controller at one exact point of its real code, and of the QEMUs it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import psutil

import qmpsnap
from qmpsnap.machine import guard, worker
from qmpsnap.machine.machine import wait_end
from tests.live.machine import context_of

STORE = "qmpsnap.store.sqlite"
JOBS = "qmpsnap.qmp.jobs"

# Dies with kill -9 right before or after the n-th call of one function of the real code.
DIE_AT = """
import importlib, json, os, signal, sys
from qmpsnap.machine.process import existing
module, attribute, when, nth, qemu_too, last = json.loads(sys.argv[1])
owner = importlib.import_module(module)
*path, name = attribute.split(".")
for part in path:
    owner = getattr(owner, part)
real, calls = getattr(owner, name), 0

def counts():
    global calls
    calls += 1
    return calls == nth

def die():
    for qemu in qemus() if qemu_too else ():
        os.kill(qemu, signal.SIGKILL)
        while existing(qemu):
            pass
    signal.raise_signal(last)  # to this very thread: a stop sent to the process lets it run on for a moment

def qemus():
    home = os.environ["QMPSNAP_HOME"] + "/"
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline").read().split(chr(0))
            if "-nodefaults" in words and os.readlink(f"/proc/{pid}/cwd").startswith(home):
                yield int(pid)
        except OSError:
            pass

async def dying_async(*a, **k):
    last = counts()
    if last and when == "before":
        die()
    result = await real(*a, **k)
    if last and when == "after":
        die()
    return result

def dying(*a, **k):
    last = counts()
    if last and when == "before":
        die()
    result = real(*a, **k)
    if last and when == "after":
        die()
    return result

import inspect
setattr(owner, name, dying_async if inspect.iscoroutinefunction(real) else dying)
from qmpsnap.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


Point = tuple[str, str, str, int]
"""Module, function in it, ``before`` or ``after``, and the number of the call."""


async def die_at(point: Point, *words: str, qemu_too: bool = False) -> None:
    """Run one command line in a process of its own that dies there, and see what its guards do about it to its end.

    Args:
        point: where.
        words: the command line.
        qemu_too: every QEMU of this test dies right before it.
    """
    argv = [sys.executable, "-c", DIE_AT, json.dumps([*point, qemu_too, signal.SIGKILL]), *words]
    done = await anyio.run_process(argv, check=False)
    assert done.returncode == -signal.SIGKILL, f"never came to {point}:\n{done.stderr.decode()}"
    await no_guards()


@asynccontextmanager
async def stopped_at(point: Point, *words: str, first: str = "") -> AsyncIterator[anyio.abc.Process]:
    """For the block: a process that runs one command line, stopped there (SIGSTOP); then it goes on to its end.

    Args:
        point: where.
        words: the command line.
        first: what that process runs before all else.
    """
    argv = [sys.executable, "-c", first + DIE_AT, json.dumps([*point, False, signal.SIGSTOP]), *words]
    async with await anyio.open_process(argv, stdout=None, stderr=subprocess.PIPE) as process:
        try:
            with anyio.fail_after(60):
                while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                    await anyio.sleep(0.02)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # the block may have killed it
                process.send_signal(signal.SIGCONT)
            await process.wait()


async def no_guards() -> None:
    """Return once no guard is at work any more: seen twice in a row, as one that forks while we look is missed once."""
    quiet = 0
    with anyio.fail_after(60):
        while quiet < 2:
            quiet = 0 if guards() else quiet + 1
            await anyio.sleep(0.02)


async def kill_qemu(vm: qmpsnap.MachineHandle) -> None:
    """Kill the machine's QEMU and its worker, those of them that run, and see them end."""
    context, record = context_of(vm), await vm.record()
    for process in (context.process(record), worker.find(record, context.home.run_dir(vm.name))):
        if process:
            os.kill(process.pid, signal.SIGKILL)
            assert await wait_end(process, deadline=10)


def guards() -> list[psutil.Process]:
    """The guards below this test's home that still watch, and what they have become: recoveries.

    One that is just becoming a recovery has no arguments for that moment.
    """
    home, found = Path(os.environ["QMPSNAP_HOME"]), []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            ours = not any(words) or "recover" in words or guard.__file__ in words
            if ours and Path(process.cwd()).is_relative_to(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
