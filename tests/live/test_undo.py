"""What is refused or undone, so that nothing of the guest's goes: disks resized, a store put back, a job refused."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace
from qemu.qmp import ExecuteError

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import QmpError, QmpsnapError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.merge import job
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.harness.deaths import JOBS, STORE, Call, die_at
from tests.live.machine import (
    MIB,
    ONE_DISK,
    active_hash,
    content_hash,
    context_of,
    fill,
    grown_and_stopped,
    hold_invariants,
    user_monitor,
)

pytestmark = pytest.mark.version


async def _resize(vm: qmpsnap.MachineHandle, node: str, size: int) -> None:
    async with user_monitor(vm) as qemu:
        await qemu.execute("block_resize", {"node-name": node, "size": size})


@pytest.mark.parametrize("disk", ["vda", "vdb"], ids=["qcow2", "raw"])
async def test_no_layer_goes_over_a_disk_that_was_resized_behind_us(
    q: qmpsnap.Controller, still_spec: MachineSpec, disk: str
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    node = next(view.active.id for view in await vm.chains() if view.disk == disk)
    await _resize(vm, node, 32 * MIB)
    await fill(vm, disk, 7, offset=30 * MIB)
    with pytest.raises(StoreMismatch, match="another program resized it; nothing was changed") as refused:
        await vm.snapshot("s")
    assert refused.value.effect == "none"
    assert "qmpsnap check VM --repair records the size of a disk that has grown" in as_typed(refused.value.hint)
    assert await vm.snapshots() == ()
    async with user_monitor(vm) as qemu:
        backends: Any = await qemu.execute("query-block")
    sizes = {str(b["inserted"]["node-name"]): b["inserted"]["image"]["virtual-size"] for b in backends}
    assert sizes[node] == 32 * MIB
    await _resize(vm, node, 16 * MIB)
    await vm.snapshot("s")
    await hold_invariants(vm)


# --- a store that is older than the disks, or gone --------------------------------------------------------------------


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _forget_store(home: Path) -> None:
    for file in home.glob("qmpsnap.db*"):
        file.unlink()


async def test_a_store_put_back_from_an_older_copy_costs_no_data(home: Path, tmp_path: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(ONE_DISK)
    shutil.copy(home / "qmpsnap.db", tmp_path / "older")
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.snapshot("lost")
        await vm.start(paused=True)
        await fill(vm, "vda", 7)
        await vm.stop(force=True)
    _forget_store(home)
    shutil.copy(tmp_path / "older", home / "qmpsnap.db")
    before = _files(home / "machines")
    assert set(before) == {"still/record.json", "still/vda-1.qcow2", "still/vda-2.qcow2"}
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        with pytest.raises(
            StoreMismatch, match=r"an old copy .*record\.json was written by a later operation"
        ) as refused:
            await vm.snapshot("again")
        assert "--rebuild" in as_typed(refused.value.hint)
        assert await vm.snapshots() == ()
    assert _files(home / "machines") == before


@pytest.mark.parametrize("name", ["vda", "vdb"], ids=["the same image", "other images"])
async def test_without_the_store_a_second_definition_takes_nothing_of_the_first(home: Path, name: str) -> None:
    spec = MachineSpec(name="still", memory=64 * MIB, firmware="uefi", disks=(DiskSpec(name="vda", size=MIB),))
    async with qmpsnap.open() as q:
        await q.define(spec)
    (home / "machines/still/vars.fd").write_bytes(b"what the guest has set")
    (home / "run/still").mkdir(exist_ok=True)
    (home / "run/still/qmp.sock").write_bytes(b"a QEMU's")
    _forget_store(home)
    before = _files(home / "machines")
    async with qmpsnap.open() as q:
        with pytest.raises(StoreMismatch, match="this store lacks it; nothing was changed") as refused:
            await q.define(replace(spec, disks=(DiskSpec(name=name, size=MIB),)))
        assert refused.value.effect == "none"
        assert "--rebuild" in as_typed(refused.value.hint)
        assert await q.machines() == ()
        assert q.context.store.operations("still") == ()
    assert _files(home / "machines") == before
    assert (home / "run/still/qmp.sock").exists()


# --- a commit that QEMU refuses ---------------------------------------------------------------------------------------


def _refuse_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let QEMU have something to refuse."""
    real = job.start_command

    def refused(*arguments: Any, **rest: Any) -> tuple[str, dict[str, object]]:
        command, said = real(*arguments, **rest)
        return command, said | {"base-node": "nobody"}

    monkeypatch.setattr(job, "start_command", refused)


