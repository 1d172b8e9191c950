"""Merges that are cancelled, and jobs that a dead controller has left at work; what dies where is in tests/faults."""

import os
import sys
from pathlib import Path

import anyio
import psutil
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import QmpsnapError
from qmpsnap.machine import qemu as machines
from qmpsnap.machine import worker
from qmpsnap.machine.qemu import wait_end
from qmpsnap.model.machines.record import Process
from qmpsnap.model.machines.spec import DiskSpec, Format
from qmpsnap.qmp.commands import JobInfo
from tests.harness.deaths import JOBS, STORE, Call, die_at
from tests.harness.processes import kill_qemu
from tests.live.machine import (
    MIB,
    ONE_DISK,
    Hashes,
    active_hash,
    context_of,
    fill,
    grown_and_stopped,
    hold_invariants,
    user_monitor,
)

VERBS = {
    "commit of a middle layer": ("commit", "vda", "--base", "s1", "--top", "s2", "--consume"),
    "commit of the active layer": ("commit", "vda", "--base", "s2", "--consume"),
    "stream": ("stream", "vda", "--base", "s1"),
}

pytestmark = pytest.mark.version


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


@pytest.mark.usefixtures("slow_jobs")
async def test_what_a_cancelled_commit_wrote_is_durable_before_it_is_recorded(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _, _ = await grown_and_stopped(q)
    await vm.start(paused=True)
    base = (await vm.chains())[0].layers[-2]
    synced: set[int] = set()
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with anyio.CancelScope() as scope:
        await vm.commit("vda", base="s2", consume=True, report=lambda _: scope.cancel())
    assert scope.cancelled_caught
    await vm.recover()
    assert Path(base.layer.path).stat().st_ino in synced


async def test_a_job_at_work_is_told_waited_for_and_cancelled(q: qmpsnap.Controller, home: Path) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    await die_at(Call(JOBS, "follow", "before", 1), "stream", "still", "vda")
    async with user_monitor(vm) as qemu:
        found = [job.id for job in await vm.jobs()]
        assert len(found) == 1
        assert found[0].startswith("qs.")
        assert await qemu.execute("query-jobs")
    with pytest.raises(QmpsnapError) as refused:
        await vm.snapshot("no")
    assert refused.value.exit_code == 8
    assert "job wait" in as_typed(refused.value.hint)
    await vm.cancel()
    assert await vm.jobs() == ()
    assert len((await vm.chains())[0].layers) == 3
    await _holds(vm, hashes, now)


async def _on_a_smaller_base(q: qmpsnap.Controller, place: Path, format_: Format) -> tuple[qmpsnap.MachineHandle, str]:
    """A paused machine on an overlay that a user has put on another machine's base, twice as long; that is gone."""
    disk = DiskSpec(name="vda", size=2 * MIB, format=format_)
    small = await q.define(replace(ONE_DISK, name="small", disks=(disk,)))
    await small.start(paused=True)
    await fill(small, "vda", 1, length=2 * MIB)
    await small.snapshot("s1")
    await small.stop(force=True)
    base = (await small.chains())[0].layers[0].layer.path
    mine = str(place / "mine.qcow2")
    await anyio.run_process(["qemu-img", "create", "-f", "qcow2", "-b", base, "-F", format_, mine, str(4 * MIB)])
    disk = DiskSpec(name="vda", image=mine)
    vm = await q.define(replace(ONE_DISK, disks=(disk,)), folders=[place, Path(base).parent])
    await small.undefine(disks="remove")
    await vm.start(paused=True)
    await fill(vm, "vda", 2, offset=MIB // 2, length=64 << 10)
    await vm.snapshot("s2")
    await fill(vm, "vda", 3, offset=3 * MIB, length=256 << 10)
    return vm, await active_hash(vm)


async def _until_longer(path: str, format_: Format) -> None:
    with anyio.fail_after(60):
        while header.read(path, format=format_).virtual_size != 4 * MIB:
            await anyio.sleep(0.02)


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
@pytest.mark.parametrize("end", ["cancelled", "QEMU killed", "the worker killed"])
async def test_a_base_that_a_commit_has_lengthened_before_it_was_undone_is_that_long(
    q: qmpsnap.Controller, place: Path, format_: Format, end: str
) -> None:
    vm, now = await _on_a_smaller_base(q, place, format_)
    if "worker" in end:
        await vm.stop(force=True)
    base = (await vm.chains())[0].layers[0].layer
    assert base.virtual_size == 2 * MIB
    await die_at(Call(JOBS, "follow", "before", 1), "snapshot", "delete", "still", "s2")
    await _until_longer(base.path, format_)
    if end == "cancelled":
        await vm.cancel()
    else:
        kill_qemu(vm)
        await vm.recover()
    chain = (await vm.chains())[0]
    assert len(chain.layers) == 3
    assert [at.problems for at in chain.layers] == [()] * 3
    assert chain.layers[0].layer.virtual_size == 4 * MIB
    await hold_invariants(vm)
    if await vm.is_running():
        await vm.stop(force=True)
    await vm.start(paused=True)
    assert await active_hash(vm) == now
    await vm.commit("vda")
    assert len((await vm.chains())[0].layers) == 1
    await hold_invariants(vm)
    assert await active_hash(vm) == now


ENDING = """
import ctypes, fcntl, os, sys, threading

image = open(sys.argv[1], "rb")
for start in (100, 200):
    fcntl.lockf(image, fcntl.LOCK_SH, 100, start)
threading.Thread(target=sys.stdin.read).start()
open("qemu.pid", "w").write(f"{os.getpid()}\\n")
ctypes.CDLL(None).syscall(60, 0)  # exit, of this thread alone
"""
"""What a killed worker is until its last thread has ended: without its first one, and its image locked."""


async def test_the_last_thread_of_a_killed_worker_is_waited_for(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    # Its marks are `started` and `finalizing`.
    await die_at(Call(STORE, "SqliteStore.mark", "after", 2), "stream", "still", "vda", qemu_too=True)
    folder, active = context_of(vm).home.run_dir("still") / worker.FOLDER, (await vm.chains())[0].active
    argv = [sys.executable, "-c", ENDING, active.path]
    async with await anyio.open_process(argv, cwd=folder) as ending:
        try:
            with anyio.fail_after(60):
                while psutil.Process(ending.pid).status() != psutil.STATUS_ZOMBIE:
                    await anyio.sleep(0.02)
            waited: list[float] = []

            async def wait(process: Process, *, deadline: float) -> bool:
                waited.append(deadline)
                assert ending.stdin
                await ending.stdin.aclose()  # only now its last thread ends
                return await wait_end(process, deadline=deadline)

            monkeypatch.setattr(machines, "wait_end", wait)
            assert await vm.recover()
            assert waited
        finally:
            if ending.returncode is None:
                ending.kill()
    assert len((await vm.chains())[0].layers) == 1
    await _holds(vm, hashes, now)
