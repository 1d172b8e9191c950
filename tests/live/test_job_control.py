"""Jobs that a command waits for: seen, slowed down and cancelled by somebody else, who has no lock."""

from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import NotFoundError, QemuGone, QmpError, UsageError
from qmpsnap.model.names import JobId
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.session import Monitor
from tests.live.machine import grown_and_stopped, hold_invariants, user_monitor

SLOW = 1 << 10
"""Bytes per second with which no job of these tests comes to its end."""


async def begun(job: qmpsnap.Job[Any]) -> None:
    """Return once QEMU has the job."""
    async for info in job.progress():
        if info.status == "running":
            return


@pytest.mark.parametrize("place", ["guest", "worker"])
async def test_a_job_is_seen_slowed_down_and_cancelled_while_its_command_lives(
    q: qmpsnap.Controller, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    if place == "guest":
        await vm.start(paused=True)
    job = vm.stream("vda", bandwidth=SLOW)
    await begun(job)
    (found,) = await vm.jobs()
    assert (found.place, found.verb, found.type, found.limit) == (place, "stream", "stream", SLOW)
    assert found.operation
    assert found.waiting is not None
    assert found.waiting.startswith("'stream' (pid ")
    assert await vm.set_speed(2 * SLOW) == [found.id]
    assert [one.limit for one in await vm.jobs()] == [2 * SLOW]
    with pytest.raises(UsageError, match="cannot be -1 bytes per second"):
        await vm.set_speed(-1)

    assert await anyio.to_thread.run_sync(main, ["job", "set-speed", "still", "1K"]) == 0
    assert await anyio.to_thread.run_sync(main, ["job", "list", "still"]) == 0
    assert "1.0 KiB/s  'stream' (pid " in capsys.readouterr().out
    assert await anyio.to_thread.run_sync(main, ["job", "cancel", "still"]) == 0
    assert f"operation {found.operation} (stream) is cancelled; its chain is unchanged" in capsys.readouterr().err
    with pytest.raises(QmpError, match=rf"job {found.id} was cancelled") as told:
        await job
    assert told.value.effect == "none"
    assert await vm.jobs() == ()
    with pytest.raises(NotFoundError):
        await vm.set_speed(0)
    await hold_invariants(vm, hashes)


async def test_a_monitor_that_somebody_else_has_is_told_soon(q: qmpsnap.Controller) -> None:
    vm, _, _ = await grown_and_stopped(q)
    await vm.start(paused=True)
    job = vm.stream("vda", bandwidth=SLOW)
    await begun(job)
    async with user_monitor(vm):
        for act in (vm.cancel, vm.jobs, lambda: vm.set_speed(0)):
            with anyio.fail_after(20), pytest.raises(QemuGone, match="user's monitor does not answer") as told:
                await act()
            assert (told.value.exit_code, told.value.effect) == (5, "none")
    assert await vm.set_speed(0) != []
    assert (await job).into == (await vm.chains())[0].active.id
    await hold_invariants(vm)


async def test_a_limit_makes_no_pause_longer(
    q: qmpsnap.Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone when the job is told to go over, and the plan shows it."""
    vm, _, _ = await grown_and_stopped(q)
    plan = await vm.plan_mirror("vda", tmp_path / "copy", mode="pivot", bandwidth=1 << 30)
    assert plan.qmp[-1]["arguments"]["speed"] == 1 << 30
    await vm.start(paused=True)
    speeds: list[int] = []
    real = jobs.complete

    async def complete(monitor: Monitor, job: JobId) -> None:
        speeds.extend(at.speed for at in await commands.query_block_jobs(monitor))
        await real(monitor, job)

    monkeypatch.setattr(jobs, "complete", complete)

    await vm.mirror("vda", tmp_path / "copy", mode="pivot", shallow=True, bandwidth=1 << 30)
    await vm.commit("vda", base="s2", consume=True, bandwidth=1 << 30)
    assert speeds == [0, 0]
    await hold_invariants(vm)
