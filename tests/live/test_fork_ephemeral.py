"""Ephemeral forks, and templates: what is removed when, whoever or whatever ends them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, NotFoundError, StateError
from qmpsnap.machine import templates
from qmpsnap.machine.qemu import wait_end
from tests.live.machine import MIB, ONE_DISK, context_of, hold_invariants

pytestmark = pytest.mark.version


@pytest.fixture
async def vm(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    """A machine in its firmware, with the full snapshot `warm`."""
    found = await q.define(ONE_DISK)
    await found.start()
    await found.snapshot("warm", kind="full")
    return found


async def kill(child: qmpsnap.MachineHandle) -> None:
    process = context_of(child).process(await child.record())
    assert process
    os.kill(process.pid, signal.SIGKILL)
    await wait_end(process, deadline=10)


async def names(q: qmpsnap.Controller) -> list[str]:
    return [found.name for found in await q.machines()]


async def test_an_ephemeral_fork_goes_when_it_stops(q: qmpsnap.Controller, vm: qmpsnap.MachineHandle) -> None:
    (fork,) = await vm.fork("warm", ephemeral=True)
    child = await q.machine(fork.machine.name)
    await child.snapshot("own")
    home = context_of(vm).home
    assert home.machine_dir(child.name).is_dir()
    await child.stop(force=True)
    assert await names(q) == ["still"]
    left = [home.machine_dir(child.name), home.run_dir(child.name), home.log_dir(child.name), home.lock(child.name)]
    assert not any(place.exists() for place in left)
    await hold_invariants(vm)


async def test_the_next_command_removes_ephemeral_forks_that_were_killed(
    q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    forks = [fork.machine.name for fork in await vm.fork("warm", count=3, ephemeral=True)]
    (kept,) = await vm.fork("warm", "kept")
    for name in [*forks, kept.machine.name]:
        await kill(await q.machine(name))
    assert await to_thread.run_sync(main, ["check", "still"]) == 0
    capsys.readouterr()
    assert await to_thread.run_sync(main, ["list", "-o", "json"]) == 0
    machines = json.loads(capsys.readouterr().out)["machines"]
    assert [(m["name"], m["state"], m["origin"] and m["origin"]["snapshot"]) for m in machines] == [
        ("kept", "stopped", "warm"),
        ("still", "running", None),
    ]
    assert sorted(path.name for path in context_of(vm).home.machines.iterdir()) == ["kept", "still"]


async def test_a_fork_ends_with_the_process_that_it_was_made_for(
    q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, home: Path
) -> None:
    program = """
import anyio, os, qmpsnap
from qmpsnap.machine.starting import process
from qmpsnap.ops.fork import run
from qmpsnap.ops.fork.request import ForkRequest
async def main():
    async with qmpsnap.open() as q:
        mine = process.existing(os.getpid())
        await run.run(q.context, "still", ForkRequest(snapshot="warm", ephemeral=True, owner=mine))
