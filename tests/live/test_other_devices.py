"""Devices that somebody else has plugged into a machine's QEMU, or unplugged from it: who is told, what is refused."""

from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import StateError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec
from qmpsnap.ops.outside.other_devices import Devices, compared
from tests.live.machine import MIB, hold_invariants, user_monitor

SPEC = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=16 * MIB, bus="scsi"),),
    nics=(NicSpec(number=3),),
    extra=("-device", "virtio-rng-pci,id=rng", "-device", '{"driver":"virtio-rng-pci","id":"more"}', "-device", "{"),
)
OURS = {"vda": "scsi-hd", "qs-scsi": "virtio-scsi-pci", "qs-nic3": "virtio-net-pci", "rng": "", "more": ""}


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (OURS, Devices()),
        ({**OURS, "theirs": "e1000e"}, Devices(plugged=(("theirs", "e1000e"),))),
        ({name: driver for name, driver in OURS.items() if name != "qs-nic3"}, Devices(cards=(3,))),
        ({}, Devices(cards=(3,))),
    ],
)
def test_what_is_no_device_of_the_machine(there: dict[str, str], found: Devices) -> None:
    assert compared(SPEC, there) == found
    assert compared(replace(SPEC, extra=("-readconfig", "f")), there).plugged == ()


async def codes(vm: qmpsnap.MachineHandle) -> list[str]:
    return [finding.code for finding in (await vm.check()).findings]


async def refuses(vm: qmpsnap.MachineHandle, kinds: Sequence[str], match: str) -> str:
    """Memory of these kinds is refused, previews alike, and nothing has changed; returns the hint."""
    before = await vm.snapshots()
    hint = ""
    for kind in kinds:
        ways: list[Any] = [vm.plan_snapshot, vm.snapshot]
        for way in ways:
            with pytest.raises(StateError, match=match) as refused:
                await way("s", kind=kind)
            assert refused.value.effect == "none"
            hint = as_typed(refused.value.hint)
    assert await vm.snapshots() == before
    return hint


@pytest.mark.version
async def test_one_that_was_plugged_in(q: qmpsnap.Controller) -> None:
    vm = await q.define(replace(SPEC, extra=(), nics=()))
    await vm.start()
    async with user_monitor(vm) as qemu:
        await qemu.execute("netdev_add", {"id": "theirs", "type": "user"})
        await qemu.execute("device_add", {"driver": "e1000e", "id": "card", "bus": "qs-port0", "netdev": "theirs"})
    finding = (await vm.check()).findings[0]
    text = "QEMU has device card (e1000e), which somebody has plugged in"
    assert (finding.code, finding.text) == ("device-attached", text)
    hint = await refuses(vm, ["full"], r"has device card \(e1000e\), which somebody has plugged in")
    assert hint == "detach it (device_del card); or take its disks alone: qmpsnap snapshot create still"
    with pytest.raises(StateError, match="device card"):
        await vm.save()
    await vm.snapshot("disks")
    await vm.snapshot("inside", kind="internal")  # this QEMU has it
    await vm.revert("inside", discard=True)
    await vm.revert("disks")  # a new QEMU, which lacks it
    assert await codes(vm) == []
    await vm.snapshot("full", kind="full")
    await hold_invariants(vm)


async def test_a_card_that_was_unplugged(q: qmpsnap.Controller) -> None:
    """Of a machine of type pc, whose bus lets go at once of what no guest uses."""
    vm = await q.define(replace(SPEC, machine="pc", extra=(), nics=(NicSpec(), NicSpec())))
    await vm.start()
    await vm.snapshot("inside", kind="internal")
    async with user_monitor(vm) as qemu:
        await qemu.execute("system_reset")
        await qemu.execute("device_del", {"id": "qs-nic1"})
        with anyio.fail_after(20):
            while "qs-nic1" in str(await qemu.execute("qom-list", {"path": "/machine/peripheral"})):
                await qemu.execute("system_reset")  # at which what is to go has gone
    assert await codes(vm) == ["nic-unplugged"]
    hint = await refuses(vm, ["full", "internal"], r"network card 1 \(52:54:.*\) is not attached to the guest")
    assert hint.startswith("detach it for good: qmpsnap nic detach still 1; or take its disks alone: ")
    ways: list[Any] = [vm.revert, vm.plan_revert]
    for way in ways:
        with pytest.raises(StateError, match="network card 1"):
            await way("inside", discard=True)
    await vm.snapshot("disks")
    assert (await vm.detach_nic(1)).plan.live
    assert await codes(vm) == []
    await vm.snapshot("full", kind="full")
    await vm.revert("inside", hardware="snapshot")
    assert len((await vm.record()).spec.nics) == 2
    await hold_invariants(vm)
