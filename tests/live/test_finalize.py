"""Jobs whose end fails or takes too long, QEMU having changed its chain or not; what dies where is in tests/faults."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import DeadlinePassed, HostCannot, OperationPending, QmpError, QmpsnapError
from qmpsnap.model.layers import blockdev
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import JobId
from qmpsnap.ops.jobs import cutover as finalize
from qmpsnap.ops.jobs.blockjob import BlockJob
from qmpsnap.ops.session import recovery
from qmpsnap.qmp import commands, jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.session import Monitor, Session
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.harness.deaths import STORE, Call, die_at
from tests.harness.processes import kill_qemu
from tests.live.machine import (
    MIB,
    Hashes,
    active_hash,
    context_of,
    fill,
    grown,
    grown_and_stopped,
    hold_invariants,
    snapshot_hashes,
    user_monitor,
)

pytestmark = pytest.mark.version


@contextmanager
def stuck_headers() -> Iterator[None]:
    """A QEMU that is started in the block can never write the headers of layers."""
    real = blockdev.layer_options

    def failing(layer: Layer, *arguments: Any, **named: Any) -> dict[str, Any]:
        options = real(layer, *arguments, **named)
        image = {name: value for name, value in options["file"].items() if name != "node-name"}
        fault = {"event": "none", "iotype": "write", "sector": 0, "errno": 5, "once": False}
        below = {"driver": "blkdebug", "node-name": options["file"]["node-name"], "image": image}
        return options | {"file": below | {"inject-error": [fault]}}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blockdev, "layer_options", failing)
        yield


async def _of_two(q: qmpsnap.Controller) -> tuple[qmpsnap.MachineHandle, Hashes, str]:
    """As :func:`grown_and_stopped`, with more in the middle layer than in the base: a delete of s1 is a stream."""
    vm = await grown(q, "s1")
    await fill(vm, "vda", 2, offset=2 * MIB, length=3 * MIB)
    await vm.snapshot("s2")
    await fill(vm, "vda", 3, offset=8 * MIB)
    await vm.stop(force=True)
    return vm, await snapshot_hashes(vm), await active_hash(vm)


async def _is_as_before(vm: qmpsnap.MachineHandle, hashes: Hashes, now: str) -> None:
    """Store, QEMU and headers say so; and what the guest writes from here on is there without this QEMU."""
    assert context_of(vm).store.operations("still", only_open=True) == ()
    assert (await vm.chains())[0].ids == ("vda-1", "vda-2", "vda-3")
    found = await vm.check()
    assert {one.code for one in found.findings} <= {"node-left"}, found.findings  # that of the fault
    await fill(vm, "vda", 7, offset=12 * MIB)
    await vm.stop(force=True)
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) != now
    await vm.start(paused=True)
    await fill(vm, "vda", 0, offset=12 * MIB)
    assert await active_hash(vm) == now


@pytest.mark.parametrize("base", ["s1", None])
async def test_a_header_that_cannot_be_written_undoes_a_stream(q: qmpsnap.Controller, base: str | None) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    with stuck_headers():
        await vm.start(paused=True)
    with pytest.raises(QmpError, match="Input/output error") as failed:
        await vm.stream("vda", base=base)
    assert failed.value.effect == "none"
    await _is_as_before(vm, hashes, now)
    await vm.stream("vda", base=base)
    await hold_invariants(vm, hashes)


async def test_a_header_that_cannot_be_written_undoes_a_stream_into_a_frozen_layer(q: qmpsnap.Controller) -> None:
    vm, hashes, now = await _of_two(q)
    with stuck_headers():
        await vm.start(paused=True)
    with pytest.raises(QmpError, match="Input/output error"):
        await vm.delete_snapshots("s1")
    await _is_as_before(vm, {key: value for key, value in hashes.items() if key[0] != "s1"}, now)


async def test_a_header_that_cannot_be_written_costs_no_commit_its_data(q: qmpsnap.Controller) -> None:
    """QEMU 7.2 itself dies of it; whether it does or the commit is taken back: what is said to be there is."""
    vm, hashes, now = await grown_and_stopped(q)
    with stuck_headers():
        await vm.start(paused=True)
    with pytest.raises(QmpsnapError) as failed:
        await vm.commit("vda", base="s1", top="s2", consume=True)
    assert failed.value.effect == "applied"
    await vm.recover()
    if await vm.is_running():
        await vm.stop(force=True)
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] != "s1"})
    assert await active_hash(vm) == now


MARK = "SqliteStore.mark"
DEATHS = {
    "the job still pending": Call(STORE, MARK, "after", 2),
    "nobody knows that it failed": Call(STORE, MARK, "before", 3),
    "it is known": Call(STORE, MARK, "after", 3),
}
"""``started``, ``finalizing`` and ``started`` again are the marks."""


@pytest.mark.parametrize("death", DEATHS)
async def test_killed_beside_a_header_that_cannot_be_written(q: qmpsnap.Controller, death: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    with stuck_headers():
        await vm.start(paused=True)
    await die_at(DEATHS[death], "stream", "still", "vda", "--base", "s1", "--progress", "none")
    assert await vm.recover()
    assert await vm.recover() == []
    ended = context_of(vm).store.operations("still")[-1]
    assert (ended.verb, ended.state) == ("stream", "failed")
    if death != "it is known":
        assert ended.error
        assert "Input/output error" in ended.error
    await _is_as_before(vm, hashes, now)


async def test_a_failed_job_that_somebody_dismissed_waits_for_qemu_to_end(q: qmpsnap.Controller) -> None:
    """QEMU's chain has moved, nobody says that its header has not: the layers that it names stay."""
    vm, hashes, now = await grown_and_stopped(q)
    with stuck_headers():
        await vm.start(paused=True)
    await die_at(DEATHS["the job still pending"], "stream", "still", "vda", "--base", "s1", "--progress", "none")
    (job,) = await vm.jobs()
    async with user_monitor(vm) as qemu:
        await qemu.execute("job-finalize", {"id": job.id})
        while (await vm.jobs())[0].status != "concluded":
            await anyio.sleep(0.02)
        await qemu.execute("job-dismiss", {"id": job.id})
    for _ in range(2):
        with pytest.raises(OperationPending, match=r"names .*vda-2.qcow2 as its backing") as waits:
            await vm.recover()
        assert "qmpsnap stop still" in as_typed(waits.value.hint)
    await vm.stop(force=True)
    await vm.recover()
    assert (await vm.chains())[0].ids == ("vda-1", "vda-3")
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now