anyio.run(main)
"""
    await to_thread.run_sync(lambda: subprocess.run([sys.executable, "-c", program], check=True))
    child = await q.machine("still-f1")
    process = context_of(child).process(await child.record())
    assert process
    async with qmpsnap.open() as another:
        assert await names(another) == ["still"]
    assert await wait_end(process, deadline=10)


async def test_a_lost_or_changed_template_is_made_again(q: qmpsnap.Controller, vm: qmpsnap.MachineHandle) -> None:
    (shelf,) = templates.shelves(context_of(vm).home)
    await vm.fork("warm", "first")
    (template,) = shelf.all()
    ram = shelf.of(template.key) / templates.RAM
    assert ram.stat().st_mode & 0o777 == 0o600
    with ram.open("r+b") as file:
        file.seek(MIB)
        file.write(b"another")
    os.utime(ram)
    assert shelf.all() == []  # its times have changed
    await vm.fork("warm", "second")
    (again,) = shelf.all()
    assert again.ram.inode != template.ram.inode
    shelf.remove(again.key)
    await vm.fork("warm", "third")
    assert len(shelf.all()) == 1
    for name in ("first", "second", "third"):
        assert await (await q.machine(name)).state() == "running"


async def test_a_deep_check_reads_templates_and_repair_removes_a_damaged_one(
    q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shelf,) = templates.shelves(context_of(vm).home)
    await vm.fork("warm")
    (template,) = shelf.all()
    assert (await vm.check(deep=True)).findings == ()
    with (shelf.of(template.key) / templates.RAM).open("r+b") as file:
        file.seek(MIB)
        file.write(b"rot")
    # As a bit that flips by itself: nothing but the content is otherwise.
    monkeypatch.setattr(templates.Seen, "__eq__", lambda *_: True)
    (found,) = (await vm.check(deep=True)).findings
    assert (found.code, found.file) == ("template-damaged", str(shelf.of(template.key)))
    assert (await vm.check()).findings == ()
    done = await vm.check(deep=True, repair=True)
    assert [one.code for one in done.repaired] == ["template-damaged"]
    assert shelf.names() == []


async def test_templates_are_listed_and_those_not_in_use_are_pruned(
    q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    await vm.fork("warm", "user")
    await vm.snapshot("other", kind="full")
    (unused,) = await vm.fork("other", "gone")
    await (await q.machine(unused.machine.name)).stop(force=True)
    assert await to_thread.run_sync(main, ["template", "list", "-o", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)["templates"]
    assert [(one["source"], one["forks"]) for one in listed] == [("still@warm", ["user"]), ("still@other", [])]
    (shelf,) = templates.shelves(context_of(vm).home)
    (shelf.folder / templates.part_name("0" * 32, "11111111-1111-4111-8111-111111111111")).mkdir()
    assert await to_thread.run_sync(main, ["template", "prune", "--dry-run"]) == 0
    assert len(shelf.names()) == 3
    assert await to_thread.run_sync(main, ["template", "prune"]) == 0
    assert [one.template.source for one in await q.templates()] == ["still@warm"]
    assert shelf.names() == [one.template.key for one in await q.templates()]
    await q.prune_templates(all=True)
    assert shelf.names() == []
    assert await (await q.machine("user")).state() == "running"


async def test_templates_stay_below_their_limit_and_what_forks_map_counts(
    q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(templates.LIMIT, f"{ONE_DISK.memory * 2 >> 20}M")
    for name in ("second", "third"):
        await vm.snapshot(name, kind="full")
    (shelf,) = templates.shelves(context_of(vm).home)
    for name in ("warm", "second", "third"):
        (fork,) = await vm.fork(name)
        if name != "third":
            await (await q.machine(fork.machine.name)).stop(force=True)
    assert [one.source for one in shelf.all()] == ["still@second", "still@third"]  # the oldest one went
    await vm.fork("second")
    await q.prune_templates(all=True)  # both are mapped still
    with pytest.raises(HostCannot, match="running forks use 128 of the 128 MiB"):
        await vm.fork("warm", "more")
    with pytest.raises(NotFoundError):
        await q.machine("more")
    assert shelf.names() == []


async def test_a_template_that_is_not_in_memory_is_told(
    q: qmpsnap.Controller, vm: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Path("/var/tmp") / f"qs-templates-{os.getpid()}"
    if templates.is_memory(Path("/var/tmp")):
        pytest.fail("/var/tmp is memory here: name a folder on a disk")
    monkeypatch.setenv("QMPSNAP_TEMPLATES", str(disk))
    try:
        async with qmpsnap.open() as other:
            (fork,) = await (await other.machine("still")).fork("warm")
            assert "no tmpfs" in fork.background
            child = await other.machine(fork.machine.name)
            taken = await child.snapshot("own", kind="full")
            assert taken.vmstate
            assert taken.vmstate.mode == "stopped"
            await other.prune_templates(all=True)
            await child.stop(force=True)
    finally:
        disk.rmdir()


async def test_what_cannot_be_forked_is_refused(q: qmpsnap.Controller, vm: qmpsnap.MachineHandle) -> None:
    await vm.snapshot("disks")
    with pytest.raises(StateError, match="of kind disk and has no memory"):
        await vm.fork("disks")
    with pytest.raises(NotFoundError):
        await vm.fork("nothing")
    await vm.fork("warm", "taken", paused=True)
    assert await (await q.machine("taken")).state() == "paused"
    with pytest.raises(StateError, match="machine taken has existed since"):
        await vm.fork("warm", "taken")
    spec = replace(ONE_DISK, name="keys", extra=("-tpmdev", "emulator,id=tpm0,chardev=c"))
    await q.define(spec, allow_extra=True)
    with pytest.raises(StateError, match="has a TPM"):
        await (await q.machine("keys")).fork("any")
