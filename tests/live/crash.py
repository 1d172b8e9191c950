"""A controller that dies with kill -9 at one exact point of its real code."""

import json
import signal
import sys

import anyio

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
