"""The controller, QEMU or both die at each step of a mirror. Then: recover, and go on."""

import os
import signal
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import OperationPending, QmpsnapError, StateError
from qmpsnap.model.names import LayerId
from qmpsnap.qmp.commands import JobInfo
from tests.live.crash import JOBS, STORE, die_at, kill_qemu
from tests.live.machine import active_hash, content_hash, context_of, fill, grown_and_stopped, hold_invariants
from tests.live.test_mirror import file_hash, make_image

STEPS = {
    "after the journal row": (STORE, "SqliteStore.open_operation", "after", 1),
    "with the file made": (STORE, "SqliteStore.mark", "before", 1),
    "with the file known": (STORE, "SqliteStore.mark", "after", 1),
    "with the file at its place": ("qmpsnap.block.place", "put", "after", 1),
    "with the target open": ("qmpsnap.qmp.commands", "blockdev_add", "after", 1),
    "before the job": (STORE, "SqliteStore.mark", "after", 2),
    "with the job at work": (JOBS, "follow_mirror", "before", 1),
    "ready": (JOBS, "follow_mirror", "after", 1),
    "pending": (JOBS, "follow", "after", 2),
    "marked finalizing": (STORE, "SqliteStore.mark", "after", 3),
    "after finalize": (JOBS, "finalize", "after", 1),
    "verified": (STORE, "SqliteStore.settle", "before", 1),
    "settled": (STORE, "SqliteStore.settle", "after", 1),
    "dismissed": (JOBS, "dismiss", "after", 1),
    "nodes closed": ("qmpsnap.ops.merge", "close_nodes", "after", 1),
    "files removed": ("qmpsnap.ops.merge", "remove_files", "after", 1),
}
WORKING = {"with the job at work", "ready", "pending"}
"""A job is there and waits for somebody."""
MADE = ("marked finalizing", "after finalize", "verified", "settled", "dismissed", "nodes closed", "files removed")
FORMS = {
    "full pivot": ("--pivot",),
    "shallow pivot": ("--pivot", "--shallow"),
    "finish": ("--finish",),
    "reuse": ("--pivot", "--reuse"),
}
WORKER_STEPS = {"with the target open", "with the job at work", "marked finalizing", "dismissed"}
OTHER_STEPS = {"with the file known", "with the job at work", "marked finalizing", "settled"}
"""Where a shallow copy, or one onto an image that was there, could end otherwise than a full one."""
CASES = [
    (step, form, qemu)
    for step in STEPS
    for form in FORMS
    for qemu in ("lives", "dies too", "a worker's", "a worker's dies too")
    if form in ("full pivot", "finish") or step in OTHER_STEPS
    if "worker" not in qemu or (step in WORKER_STEPS and form in ("full pivot", "finish"))
]


@pytest.mark.grid
@pytest.mark.parametrize(("step", "form", "qemu"), CASES)
async def test_killed_in_the_middle(q: qmpsnap.Controller, place: Path, step: str, form: str, qemu: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    target = place / "copy"
    if form == "reuse":
        make_image(vm, target)
    if qemu in ("lives", "dies too"):
        await vm.start(paused=True)
    await die_at(STEPS[step], "mirror", "still", "vda", str(target), *FORMS[form], "--progress", "none")
    if "dies" in qemu:
        await kill_qemu(vm)

    carried_on = "dies" not in qemu and step in WORKING
    if carried_on:
        with pytest.raises(OperationPending, match="job"):
            await vm.recover()
        await vm.wait()
    await vm.recover()
    made = carried_on or step in MADE
    await hold_invariants(vm, hashes)
    assert [file.name for file in place.iterdir()] == (["copy"] if made or form == "reuse" else [])
    active = (await vm.chains())[0].layers[-1].layer
    assert (active.path == str(target)) == (made and form != "finish")
    if made and form == "finish":
        assert await file_hash(vm, target) == now
    assert context_of(vm).home.machine_dir("still").joinpath("vda-3.qcow2").exists() == (active.id == "vda-3")
    assert await active_hash(vm) == now
    record = await vm.record()
    await vm.recover()
    assert await vm.record() == record
    if not await vm.is_running():
        await vm.start(paused=True)
    await vm.snapshot("afterwards")
    await fill(vm, "vda", 3)
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("form", ["pivot", "finish"])
@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_cancelled_scope_leaves_the_chain_as_before(
    q: qmpsnap.Controller, place: Path, state: str, form: str
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    if state == "running":
        await vm.start(paused=True)
    chain = (await vm.chains())[0].ids
    with anyio.CancelScope() as scope:

        def cancel(_: JobInfo) -> None:
            scope.cancel()

        await vm.mirror("vda", place / "copy", mode="pivot" if form == "pivot" else "finish", report=cancel)
    assert scope.cancelled_caught
    assert (await vm.chains())[0].ids == chain
    assert list(place.iterdir()) == []
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now


async def test_a_strangers_file_at_the_last_moment_is_not_touched(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    target = place / "copy"
    from qmpsnap.block import place as places

    real = places.put

    async def late(part: str, path: str) -> None:
        target.write_bytes(b"mine")
        await real(part, path)

    monkeypatch.setattr(places, "put", late)
    with pytest.raises(StateError, match="exists already") as refused:
        await vm.mirror("vda", target, mode="pivot")
    assert refused.value.effect == "none"
    assert [(file.name, file.read_bytes()) for file in place.iterdir()] == [("copy", b"mine")]
    await hold_invariants(vm, hashes)


async def test_qemu_ends_while_it_copies(q: qmpsnap.Controller, place: Path) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    process = await vm.start(paused=True)
    with pytest.raises(QmpsnapError) as gone:
        await vm.mirror("vda", place / "copy", mode="pivot", report=lambda _: os.kill(process.pid, signal.SIGKILL))
    assert gone.value.exit_code == 5
    await vm.recover()
    assert list(place.iterdir()) == []
    await hold_invariants(vm, hashes)
    assert await content_hash(vm, LayerId("vda-3")) == now
