"""Deaths with kill -9: of a controller at one exact point of its real code, and of the QEMUs it leaves."""

import json
import os
import signal
import sys

import anyio

import qmpsnap
from qmpsnap.machine import worker
from qmpsnap.machine.machine import wait_end
from tests.live.machine import context_of

STORE = "qmpsnap.store.sqlite"
JOBS = "qmpsnap.qmp.jobs"

# Dies with kill -9 right before or after the n-th call of one function of the real code.
DIE_AT = """
import importlib, json, os, signal, sys
module, attribute, when, nth = json.loads(sys.argv[1])
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
    os.kill(os.getpid(), signal.SIGKILL)

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


async def die_at(point: Point, *words: str) -> None:
    """Run one command line in a process of its own that dies there."""
    argv = [sys.executable, "-c", DIE_AT, json.dumps(point), *words]
    done = await anyio.run_process(argv, check=False)
    assert done.returncode == -signal.SIGKILL, f"never came to {point}:\n{done.stderr.decode()}"


async def kill_qemu(vm: qmpsnap.MachineHandle) -> None:
    """Kill the machine's QEMU and its worker, those of them that run, and see them end."""
    context, record = context_of(vm), await vm.record()
    for process in (context.process(record), worker.find(record, context.home.run_dir(vm.name))):
        if process:
            os.kill(process.pid, signal.SIGKILL)
            assert await wait_end(process, deadline=10)
