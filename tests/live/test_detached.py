"""``--detach``: a command that returns while its job runs, and a process that sees the job to its end."""

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from subprocess import PIPE, run
from typing import Any

import anyio
import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.machine.starting import alive
from tests.live.machine import MIB, ONE_DISK, fill, hold_invariants

QMPSNAP = (sys.executable, "-m", "qmpsnap")
SLOW = ("--bandwidth", "1K", "--detach", "-o", "json")
WAIT = 60.0


async def said(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, once it and all that has its output open have ended."""
    done = await to_thread.run_sync(
        lambda: run([*QMPSNAP, *words], check=False, capture_output=True, text=True, timeout=WAIT)
    )
    return done.returncode, done.stdout, done.stderr


async def detached(q: qmpsnap.Controller, *, mib: int = 6) -> tuple[qmpsnap.MachineHandle, dict[str, Any]]:
    """A machine whose active layer a process in the background commits slowly."""
    vm = await q.define(ONE_DISK)
    await vm.start()
    await vm.snapshot("s")
    await fill(vm, "vda", 0x55, length=mib * MIB)
    code, out, err = await said("commit", "still", "vda", "--consume", *SLOW)
    assert (code, err) == (0, "hint: qmpsnap job wait still\n")
    return vm, json.loads(out)


async def waited_for(act: Callable[..., Awaitable[Any]], *arguments: object) -> tuple[int, Any, str]:
    """``job wait``, and what is done once it has told of the job: its exit code, what that returns, and its stderr."""
    words = (*QMPSNAP, "job", "wait", "still", "--progress", "json")
    async with await anyio.open_process(words, stderr=PIPE) as process:
        assert process.stderr
        with anyio.fail_after(WAIT):
            told = await process.stderr.receive()
            done = await act(*arguments)
            async for part in process.stderr:
                told += part
            return await process.wait(), done, told.decode()


async def until_ended(pid: int) -> None:
    with anyio.fail_after(WAIT):
        while alive.start_ticks(pid) is not None:
            await anyio.sleep(0.05)


async def test_the_job_goes_on_and_can_be_waited_for(q: qmpsnap.Controller) -> None:
    vm, told = await detached(q)
    (job,) = await vm.jobs()
    assert (job.id, job.type, job.status) == (told["job"], told["type"], "running")
    assert job.waiting
    assert str(told["process"]) in job.waiting
    assert os.getsid(told["process"]) == told["process"], "it is of no terminal's session"
    code, _, err = await waited_for(vm.set_speed, 0)
    assert (code, err.splitlines()[-1]) == (0, "still: operation 3 (commit) is complete")
    await until_ended(told["process"])
    (chain,) = await vm.chains()
    assert len(chain.ids) == 1
    await hold_invariants(vm)


async def test_a_job_that_is_cancelled_is_told_to_who_waits(q: qmpsnap.Controller) -> None:
    vm, told = await detached(q)
    code, ended, err = await waited_for(vm.cancel)
    assert [operation.state for operation in ended] == ["failed"]
    assert code == qmpsnap.errors.QmpError.exit_code
    assert "qmpsnap: operation 3 (commit) has failed: " in err
    await until_ended(told["process"])
    await hold_invariants(vm)


async def test_a_process_that_is_killed_leaves_a_job_as_any_command_does(q: qmpsnap.Controller) -> None:
    vm, told = await detached(q)
    os.kill(told["process"], signal.SIGKILL)
    await until_ended(told["process"])
    with pytest.raises(qmpsnap.errors.OperationPending):
        await vm.snapshot("next")
    await vm.set_speed(0)
    (operation,) = await vm.wait()
    assert operation.id == 3
    await hold_invariants(vm)


async def test_what_is_refused_or_done_at_once_is_told_by_the_command(q: qmpsnap.Controller, place: Path) -> None:
    vm = await q.define(ONE_DISK)
    code, out, err = await said("stream", "still", "nosuch", "--detach")
    assert (code, out) == (3, "")
    assert "nosuch" in err
    await vm.snapshot("s")
    code, out, err = await said("snapshot", "delete", "still", "s", "--metadata", "--detach")
    assert (code, err) == (0, "")
    assert "deleted s" in out
    code, out, err = await said("mirror", "still", "vda", str(place / "copy"), "--finish", "--detach", "--dry-run")
    assert (code, err) == (0, "")
    assert "would" in out
