"""The controller, QEMU or both die at each step of a commit, a stream and a delete. Then: recover, and go on."""

from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import OperationPending, QmpsnapError
from qmpsnap.qmp.commands import JobInfo
from tests.live.crash import JOBS, STORE, die_at, kill_qemu
from tests.live.machine import Hashes, active_hash, fill, grown_and_stopped, hold_invariants, user_monitor

STEPS = {
    "after the journal row": (STORE, "SqliteStore.open_operation", "after", 1),
    "before the job": (STORE, "SqliteStore.mark", "after", 1),
    "with the job at work": (JOBS, "follow", "before", 1),
    "with the job over its work": (JOBS, "follow", "after", 1),
    "marked finalizing": (STORE, "SqliteStore.mark", "after", 2),
    "after finalize": (JOBS, "finalize", "after", 1),
    "verified": (STORE, "SqliteStore.settle", "before", 1),
    "settled": (STORE, "SqliteStore.settle", "after", 1),
    "dismissed": (JOBS, "dismiss", "after", 1),
    "nodes closed": ("qmpsnap.ops.merge", "close_gone", "after", 1),
    "files removed": ("qmpsnap.ops.merge", "remove_files", "after", 1),
}
VERBS = {
    "commit of a middle layer": ("commit", "vda", "--base", "s1", "--top", "s2", "--consume"),
    "commit of the active layer": ("commit", "vda", "--base", "s2", "--consume"),
    "stream": ("stream", "vda", "--base", "s1"),
}
# A stopped machine's job runs by the same code in a worker: there the steps count that treat a dead QEMU otherwise.
WORKER_STEPS = {"with the job at work", "marked finalizing", "settled", "nodes closed"}
CASES = [
    (step, verb, qemu)
    for step in STEPS
    for verb in VERBS
    for qemu in ("lives", "dies too", "a worker's", "a worker's dies too")
    if "worker" not in qemu or step in WORKER_STEPS
]


@pytest.mark.grid
@pytest.mark.parametrize(("step", "verb", "qemu"), CASES)
async def test_killed_in_the_middle(q: qmpsnap.Controller, home: Path, step: str, verb: str, qemu: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    if qemu in ("lives", "dies too"):
        await vm.start(paused=True)
    name, *rest = VERBS[verb]
    await die_at(STEPS[step], name, "still", *rest)
    if "dies" in qemu:
        await kill_qemu(vm)

    if "dies" not in qemu and step in ("with the job at work", "with the job over its work"):
        with pytest.raises(OperationPending, match="job"):
            await vm.recover()
        await vm.wait()
    await vm.recover()
    await _holds(vm, hashes, now)
    record = await vm.record()
    await vm.recover()
    assert await vm.record() == record
    if not await vm.is_running():
        await vm.start(paused=True)
    await vm.snapshot("afterwards")
    await fill(vm, "vda", 3)
    kept = {s.name for s in await vm.snapshots() if s.state == "ok"}
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] in kept})


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
    await die_at(STEPS["with the job at work"], "stream", "still", "vda")
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
