"""Snapshots of disks hold the UEFI variables of the same instant, though no transaction of QEMU's includes them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot
from qmpsnap.machine.config.firmware import find_firmware
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.rebuild import rebuild
from qmpsnap.ops.snapshot import nvram
from qmpsnap.qmp import commands
from tests.harness.deaths import Call, die_at
from tests.live.machine import context_of, fill, hold_invariants, user_monitor
from tests.live.test_adopt import Foreign
from tests.live.test_rebuild import at, lose
from tests.live.test_variables import booted, copies, listed, mark, mark_in, put, uefi_spec

__all__ = ["uefi_spec"]


@contextmanager
def written_all_the_time(vm: qmpsnap.MachineHandle) -> Iterator[None]:
    """As by a guest that does nothing else."""
    over = threading.Event()

    def write() -> None:
        with context_of(vm).home.variables(vm.name).open("r+b", buffering=0) as file:
            number = 0
            while not over.wait(0.001):
                number += 1
                file.seek(-8, 2)
                file.write(number.to_bytes(8))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def held_times(vm: qmpsnap.MachineHandle, name: str) -> int:
    """How often the guest is stopped while that snapshot is taken."""
    async with user_monitor(vm) as qemu:
        with qemu.listener(("STOP",)) as listener:
            await vm.snapshot(name)
            await qemu.execute("query-status")  # answered behind all that came before
            return len(listener.clear())


async def test_a_stopped_machine(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await q.define(uefi_spec)
    put(vm, 1)
    taken = await vm.snapshot("s")
    assert mark_in(taken.variables) == 1
    put(vm, 2)
    kept = (await vm.revert("s")).kept
    assert kept is not None
    assert (mark(vm), mark_in(kept.variables)) == (1, 2)
    await hold_invariants(vm)
    await vm.revert(kept.name)
    assert mark(vm) == 2
    await vm.push("p")
    put(vm, 3)
    await vm.pop()
    assert mark(vm) == 2
    assert await vm.add_layers()
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)
    await vm.delete_snapshots(*[snapshot.name for snapshot in await vm.snapshots()])
    assert copies(vm) == set()
    context_of(vm).home.variables("still").unlink()
    ids = (await vm.chains())[0].ids
    with pytest.raises(HostCannot, match=r"vars\.fd cannot be copied"):
        await vm.snapshot("gone")
    assert (await vm.snapshots(), (await vm.chains())[0].ids, copies(vm)) == ((), ids, set())


async def test_a_running_guest_is_held_only_if_it_has_to_be(
    q: qmpsnap.Controller, uefi_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await booted(q, uefi_spec)
    store = context_of(vm).home.variables("still")
    content = b""
    while content != (content := store.read_bytes()):  # it is at its first boot
        await anyio.sleep(1)
    assert await held_times(vm, "quiet") == 0
    read = nvram._content

    def read_and_write(path: str) -> tuple[bytes, bytes]:
        content = read(path)
        put(vm, content[0][-1] + 1 & 0xFF)
        return content

    with monkeypatch.context() as patched:  # a guest that does nothing else writes between any two looks
        patched.setattr(nvram, "_content", read_and_write)
        planned = (await vm.plan_snapshot("busy")).details
        assert planned.hold
        assert await held_times(vm, "busy") == 1
    assert await vm.state() == "running"
    assert (await vm.snapshots())[-1].pause_ms is not None

    real = commands.transaction

    async def transaction(monitor: Any, arguments: dict[str, Any], **more: Any) -> None:
        await real(monitor, arguments, **more)
        monkeypatch.undo()
        put(vm, 77)

    monkeypatch.setattr(commands, "transaction", transaction)
    depth = len((await vm.chains())[0].layers)
    assert await held_times(vm, "between") == 2  # the layer of the first attempt is merged away; taken again
    assert mark_in((await vm.snapshots())[-1].variables) == 77
    assert len((await vm.chains())[0].layers) == depth + 1
    assert copies(vm) == await listed(vm)
    taken = await vm.snapshot("whole", kind="full")
    assert taken.variables is None  # its memory has them
    degradable = await vm.snapshot("degradable", kind="full", degrade=True)
    assert mark_in(degradable.variables) == 77
    await hold_invariants(vm)


async def test_a_lost_store_does_not_lose_them(home: Path, uefi_spec: MachineSpec) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(uefi_spec)
        for number in (1, 2, 3):
            put(vm, number)
            await vm.snapshot(f"s{number}")
        put(vm, 4)
        kept = (await vm.revert("s1")).kept
        assert kept is not None
        await vm.delete_snapshots("s2")  # its layer is merged away
    lose(home)
    assert (await rebuild.run(at(home), set_aside=False)).left_out == ()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert [mark_in(found.variables) for found in await vm.snapshots()] == [1, 3, 4]
        await hold_invariants(vm)


AFTER: dict[str, Call] = {
    "the copy": Call("qmpsnap.machine.config.firmware_files", "copy_variables", "after", 1),
    "the transaction": Call("qmpsnap.qmp.commands", "transaction", "after", 1),
}


@pytest.mark.parametrize("case", AFTER)
@pytest.mark.parametrize("wrote", [False, True])
async def test_killed_after(q: qmpsnap.Controller, uefi_spec: MachineSpec, case: str, *, wrote: bool) -> None:
    vm = await q.define(uefi_spec)
    put(vm, 1)
    await vm.start(paused=True)
    await fill(vm, "vda", 1, length=4096)
    await die_at(AFTER[case], "snapshot", "create", "still", "s")
    if wrote:
        put(vm, 2)
    await vm.recover()
    assert await vm.recover() == []
    stands = case == "the transaction" and not wrote  # else nobody knows what they were
    assert [mark_in(found.variables) for found in await vm.snapshots()] == ([1] if stands else [])
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)


async def test_killed_while_the_guest_is_held(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await q.define(uefi_spec)
    await vm.start()
    with written_all_the_time(vm):
        await die_at(AFTER["the transaction"], "snapshot", "create", "still", "s")
        with anyio.fail_after(60):
            while await vm.state() != "running":  # because of the guard
                await anyio.sleep(0.05)
    await vm.recover()
    assert await vm.snapshots() == ()
    assert copies(vm) == set()
    await hold_invariants(vm)


async def test_those_of_an_adopted_machine_are_told_not_to_be_there(
    q: qmpsnap.Controller, uefi_spec: MachineSpec, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    firmware = find_firmware()
    folder = home / "theirs"
    folder.mkdir()
    (folder / "vars.fd").write_bytes(Path(firmware.vars).read_bytes())
    (folder / "a.raw").write_bytes(bytes(1 << 20))
    theirs = Foreign(
        folder,
        [
            *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={firmware.code}"),
            *("-drive", "if=pflash,unit=1,format=raw,file={folder}/vars.fd"),
            *("-drive", "file={folder}/a.raw,format=raw,if=virtio"),
        ],
    )
    try:
        await q.adopt("theirs", theirs.socket)
        for verb in ("create", "push"):
            capsys.readouterr()
            assert await anyio.to_thread.run_sync(main, ["snapshot", verb, "theirs", verb, "-o", "json"]) == 0
            said = capsys.readouterr()
            (note,) = json.loads(said.out)["notes"]
            assert note in said.err
            assert str(folder / "vars.fd") in note
    finally:
        theirs.process.kill()
        theirs.process.wait()
