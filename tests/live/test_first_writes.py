"""What a guest writes while a mirror begins: some QEMUs miss it unless the guest is held for that."""

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed
from qmpsnap.model.layers import blockdev
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.jobs import beginning, cutover
from qmpsnap.ops.snapshot import plan as snapshot_plan
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.jobs import JobStuck
from qmpsnap.qmp.session import Monitor, Session
from tests.faults import filters
from tests.faults.filters import Failure
from tests.harness import deaths
from tests.harness.deaths import JOBS, Call
from tests.live.booted import start_booted
from tests.live.machine import (
    MIB,
    ONE_DISK,
    active_hash,
    context_of,
    fill,
    flush,
    grown_and_stopped,
    hold_invariants,
    user_monitor,
)

pytestmark = pytest.mark.version

Act = Callable[[qmpsnap.MachineHandle, Path], Awaitable[object]]

READS = 40
"""How many reads a second a slow layer allows."""
TABLES = 32
"""L2 tables of a wide disk, each for 512 MiB: more than QEMU keeps of a slow layer."""
WIDE = TABLES * 512 * MIB
BLOCK = 64 << 10
WRITE = """tr '\\0' '\\377' </dev/zero | head -c 65536 >/tmp/block
(k=0; while ! test -e /tmp/stop; do
    dd if=/tmp/block of=/dev/vda bs=65536 seek=$k conv=notrunc,fsync; k=$((k + 1)); echo $k >/tmp/written
done; touch /tmp/stopped) >/dev/null 2>&1 &"""
"""One block after the other: whatever is missing below the last of them is lost."""


async def _commit(vm: qmpsnap.MachineHandle, _: Path) -> None:
    await vm.commit("vda", base="before", consume=True)


async def _pivot(vm: qmpsnap.MachineHandle, place: Path) -> None:
    await vm.mirror("vda", place / "copy", mode="pivot")


async def _finish(vm: qmpsnap.MachineHandle, place: Path) -> None:
    await vm.mirror("vda", place / "copy", mode="finish")


async def _write_blocking(vm: qmpsnap.MachineHandle, place: Path) -> None:
    await vm.mirror("vda", place / "copy", mode="finish", write_blocking=True)


MIRRORS: dict[str, Act] = {
    "commit": _commit,
    "pivot": _pivot,
    "finish": _finish,
    "write-blocking": _write_blocking,
}


@contextmanager
def slow_reads() -> Iterator[None]:
    """Layers that are opened in the block are read slowly, so that a job takes seconds to look what is allocated."""
    real = blockdev.layer_options

    def slowed(layer: Layer, *arguments: Any, **named: Any) -> dict[str, Any]:
        options = real(layer, *arguments, **named)
        image = {name: value for name, value in options["file"].items() if name != "node-name"}
        file = {"driver": "throttle", "node-name": options["file"]["node-name"], "throttle-group": "slow"}
        return options | {"file": file | {"file": image}, "l2-cache-size": 8 * BLOCK}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(snapshot_plan, "layer_options", slowed)
        yield


async def _slow_from_here(vm: qmpsnap.MachineHandle, name: str) -> None:
    """A snapshot whose overlay has all its L2 tables, and is read slowly."""
    async with user_monitor(vm) as qemu:
        limits: Any = {"iops-read": READS}
        await qemu.execute("object-add", {"qom-type": "throttle-group", "id": "slow", "limits": limits})
    with slow_reads():
        await vm.snapshot(name)
    for table in range(TABLES):
        await fill(vm, "vda", 1, offset=table * 512 * MIB + 256 * MIB, length=BLOCK)
    await flush(vm, "vda")


async def _fits(vm: qmpsnap.MachineHandle) -> None:
    """Nothing is wrong but for the node that makes a layer slow."""
    found = await vm.check()
    assert {one.code for one in found.findings} <= {"node-left"}, found.findings


def _misses(patch: pytest.MonkeyPatch) -> None:
    async def misses_first_writes(_: object) -> bool:
        return True

    patch.setattr(jobs, "misses_first_writes", misses_first_writes)


