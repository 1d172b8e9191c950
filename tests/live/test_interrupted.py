"""Ctrl-C at the command line: it says what became of the operation, in the form that was asked for."""

import json
import signal

import pytest

import qmpsnap
from tests.harness.deaths import JOBS, STORE, Call, stopped_at
from tests.live.machine import context_of, grown_and_stopped

pytestmark = pytest.mark.version


async def interrupt(point: Call, *words: str) -> tuple[int, str]:
    """The exit code and stderr of a command that gets SIGINT there."""
    async with stopped_at(point, *words) as process:
        process.send_signal(signal.SIGINT)
    assert process.returncode is not None
    return process.returncode, process.stderr


async def test_an_operation_that_was_undone(q: qmpsnap.Controller) -> None:
    vm, _, _ = await grown_and_stopped(q)
    await vm.start(paused=True)
    code, told = await interrupt(Call(JOBS, "follow", "before", 1), "stream", "still", "vda", "--progress", "none")
    last = context_of(vm).store.operations("still")[-1]
    assert (code, last.state) == (130, "failed")
    assert told == f"qmpsnap: interrupted; operation {last.id} (stream) was undone; nothing was changed\n"


async def test_an_operation_that_was_completed(q: qmpsnap.Controller) -> None:
    vm, _, _ = await grown_and_stopped(q)
    await vm.start(paused=True)
    line = ("snapshot", "create", "still", "kept", "-o", "json")
    code, told = await interrupt(Call(STORE, "SqliteStore.settle", "after", 1), *line)
    last = context_of(vm).store.operations("still")[-1]
    error = json.loads(told)
    assert (code, last.state) == (130, "settled")
    assert (error["code"], error["effect"], error["operation"]) == ("interrupted", "applied", str(last.id))
    assert "kept" in {snapshot.name for snapshot in await vm.snapshots()}


async def test_what_changes_nothing(q: qmpsnap.Controller) -> None:
    await grown_and_stopped(q)
    point = Call("qmpsnap.ops.lifecycle.power", "launch", "before", 1)
    code, told = await interrupt(point, "start", "still")
    assert (code, told) == (130, "qmpsnap: interrupted; nothing was changed\n")


@pytest.mark.parametrize("words", [("exec", "still", "--", "prog", "-o", "json"), ("show", "-o", "json", "none")])
async def test_the_form_is_the_commands_own(
    q: qmpsnap.Controller, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from anyio import to_thread

    from qmpsnap.cli.main import main

    await grown_and_stopped(q)
    assert await to_thread.run_sync(main, words)
    told = capsys.readouterr().err
    assert told.startswith("{") is (words[0] == "show")
