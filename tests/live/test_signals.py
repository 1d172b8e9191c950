"""A command that is interrupted, or whose output nobody takes any more: what it tells became of it is what there is.

The moments are parts of the time that the same command takes undisturbed. When exactly a signal comes is left to
chance: whatever it hits, the answer has to be true.
"""

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Final

import anyio
import pytest
from anyio.abc import Process
from msgspec import Struct

import qmpsnap
from tests.live.machine import MIB, ONE_DISK, context_of, fill, hold_invariants

MOMENTS: Final = 20 if os.environ.get("QMPSNAP_RANDOM") else 2
AGAIN: Final = 0.25
"""Seconds until the second signal, which counts as another one then."""
WAIT: Final = 200.0

TWICE: Final = b"interrupted twice and ended at once"

SIGNALS: dict[str, tuple[signal.Signals, ...]] = {
    "INT": (signal.SIGINT,),
    "TERM": (signal.SIGTERM,),
    "HUP": (signal.SIGHUP,),
    "INT twice": (signal.SIGINT, signal.SIGINT),
}
OUTPUTS = ("stdout closed", "stderr closed", "stdout full")
LINES: dict[str, Callable[[Path, int], list[str]]] = {
    "commit": lambda _, number: ["commit", "still", "vda", "--base", f"s{number}", "--consume", "--bandwidth", "4M"],
    "mirror": lambda place, number: ["mirror", "still", "vda", f"{place}/{number}", "--pivot", "--bandwidth", "8M"],
    "full": lambda _, number: ["snapshot", "create", "still", f"full{number}", "--kind", "full"],
}


class Outcome(Struct, frozen=True):
    """How a command ended; ``told``: its error as JSON, if there was one; ``said``: all that it wrote to stderr."""

    code: int
    told: dict[str, Any]
    said: bytes


Facts = tuple[Any, ...]


async def facts(vm: qmpsnap.MachineHandle) -> Facts:
    """What an operation may have changed, as QEMU and store have it."""
    chains = [(view.ids, view.problems) for view in await vm.chains()]
    return (chains, [(found.name, found.state) for found in await vm.snapshots()])


@asynccontextmanager
async def running(words: list[str], how: str) -> AsyncIterator[Process]:
    """The command line in a session of its own; its signals are as a shell has them that waits for it."""
    out = os.open("/dev/full", os.O_WRONLY) if how == "stdout full" else PIPE
    try:
        process = await anyio.open_process(words, stdin=DEVNULL, stdout=out, stderr=PIPE, start_new_session=True)
    finally:
        if out != PIPE:
            os.close(out)
    async with process:
        yield process


async def disturbed(words: list[str], how: str, after: float) -> Outcome:
    """Run the command, and do that to it ``after`` so many seconds."""
    command = [sys.executable, "-m", "qmpsnap", *words, "--progress", "none", "-o", "json"]
    with anyio.fail_after(WAIT):
        async with running(command, how) as process:
            await anyio.sleep(after)
            for number in SIGNALS.get(how, ()):
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        # Popen would look first whether it has ended, and asyncio would not hear of its exit code.
                        os.kill(process.pid, number)
                    await anyio.sleep(AGAIN)
            for stream in (process.stdout, process.stderr):
                if stream and how == ("stdout closed" if stream is process.stdout else "stderr closed"):
                    await stream.aclose()
            said = b""
            if process.stderr and how != "stderr closed":
                said = b"".join([part async for part in process.stderr])
            await process.wait()
    lines = [line for line in said.decode().splitlines() if line.startswith("{")]
    assert process.returncode is not None
    if b"Traceback" in said and b"qmpsnap/" not in said:  # Python itself was being loaded
        return Outcome(-signal.SIGINT, {}, said)
    assert b"Traceback" not in said, said
    return Outcome(process.returncode, json.loads("".join(lines)) if lines else {}, said)