MARKED = SqliteStore.mark


@pytest.fixture
def failing_finalize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that fail when they are finalized, while the store takes nothing about it."""
    failed = False

    async def finalize(monitor: Monitor, job: JobId) -> JobInfo:
        nonlocal failed
        failed = True
        await jobs.cancel(monitor, job, dismiss=False)
        return await jobs.follow(monitor, job, "concluded")

    def full(self: SqliteStore, *arguments: Any, **named: Any) -> None:
        if failed:
            raise HostCannot("the store has no room")
        MARKED(self, *arguments, **named)

    monkeypatch.setattr(jobs, "finalize", finalize)
    monkeypatch.setattr(SqliteStore, "mark", full)


@pytest.mark.usefixtures("failing_finalize")
@pytest.mark.parametrize("qemu", ["lives", "is killed"])
@pytest.mark.parametrize("verb", ["commit", "mirror"])
async def test_no_guest_writes_to_a_side_that_does_not_count(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, verb: str, qemu: str
) -> None:
    """While it is not durable that the old side is the truth again, the guest is held."""
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start()
    commit, pivot = partial(vm.commit, base="s2", consume=True), partial(vm.mirror, target=place / "copy", mode="pivot")
    act: Callable[[str], Awaitable[object]] = commit if verb == "commit" else pivot
    with pytest.raises(OperationPending, match="the store has no room") as held:
        await act("vda")
    assert held.value.effect == "unknown"
    assert await vm.state() == "paused"
    with pytest.raises(OperationPending, match="the store has no room") as still:
        await vm.recover()
    assert "qmpsnap recover still" in as_typed(still.value.hint)
    assert await vm.state() == "paused"
    monkeypatch.setattr(SqliteStore, "mark", MARKED)
    if qemu == "lives":
        await vm.recover()
        assert await vm.state() == "running"
        assert (await vm.chains())[0].ids == ("vda-1", "vda-2", "vda-3")
        await vm.stop(force=True)
    else:
        kill_qemu(vm)
        await vm.recover()
        assert (await vm.chains())[0].ids != ("vda-1", "vda-2", "vda-3")
    overwritten = "s2" if verb == "commit" else ""
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] != overwritten})
    assert await active_hash(vm) == now


async def _for_ever(*_: object, **__: object) -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize("verb", ["stream", "mirror"])
async def test_an_end_that_takes_too_long_is_said_and_holds_no_guest(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start()
    act = vm.stream if verb == "stream" else partial(vm.mirror, target=place / "copy", mode="pivot")
    with monkeypatch.context() as patched:
        patched.setattr(finalize, "FINALIZE_DEADLINE", 2.0)
        patched.setattr(recovery, "SETTLE_DEADLINE", 2.0)
        patched.setattr(BlockJob, "require_chain", _for_ever)
        with pytest.raises(DeadlinePassed, match="did not complete within 2 s") as late:
            await act("vda")
    assert late.value.effect == "unknown"
    assert "qmpsnap recover still" in as_typed(late.value.hint)
    assert await vm.state() == "running"
    await vm.wait()
    assert (await vm.chains())[0].ids != ("vda-1", "vda-2", "vda-3")
    await hold_invariants(vm, hashes)
    await vm.stop(force=True)
    assert await active_hash(vm) == now


@pytest.mark.parametrize("verb", ["commit", "mirror"])
async def test_a_write_through_a_monitor_hangs_qemu_and_the_verb_ends(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The disk is drained from `pending` to `job-finalize`, and QEMU's main loop waits in `qemu-io` for that to end."""
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start()
    execute = Session.execute

    async def impatient(self: Session, command: str, arguments: Any = None, *, deadline: float = 2.0) -> Any:
        return await execute(self, command, arguments, deadline=min(deadline, 2.0))

    async def beside_a_writer(job: BlockJob, monitor: Monitor, **_: object) -> None:
        writing = asyncio.ensure_future(fill(vm, job.step.disk, 7, offset=12 * MIB))
        try:
            while True:  # until QEMU is in the midst of the write, and answers no more
                await commands.query_status(monitor)
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    commit, pivot = partial(vm.commit, base="s2", consume=True), partial(vm.mirror, target=place / "copy", mode="pivot")
    act: Callable[[str], Awaitable[object]] = commit if verb == "commit" else pivot
    with monkeypatch.context() as patched:
        patched.setattr(Session, "execute", impatient)
        patched.setattr(recovery, "SETTLE_DEADLINE", 5.0)
        patched.setattr(finalize, "go_over", beside_a_writer)
        with pytest.raises(DeadlinePassed, match="did not answer") as late:
            await act("vda")
    assert (late.value.effect, as_typed(late.value.hint)) == ("unknown", "qmpsnap recover still completes or undoes it")
    with pytest.raises(DeadlinePassed) as silent:
        await vm.recover()
    assert "qmpsnap stop still --force" in as_typed(silent.value.hint)
    await vm.stop(force=True)
    await vm.recover()
    assert (await vm.chains())[0].ids == ("vda-1", "vda-2", "vda-3")
    overwritten = "s2" if verb == "commit" else ""
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] != overwritten})
    assert await active_hash(vm) == now
