"""The generation ID: a guest that goes back in time, or goes on twice, finds another GUID in its memory."""

import json
import uuid
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from qmpsnap.ops.lifecycle import bundle
from tests.live.machine import MIB, ONE_DISK, context_of, hold_invariants, user_monitor

pytestmark = pytest.mark.version


async def guid_of(vm: qmpsnap.MachineHandle) -> str:
    """The recorded GUID, which is what QEMU says it has."""
    async with user_monitor(vm) as qemu:
        said = await qemu.execute("query-vm-generation-id")
    guid = (await vm.record()).guid
    assert said == {"guid": guid}
    return guid


async def sees(vm: qmpsnap.MachineHandle, guid: str, place: Path) -> bool:
    """Whether the guest has that GUID in its memory, where its firmware has told QEMU to put it."""
    async with user_monitor(vm) as qemu:
        await qemu.execute("pmemsave", {"val": 0, "size": 64 * MIB, "filename": str(place / "memory")})
    return uuid.UUID(guid).bytes_le in (place / "memory").read_bytes()


async def in_firmware(vm: qmpsnap.MachineHandle, place: Path) -> str:
    await vm.start()
    guid = await guid_of(vm)
    with anyio.fail_after(60):
        while not await sees(vm, guid, place):
            await anyio.sleep(0.1)
    return guid


async def test_each_revert_and_each_fork_shows_the_guest_another_generation(
    q: qmpsnap.Controller, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await q.define(ONE_DISK)
    first = await in_firmware(vm, place)
    warm = await vm.snapshot("warm", kind="full")
    assert warm.vmstate
    assert warm.vmstate.hardware.vmgenid == first
    await vm.revert("warm")
    second = await guid_of(vm)
    assert await sees(vm, second, place)
    assert not await sees(vm, first, place)
    found = [second]
    for fork in await vm.fork("warm", count=2):
        child = await q.machine(fork.machine.name)
        found.append(await guid_of(child))
        assert await sees(child, found[-1], place)
        assert not await sees(child, first, place)
        await hold_invariants(child)
    assert len({first, *found}) == 4
    assert len(await q.templates()) == 1  # whatever the parent's GUID is now
    assert await to_thread.run_sync(main, ["show", "still", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["vmgenid"] == second
    await vm.snapshot("disks")
    await vm.stop(force=True)
    await vm.revert("disks")  # of a stopped machine, which boots some other time
    assert (await vm.record()).guid not in {first, *found}
    await hold_invariants(vm)


async def test_a_saved_machine_goes_on_in_its_generation_unless_it_has_run_since(
    q: qmpsnap.Controller, place: Path
) -> None:
    vm = await q.define(ONE_DISK)
    first = await in_firmware(vm, place)
    await vm.save()
    await vm.restore()
    assert await guid_of(vm) == first
    assert await sees(vm, first, place)
    await vm.stop(force=True)
    await vm.restore()  # once more, and it has run since
    assert (second := await guid_of(vm)) != first
    await vm.save()
    await vm.start(paused=True)
    assert await guid_of(vm) == second  # it boots
    await vm.stop(force=True)
    await vm.restore(paused=True)
    assert (third := await guid_of(vm)) not in {first, second}
    saved = await vm.save()
    await vm.revert(saved.name)
    assert await guid_of(vm) not in {first, second, third}


async def test_memory_that_is_loaded_into_the_running_qemu_keeps_its_generation_and_that_is_said(
    q: qmpsnap.Controller, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    first = await guid_of(vm)
    await vm.snapshot("inside", kind="internal")
    assert await to_thread.run_sync(main, ["snapshot", "revert", "still", "inside", "--discard"]) == 0
    assert "vmgenid) is unchanged: a running QEMU cannot be given another" in capsys.readouterr().err
    assert await guid_of(vm) == first
    await vm.stop(force=True)
    done = await vm.revert("inside", after=False)  # now a QEMU is started
    assert done.notes == ()
    assert await guid_of(vm) != first


async def test_a_machine_of_an_earlier_release_stays_without_the_device(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("qmpsnap.ops.base.vmgenid.new", lambda: None)
        vm = await q.define(ONE_DISK)
    await vm.start()
    await vm.snapshot("warm", kind="full")
    await vm.revert("warm", state="paused")
    (fork,) = await vm.fork("warm", paused=True)
    child = await q.machine(fork.machine.name)
    await child.save()
    await child.restore(paused=True)
    for one in (vm, child):
        assert (await one.record()).vmgenid is None
        async with user_monitor(one) as qemu:
            with pytest.raises(Exception, match="VM Generation ID device not found"):
                await qemu.execute("query-vm-generation-id")


async def test_a_bundle_has_the_device_as_its_memory_has(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    had: list[bool] = []
    for name in ("with", "without"):
        with monkeypatch.context() as patch:
            if name == "without":
                patch.setattr("qmpsnap.ops.base.vmgenid.new", lambda: None)
            vm = await q.define(replace(ONE_DISK, name=name))
        await vm.start()
        await vm.snapshot("warm", kind="full")
        await vm.stop(force=True)
        await bundle.export(context_of(vm), name, place / name)
        before = (await vm.record()).vmgenid
        await vm.undefine(disks="remove")
        after = (await bundle.unpack(context_of(vm), place / name, name=None, allow_extra=False)).vmgenid
        had.append(after is not None)
        assert before is None or after != before
        await vm.revert("warm", state="paused")
    assert had == [True, False]


async def test_memory_with_the_device_is_not_loaded_without_it(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    await vm.snapshot("warm", kind="full")
    await vm.stop(force=True)
    spec = (await vm.record()).spec
    await vm.set(replace(spec, extra=("-device", "vmgenid,guid=auto")), allow_extra=True)
    assert (await vm.record()).guid == ""
    with pytest.raises(StateError, match="device 'vmgenid', now missing"):
        await vm.revert("warm")
    await vm.revert("warm", hardware="snapshot", state="paused")
    await guid_of(vm)
