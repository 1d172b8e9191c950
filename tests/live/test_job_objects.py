"""Jobs as objects, on a real QEMU: awaited, iterated over, cancelled in every way there is."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import qmpsnap
from qmpsnap.errors import JobCancelled, StateError
from tests.live.machine import MIB, grown, hold_invariants, snapshot_hashes

pytestmark = pytest.mark.version

Stream = qmpsnap.Job[qmpsnap.Streamed]


async def _chain(vm: qmpsnap.MachineHandle) -> list[str]:
    return [layer.layer.id for layer in (await vm.chains())[0].layers]


async def test_an_awaited_job_tells_what_it_did(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    job = vm.commit("vda", base="s1", top="s2", consume=True)
    assert repr(job) == "<Job commit of still not begun>"
    done = await job
    assert repr(job) == "<Job commit of still done>"
    assert (done.disk, done.into, done.removed, done.overwritten) == ("vda", "vda-1", ("vda-2",), ("s1",))
    assert done.bytes >= MIB
    assert await job == done
    assert await _chain(vm) == ["vda-1", "vda-3", "vda-4"]
    gone = await vm.delete_snapshots("s3")
    assert (gone.names, len(gone.removed), gone.hidden) == (("s3",), 1, ())
    plan: Any = done
    with pytest.warns(DeprecationWarning, match="plan_"):
        assert plan.steps[0].kind == "commit"
    await hold_invariants(vm)


async def test_its_progress_is_iterated_over(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2")
    heard: list[str] = []
    job = vm.stream("vda", report=lambda info: heard.append(info.status))
    told = [info.status async for info in job.progress()]
    assert told[-1] == "concluded"
    assert heard[-1] == "concluded"
    assert (await job).into == "vda-3"
    assert [info async for info in job.progress()] == []

    refused = vm.stream("vda")
    assert [info async for info in refused.progress()] == []
    for _ in range(2):
        with pytest.raises(StateError, match="nothing"):
            await refused
    assert repr(refused) == "<Job stream of still failed>"
    await hold_invariants(vm)


async def test_a_reader_who_leaves_early_leaves_the_job_alone(q: qmpsnap.Controller, slow_jobs: None) -> None:
    vm = await grown(q, "s1", "s2")
    job = vm.stream("vda")
    async for info in job.progress():
        assert info.type == "stream"
        break
    assert repr(job) == "<Job stream of still running>"
    await job.cancel()
    gc.collect()


async def _cancel(job: Stream) -> None:
    await _running(job)
    await job.cancel()


async def _scope(job: Stream) -> None:
    await _running(job)
    with anyio.move_on_after(0.05) as scope:
        await job
    assert scope.cancelled_caught


async def _task(job: Stream) -> None:
    await _running(job)
    task = asyncio.create_task(_awaited(job))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _iterating(job: Stream) -> None:
    with anyio.CancelScope() as scope:
        async for info in job.progress():
            if info.status == "running":
                scope.cancel()
    assert scope.cancelled_caught


async def _block(job: Stream) -> None:
    async def fail() -> None:
        async with job:
            await _running(job)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()


async def _inline(job: Stream) -> None:
    task = asyncio.create_task(_awaited(job))
    while job.done or "running" not in repr(job):
        await anyio.lowlevel.checkpoint()
    await job.cancel()
    with pytest.raises(JobCancelled):
        await task


@pytest.mark.parametrize("way", [_cancel, _scope, _task, _iterating, _block, _inline])
async def test_a_cancelled_job_leaves_the_chain_as_it_was(
    q: qmpsnap.Controller, slow_jobs: None, way: Callable[[Stream], Awaitable[None]]
) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    hashes, chain = await snapshot_hashes(vm), await _chain(vm)
    job = vm.stream("vda")
    await way(job)
    await _is_cancelled(job)
    assert await _chain(vm) == chain
    assert await vm.jobs() == ()
    await hold_invariants(vm, hashes)


async def test_the_end_of_the_controller_cancels_what_still_runs(q: qmpsnap.Controller, slow_jobs: None) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    hashes, chain = await snapshot_hashes(vm), await _chain(vm)
    async with qmpsnap.open() as other:
        job = (await other.machine("still")).stream("vda")
        await _running(job)
    await _is_cancelled(job)
    assert await _chain(vm) == chain
    await hold_invariants(vm, hashes)


async def test_what_a_cancelled_commit_has_overwritten_is_told(q: qmpsnap.Controller, slow_jobs: None) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    job = vm.commit("vda", base="s1", top="s3", consume=True)
    async for info in job.progress():
        if info.current_progress:
            break
    await job.cancel()
    with pytest.raises(JobCancelled) as told:
        await job
    assert told.value.effect == "applied"
    assert [found.state for found in await vm.snapshots()] == ["consumed", "consumed", "ok"]


async def _is_cancelled(job: Stream) -> None:
    assert job.done
    with pytest.raises(JobCancelled) as told:
        await job
    assert (told.value.effect, told.value.exit_code) == ("none", 4)
    assert repr(job) == "<Job stream of still cancelled>"


async def _running(job: Stream) -> None:
    async for info in job.progress():
        if info.status == "running":
            break


async def _awaited(job: Stream) -> None:
    await job


async def test_a_job_that_never_began_changes_nothing(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    job = vm.snapshot("s2")
    await job.cancel()
    await job.cancel()
    with pytest.raises(JobCancelled, match="before it began"):
        await job
    with pytest.warns(RuntimeWarning, match="snapshot' was never awaited"):
        _forget(vm)
    assert [found.name for found in await vm.snapshots()] == ["s1"]


def _forget(vm: qmpsnap.MachineHandle) -> None:
    vm.snapshot("s3")
    gc.collect()


async def test_two_may_wait_for_one(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2")
    job = vm.stream("vda", base="s1")
    first, second = await asyncio.gather(job, job)
    assert first is second
    assert first.removed == ()
    assert first.into == "vda-3"
    await hold_invariants(vm)