@pytest.mark.parametrize("verb", MIRRORS)
async def test_nothing_is_lost(
    q: qmpsnap.Controller, guest_spec: MachineSpec, place: Path, tmp_path: Path, verb: str
) -> None:
    vm = await q.define(replace(guest_spec, disks=(DiskSpec(name="vda", size=WIDE),)))
    await start_booted(vm)
    await _slow_from_here(vm, "before")
    await vm.run(WRITE)
    await MIRRORS[verb](vm, place)
    await vm.run("touch /tmp/stop; until test -e /tmp/stopped; do sleep 0.1; done")
    written = int((await vm.run("cat /tmp/written")).stdout)
    await vm.stop(force=True)
    active = (await vm.chains())[0].active
    result = Path(active.path if verb in ("commit", "pivot") else place / "copy")
    raw = tmp_path / "raw"
    count = -(-written * BLOCK // MIB)
    qemu_img = context_of(vm).image.binary
    argv = [qemu_img, "dd", "-f", "qcow2", "-O", "raw", f"bs={MIB}", f"count={count}", f"if={result}", f"of={raw}"]
    await anyio.run_process(argv)
    found = raw.read_bytes()
    there = [found[at * BLOCK : (at + 1) * BLOCK] == b"\xff" * BLOCK for at in range(written)]
    last = written if verb in ("commit", "pivot") else there.index(False) if False in there else written
    lost = [at for at, whole in enumerate(there[:last]) if not whole]
    assert not lost, f"{len(lost)} of {written} blocks are lost"
    assert not any(there[last:]), "blocks are there without those before them"
    assert written > 0


async def _sent(vm: qmpsnap.MachineHandle, place: Path, act: Act, patch: pytest.MonkeyPatch) -> list[str]:
    """What QEMU is told, without questions; ``tracks`` stands for the first answer by which the job tracks writes."""
    sent: list[str] = []
    real, tracks = Session.execute, jobs.tracks_writes

    async def execute(self: Session, command: str, *arguments: Any, **named: Any) -> Any:
        if not command.startswith(("query-", "x-debug")):
            sent.append(command)
        return await real(self, command, *arguments, **named)

    def told(info: commands.JobInfo) -> bool:
        found = tracks(info)
        if found and "tracks" not in sent:
            sent.append("tracks")
        return found

    with patch.context() as watching:
        watching.setattr(Session, "execute", execute)
        watching.setattr(jobs, "tracks_writes", told)
        await act(vm, place)
    return sent


@pytest.mark.parametrize("start", ["running", "paused"])
@pytest.mark.parametrize("verb", MIRRORS)
async def test_a_guest_is_held_until_the_job_tracks_writes(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, verb: str, start: str
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=start == "paused")
    await vm.snapshot("before")
    await fill(vm, "vda", 3, offset=3 * MIB)
    state = await vm.state()
    _misses(monkeypatch)
    sent = await _sent(vm, place, MIRRORS[verb], monkeypatch)
    job = sent.index("block-commit" if verb == "commit" else "blockdev-mirror")
    held = ["stop", sent[job], "tracks", "cont"]
    assert (sent[job - 1 : job + 3] == held) == (start == "running"), sent
    assert await vm.state() == state
    await hold_invariants(vm)


async def test_a_job_that_does_not_come_to_it_is_cancelled_before_the_guest_goes_on(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await _wide_and_slow(q)
    chain = (await vm.chains())[0].ids
    _misses(monkeypatch)
    with monkeypatch.context() as hasty:
        hasty.setattr(beginning, "BEGIN_DEADLINE", 0.3)
        with pytest.raises(DeadlinePassed, match="did not track the guest's writes") as failed:
            await vm.commit("vda", base="before", consume=True)
    assert failed.value.effect == "applied"  # the snapshot is invalidated: the base may have been written to
    assert (await vm.state(), (await vm.chains())[0].ids) == ("running", chain)
    async with user_monitor(vm) as qemu:
        assert await qemu.execute("query-jobs") == []
    await _fits(vm)
    await vm.commit("vda", base=chain[-2], consume=True)
    assert await vm.state() == "running"
    await _fits(vm)


def _dies_early() -> None:
    with pytest.MonkeyPatch.context() as patch:
        _misses(patch)
        main(["commit", "still", "vda", "--base", "before", "--consume"])


async def test_recovery_cancels_a_job_that_does_not_track_writes_yet(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await _wide_and_slow(q)
    chain, before = (await vm.chains())[0].ids, await vm.state()
    assert before == "running"
    died = await deaths.dies(partial(_dies_early), Call(JOBS, "begin", "before", 1))
    assert died.died, died.said
    assert await vm.state() == "running"  # by its guard
    _misses(monkeypatch)
    await vm.recover()
    assert (await vm.state(), (await vm.chains())[0].ids) == ("running", chain)
    assert context_of(vm).store.operations("still")[-1].state == "failed"
    await _fits(vm)


async def test_a_write_that_fails_while_the_guest_is_held_is_told(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _, now = await grown_and_stopped(q)
    with filters.failing(Failure("cluster_alloc", 1, errno.ENOSPC, once=False)):
        await vm.start()
    real = cutover.let_run

    async def late(monitor: Monitor) -> None:
        with anyio.fail_after(30):
            while all(info.status != "paused" for info in await commands.query_jobs(monitor)):
                await anyio.sleep(0.01)
        await real(monitor)

    monkeypatch.setattr(beginning, "let_run", late)
    _misses(monkeypatch)
    with pytest.raises(JobStuck, match="no space is left"):
        await vm.commit("vda", base="s2", consume=True)
    assert await vm.state() == "running"
    await vm.cancel()
    await vm.stop(force=True)
    assert await active_hash(vm) == now


async def _wide_and_slow(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    vm = await q.define(replace(ONE_DISK, disks=(DiskSpec(name="vda", size=WIDE),)))
    await vm.start()
    await _slow_from_here(vm, "before")
    return vm


async def test_the_content_of_a_held_commit_is_the_disk_as_it_was(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    await fill(vm, "vda", 2, offset=2 * MIB)
    await vm.snapshot("before")
    await fill(vm, "vda", 3, offset=3 * MIB)
    now = await active_hash(vm)
    await vm.resume()
    _misses(monkeypatch)
    await vm.commit("vda", base="before", consume=True)
    assert await vm.state() == "running"
    assert await active_hash(vm) == now