async def hold_truth(vm: qmpsnap.MachineHandle, outcome: Outcome, before: Facts, *, how: str) -> None:
    """What the command told is what there is; an operation that it left open is ended here."""
    store = context_of(vm).store
    left = store.operations("still", only_open=True)
    if outcome.code == 0:
        assert not left
        assert await facts(vm) != before
        return
    assert how in SIGNALS, outcome
    if outcome.code in {-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}:  # it was being loaded
        assert (left, await facts(vm)) == ((), before)
        return
    if (how, outcome.code) == ("INT twice", 130) and TWICE in outcome.said:  # before the work had a process of its own
        await _ended(vm)
        return
    effect = outcome.told.get("effect")
    assert (outcome.code, outcome.told.get("code")) == (130, "interrupted"), outcome
    if effect == "unknown":
        await _ended(vm)
        return
    assert not left, outcome
    assert (await facts(vm) == before) is (effect == "none"), outcome


async def _ended(vm: qmpsnap.MachineHandle) -> None:
    """End what was left; a command that was interrupted twice may keep its lock for a moment."""
    with anyio.fail_after(WAIT):
        while True:
            try:
                await vm.recover()
            except qmpsnap.errors.LockHeld:
                await anyio.sleep(0.1)
            except qmpsnap.errors.OperationPending:
                await vm.cancel()
            else:
                return


@pytest.mark.grid
@pytest.mark.parametrize("how", [*SIGNALS, *OUTPUTS])
@pytest.mark.parametrize("verb", LINES)
async def test_the_outcome_told_is_the_outcome_there_is(
    q: qmpsnap.Controller, place: Path, verb: str, how: str
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    took = 0.0
    for number in range(MOMENTS + 1):
        await vm.snapshot(f"s{number}")
        await fill(vm, "vda", number + 1, length=4 * MIB)
        before, begun = await facts(vm), time.monotonic()
        words = LINES[verb](place, number)
        if number == 0:
            assert (await disturbed(words, "", 0)).code == 0
            took = time.monotonic() - begun
            continue
        outcome = await disturbed(words, how, took * (number - 0.5) / MOMENTS)
        await hold_truth(vm, outcome, before, how=how)
        assert await vm.state() == "running"
        await hold_invariants(vm)


TELLS_SLOWLY = """
import sys, time
from qmpsnap.cli import main, output
report = output.report
def slowly(error, form):
    report(error, form)
    time.sleep(2)
output.report = slowly
main.run()
"""


async def test_an_end_is_reported_once(q: qmpsnap.Controller) -> None:
    """The second SIGINT comes while the process that works reports the first one."""
    vm = await q.define(ONE_DISK)
    await vm.start()
    await fill(vm, "vda", 1, length=4 * MIB)
    await vm.snapshot("s")
    words = ["stream", "still", "vda", "--bandwidth", "1K", "--progress", "none", "-o", "json"]
    async with await anyio.open_process([sys.executable, "-c", TELLS_SLOWLY, *words], stderr=PIPE) as process:
        with anyio.fail_after(WAIT):
            while not await vm.jobs():
                await anyio.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.stderr
            said = await process.stderr.receive()
            await anyio.sleep(AGAIN)
            process.send_signal(signal.SIGINT)
            async for part in process.stderr:
                said += part
            assert await process.wait() == 130
    (told,) = said.splitlines()
    assert (json.loads(told)["code"], json.loads(told)["effect"]) == ("interrupted", "none")


IGNORED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "qmpsnap", *sys.argv[2:]])
"""


async def test_an_ignored_sigint_is_heeded_and_an_ignored_sighup_is_not(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    await fill(vm, "vda", 1, length=4 * MIB)
    await vm.snapshot("s")
    words = ["stream", "still", "vda", "--bandwidth", "1K", "--progress", "none"]
    async with await anyio.open_process([sys.executable, "-c", IGNORED, "nohup", *words], stderr=PIPE) as process:
        with anyio.fail_after(WAIT):
            while not await vm.jobs():
                await anyio.sleep(0.05)
            process.send_signal(signal.SIGHUP)
            await anyio.sleep(2 * AGAIN)
            (job,) = await vm.jobs()
            assert (job.status, process.returncode) == ("running", None)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            assert process.stderr
            assert b"(stream) was undone; nothing was changed" in await process.stderr.receive()
    assert (await vm.jobs(), context_of(vm).store.operations("still", only_open=True)) == ((), ())
    await hold_invariants(vm)