@pytest.mark.parametrize("top", ["s2", None], ids=["middle", "active"])
async def test_a_refused_commit_consumes_no_snapshot(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, top: str | None
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    before = await vm.snapshots()
    _refuse_jobs(monkeypatch)
    with pytest.raises(QmpError, match="nobody") as refused:
        await vm.commit("vda", base="s1", top=top, consume=True)
    assert refused.value.effect == "none"
    assert await vm.snapshots() == before
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now
    monkeypatch.undo()
    monkeypatch.setenv("QMPSNAP_HOME", str(q.context.home.data))
    await vm.commit("vda", base="s1", top=top, consume=True)
    assert {found.name for found in await vm.snapshots() if found.state == "ok"} < {"s1", "s2"}


async def test_what_a_stopped_machines_refused_commit_did_is_not_certain(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _, _ = await grown_and_stopped(q)
    _refuse_jobs(monkeypatch)
    with pytest.raises(QmpError):
        await vm.commit("vda", base="s1", top="s2", consume=True)
    assert "consumed" in {found.state for found in await vm.snapshots()}


@pytest.mark.usefixtures("slow_jobs")
async def test_a_commit_that_somebody_else_dismissed_has_written(q: qmpsnap.Controller) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)

    async def meddle() -> None:
        async with user_monitor(vm) as qemu:
            while True:
                found: Any = await qemu.execute("query-jobs")
                if found and found[0]["current-progress"]:
                    break
                await anyio.sleep(0.02)
            await qemu.execute("job-cancel", {"id": found[0]["id"]})
            while found and found[0]["status"] != "concluded":
                await anyio.sleep(0.02)
                found = await qemu.execute("query-jobs")
            with contextlib.suppress(IndexError, ExecuteError):  # whose job it is may have been quicker
                await qemu.execute("job-dismiss", {"id": found[0]["id"]})

    async with anyio.create_task_group() as group:
        group.start_soon(meddle)
        with pytest.raises(QmpsnapError):
            await vm.commit("vda", base="s1", top="s2", consume=True)
    states = {found.name: found.state for found in await vm.snapshots()}
    assert "consumed" in states.values()
    assert await active_hash(vm) == now
    for (name, _), recorded in hashes.items():
        if states[name] == "ok":
            point = next(found for found in await vm.snapshots() if found.name == name).points[0]
            assert await content_hash(vm, point.layer) == recorded


def _rewrite_journal(vm: qmpsnap.MachineHandle, change: str) -> None:
    store = context_of(vm).store
    assert isinstance(store, SqliteStore)
    connection = store._database.connection
    assert connection.execute(f"UPDATE operation SET {change} WHERE step LIKE '0:started%'").rowcount == 1  # noqa: S608


@pytest.mark.parametrize("top", ["s2", None], ids=["middle", "active"])
async def test_no_clock_makes_an_overwritten_snapshot_ok_again(q: qmpsnap.Controller, top: str | None) -> None:
    vm, _, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    words = ("commit", "still", "vda", "--base", "s1", *(("--top", top) if top else ()), "--consume")
    await die_at(Call(JOBS, "follow", "before", 1), *words)
    async with user_monitor(vm) as qemu:
        found: Any = [{"status": "running"}]
        while found[0]["status"] not in {"ready", "pending"}:  # all is written
            found = await qemu.execute("query-jobs")
        await qemu.execute("job-cancel", {"id": found[0]["id"]})
        while found[0]["status"] != "concluded":
            found = await qemu.execute("query-jobs")
        await qemu.execute("job-dismiss", {"id": found[0]["id"]})
    _rewrite_journal(vm, "started = started + 3600")  # as a clock says it that is put back now, or is a file server's
    await vm.recover()
    assert {found.name: found.state for found in await vm.snapshots()}["s1"] == "consumed"
    await hold_invariants(vm)
    assert await active_hash(vm) == now


@pytest.mark.parametrize("journal", ["", "an older qmpsnap's"])
async def test_a_commit_that_did_not_come_to_start_is_taken_back_if_the_file_says_so(
    q: qmpsnap.Controller, journal: str
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    words = ("commit", "still", "vda", "--base", "s1", "--top", "s2", "--consume")
    await die_at(Call(STORE, "SqliteStore.mark", "after", 1), *words)
    if journal:
        _rewrite_journal(vm, "step = '0:started'")
    await vm.recover()
    states = {found.name: found.state for found in await vm.snapshots()}
    assert states["s1"] == ("consumed" if journal else "ok")
    await hold_invariants(vm, {key: value for key, value in hashes.items() if states[key[0]] == "ok"})
    assert await active_hash(vm) == now
