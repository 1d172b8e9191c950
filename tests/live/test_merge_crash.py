"""Merges that are cancelled, and jobs that a dead controller has left at work; what dies where is in tests/faults."""

from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import QmpsnapError
from qmpsnap.qmp.commands import JobInfo
from tests.live.crash import JOBS, die_at
from tests.live.machine import Hashes, active_hash, grown_and_stopped, hold_invariants, user_monitor

VERBS = {
    "commit of a middle layer": ("commit", "vda", "--base", "s1", "--top", "s2", "--consume"),
    "commit of the active layer": ("commit", "vda", "--base", "s2", "--consume"),
    "stream": ("stream", "vda", "--base", "s1"),
}


async def _holds(vm: qmpsnap.MachineHandle, hashes: Hashes, now: str) -> None:
    """Whatever the end: snapshots that are said to be ok are, and the guest reads what it read."""
    ok = {s.name for s in await vm.snapshots() if s.state == "ok"}
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] in ok})
    assert await active_hash(vm) == now


@pytest.mark.usefixtures("slow_jobs")
@pytest.mark.parametrize("verb", VERBS)
async def test_a_cancelled_scope_leaves_the_chain_as_before(q: qmpsnap.Controller, verb: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    chain = (await vm.chains())[0].ids
    with anyio.CancelScope() as scope:

        def cancel(_: JobInfo) -> None:
            scope.cancel()

        if verb == "stream":
            await vm.stream("vda", base="s1", report=cancel)
        elif "active" in verb:
            await vm.commit("vda", base="s2", consume=True, report=cancel)
        else:
            await vm.commit("vda", base="s1", top="s2", consume=True, report=cancel)
    assert scope.cancelled_caught
    assert (await vm.chains())[0].ids == chain
    await _holds(vm, hashes, now)


async def test_a_job_at_work_is_told_waited_for_and_cancelled(q: qmpsnap.Controller, home: Path) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    await die_at((JOBS, "follow", "before", 1), "stream", "still", "vda")
    async with user_monitor(vm) as qemu:
        found = [job.id for job in await vm.jobs()]
        assert len(found) == 1
        assert found[0].startswith("qs.")
        assert await qemu.execute("query-jobs")
    with pytest.raises(QmpsnapError) as refused:
        await vm.snapshot("no")
    assert refused.value.exit_code == 8
    assert "job wait" in refused.value.hint
    await vm.cancel()
    assert await vm.jobs() == ()
    assert len((await vm.chains())[0].layers) == 3
    await _holds(vm, hashes, now)
