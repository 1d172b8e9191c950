"""What `check` sees in a QEMU that runs, what it does about it, and a QEMU that does not answer."""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image.create import ImageTool
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.machine import agent, worker
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.model.finding import Finding
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base.context import Context, locked
from qmpsnap.ops.check import check, deep
from qmpsnap.ops.check.facts import Facts
from tests.harness.deaths import STORE, Call, die_at
from tests.live.booted import start_booted
from tests.live.machine import ONE_DISK, context_of, fill, grown, hold_invariants, user_monitor


async def codes(vm: qmpsnap.MachineHandle, **how: bool) -> set[str]:
    return {finding.code for finding in (await vm.check(**how)).findings}


async def add(vm: qmpsnap.MachineHandle, name: str, path: Path, **options: Any) -> None:
    async with user_monitor(vm) as qemu:
        file = {"driver": "file", "filename": str(path)}
        await qemu.execute(
            "blockdev-add", {"node-name": name, "driver": "qcow2", "file": file, "backing": None, **options}
        )


async def test_a_node_of_ours_is_closed_and_a_users_is_only_told_of(q: qmpsnap.Controller, place: Path) -> None:
    vm = await grown(q, "s1")
    tool = ImageTool(context_of(vm).image.binary)
    active = context_of(vm).store.chains(vm.name)[0].active.id
    ours = f"ours, not {active} in use"  # whoever went by the sentence would close that as well
    for name in (ours, "theirs"):
        await tool.create_base(str(place / name), format="qcow2", virtual_size=1 << 20)
    await add(vm, "vda-77", place / ours)
    await add(vm, "backup", place / "theirs")
    done = await vm.check(repair=True)
    assert [(finding.code, finding.repair) for finding in done.findings] == [("node-left", "")] * 2  # node and file
    assert {finding.file for finding in done.findings} == {str(place / "theirs")}
    assert "node-left" in {finding.code for finding in done.repaired}
    assert done.failed == ()
    async with user_monitor(vm) as qemu:
        await qemu.execute("blockdev-del", {"node-name": "backup"})
    await hold_invariants(vm)


async def test_a_job_of_ours_that_is_over_is_dismissed(q: qmpsnap.Controller, place: Path) -> None:
    vm = await grown(q, "s1")
    async with user_monitor(vm) as qemu:
        for job in ("qs.77.vda", "mine"):
            options = {"driver": "file", "filename": str(place / job), "size": 1 << 20}
            await qemu.execute("blockdev-create", {"job-id": job, "options": options})
    with anyio.fail_after(10):
        while [job.status for job in await vm.jobs()] != ["concluded"] * 2:
            await anyio.sleep(0.01)
    done = await vm.check(repair=True)
    assert [finding.code for finding in done.repaired] == ["job-left"]
    assert [finding.text.split()[1] for finding in done.findings] == ["mine"]
    assert [job.id for job in await vm.jobs()] == ["mine"]


async def test_a_chain_that_somebody_else_has_moved_is_told(q: qmpsnap.Controller, place: Path) -> None:
    vm = await grown(q)
    async with user_monitor(vm) as qemu:
        arguments = {"node-name": "vda-1", "snapshot-file": str(place / "theirs"), "snapshot-node-name": "theirs"}
        await qemu.execute("blockdev-snapshot-sync", arguments)
    assert "graph-differs" in await codes(vm)
    await fill(vm, "vda", 7)
    with pytest.raises(StoreMismatch):
        await vm.snapshot("s1")


async def test_a_frozen_layer_that_is_open_for_writing_is_told(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    async with user_monitor(vm) as qemu:
        file = "vda-1.file"
        options = {"node-name": "vda-1", "driver": "qcow2", "read-only": False, "file": file, "backing": None}
        reopened = {"node-name": file, "driver": "file", "filename": str((await vm.chains())[0].layers[0].layer.path)}
        await qemu.execute("blockdev-reopen", {"options": [{**reopened, "read-only": False}, options]})
    assert await codes(vm) == {"writable-frozen"}


async def test_layers_that_are_named_around_a_link_stay_where_they_are(home: Path) -> None:
    """The store's folder is reached through a link, and its layers, running or not, by the folder's real name."""
    (real := home / "real").mkdir()
    (link := home / "link").symlink_to(real)
    image = real / "machines/still/vda-1.qcow2"
    image.parent.mkdir(mode=0o700, parents=True)
    await ImageTool().create_base(str(image), format="qcow2", virtual_size=1 << 20)
    async with qmpsnap.open(link) as q:
        vm = await q.define(replace(ONE_DISK, disks=(DiskSpec(name="vda", image=str(image)),)))
        await vm.snapshot("s1", files={"vda": link / "machines/still/extra.qcow2"})
        for state in ("stopped", "paused"):
            if state == "paused":
                await vm.start(paused=True)
            stray = link / "machines/still" / state
            stray.write_bytes(b"of nobody")
            done = await vm.check(repair=True)
            assert (done.findings, [moved.old for moved in done.moved]) == ((), [str(stray)])
        assert image.exists()


async def test_a_qemu_that_hangs_is_told_of_at_once(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    process = context_of(vm).process(await vm.record())
    assert process
    (stray := context_of(vm).home.machine_dir(vm.name) / "stray").write_bytes(b"mine")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        before = time.monotonic()
        done = await vm.check(repair=True)
        assert time.monotonic() - before < 20
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert {finding.code for finding in done.findings} >= {"monitor-silent", "unreferenced-file"}
    assert stray.exists(), "while nobody knows what QEMU has open, nothing is moved"
    assert (await vm.check(repair=True)).findings == ()


@pytest.mark.parametrize("by", ["check", "recover"])
async def test_a_worker_that_nobody_waits_for_is_ended(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    vm = await grown(q, "s1")
    await vm.stop(force=True)
    context, machine = context_of(vm), await vm.record()
    run_dir, (chain,) = context.home.run_dir(vm.name), context.store.chains(vm.name)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_quit", _nothing)
        patch.setattr(worker, "_end", _nothing)
        async with worker.working_on(chain, machine, qemu=context.qemu, run_dir=run_dir, secrets={}):
            pass
    assert await codes(vm) == {"worker-left"}
    if by == "check":
        assert [finding.code for finding in (await vm.check(repair=True)).repaired] == ["worker-left"]
    else:
        assert await vm.recover() == []
    assert worker.find(machine, run_dir) is None
    await hold_invariants(vm)


@pytest.mark.parametrize("over", [True, False])
async def test_what_another_controller_does_while_all_is_read_is_no_damage(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, *, over: bool
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.snapshot("s1")
    look = deep.look
    async with contextlib.AsyncExitStack() as beside:

        async def slowly(context: Context, at: Facts) -> list[Finding]:
            monkeypatch.setattr(deep, "look", look)
            await vm.delete_snapshots("s1")
            if not over:
                await beside.enter_async_context(locked(context, vm.name, "another verb"))
            return await look(context, at)

        monkeypatch.setattr(deep, "look", slowly)
        assert await codes(vm, deep=True) == (set() if over else {"machine-busy"})
    assert await codes(vm, deep=True) == set()


async def _nothing(_: object) -> None:
    """In the place of a worker's end."""


async def test_what_a_dead_controller_left_is_ended_and_then_judged(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    await die_at(Call(STORE, "SqliteStore.settle", "before", 1), "snapshot", "create", "still", "s2")
    assert await codes(vm) == {"operation-open"}
    done = await vm.check(repair=True)
    assert (done.findings, [finding.code for finding in done.repaired]) == ((), ["operation-open"])
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["s1", "s2"]
    await hold_invariants(vm)


async def test_an_image_that_another_process_writes_to_is_told(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    await vm.stop(force=True)
    other = await q.define(replace(ONE_DISK, name="other"))
    await other.start(paused=True)
    active = (await vm.chains())[0].active.path
    file = {"driver": "file", "filename": active, "node-name": "vda-77"}
    async with user_monitor(other) as qemu:
        await qemu.execute("blockdev-add", {"node-name": "vda-78", "driver": "qcow2", "file": file, "backing": None})
    assert await codes(vm) == {"image-in-use"}
    (finding,) = (await vm.check(deep=True)).findings
    assert (finding.code, finding.file) == ("image-in-use", active)
    assert f"(process {(await other.record()).process.pid})" in finding.text  # type: ignore[union-attr]


async def test_a_guest_that_is_frozen_is_thawed(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt", timeout=60)
    await hold_invariants(vm)
    socket = context_of(vm).home.run_dir(vm.name) / AGENT_SOCKET
    async with agent.connect(socket, machine=vm.name) as guest:
        await guest.execute("guest-fsfreeze-freeze", deadline=20)
    assert await codes(vm) == {"guest-frozen"}
    assert (await vm.check(repair=True)).findings == ()
    async with agent.connect(socket, machine=vm.name) as guest:
        assert await guest.execute("guest-fsfreeze-status") == "thawed"


async def test_a_file_with_any_name_hinders_nothing(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    await vm.stop(force=True)
    folder = context_of(vm).home.machine_dir(vm.name)
    names = [b"x\xff", b"y\xff.vmstate", b"vda-99999999999999999999.qcow2", b"vars-99999999999999999999.fd"]
    for name in names:
        Path(os.fsdecode(bytes(folder) + b"/" + name)).touch()
    shutil.copy2((await vm.chains())[0].active.path, folder / "vda-20261101.qcow2")
    await vm.start(paused=True)
    await vm.snapshot("s2")
    await vm.recover()
    assert await codes(vm) == {"unreferenced-file"}
    assert len((await vm.check(repair=True)).moved) == len(names) + 1
    await vm.stop(force=True)
    Path(os.fsdecode(bytes(folder) + b"/x\xff")).touch()
    await vm.undefine(disks="remove")


def test_json_of_the_command_line_is_json(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    from qmpsnap.cli.main import main

    del home
    assert main(["check", "-o", "json"]) == 7, "nobody has defined anything there"
    assert json.loads(capsys.readouterr().out) == {"schema": "qmpsnap/1", "machines": [], "left_out": []}


async def test_a_look_costs_no_guest_whose_stream_is_over(q: qmpsnap.Controller) -> None:
    """QEMU 7.2 ends when it is asked for its nodes before such a job is dismissed."""
    vm = await grown(q, "s1")
    await die_at(Call("qmpsnap.qmp.jobs", "finalize", "after", 1), "stream", "still", "vda", "--progress", "none")
    assert [(job.type, job.status) for job in await vm.jobs()] == [("stream", "concluded")]
    assert (await vm.check()).findings
    assert await vm.is_running()
    assert (await vm.check(repair=True)).findings == ()
    assert await vm.is_running()
    assert (await vm.chains())[0].ids == ("vda-2",)


async def test_a_repair_that_fails_on_its_way_says_what_it_has_done(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(ONE_DISK)
    extra = context_of(vm).home.machine_dir(vm.name) / "extra.qcow2"
    extra.write_bytes(b"somebody's")

    def fails(*_: object) -> None:
        raise HostCannot("an image cannot be opened")

    with monkeypatch.context() as patched:
        patched.setattr(check, "_record_births", fails)
        with pytest.raises(HostCannot) as failed:
            await vm.check(repair=True)
    assert failed.value.effect == "applied"
    assert f"{extra} was moved to " in failed.value.left
    assert not extra.exists()
    assert (await vm.check()).findings == ()
