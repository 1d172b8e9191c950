"""``nic attach`` and ``nic detach`` on real QEMU: which cards there are, where, and with which addresses."""

from typing import Any

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import DeadlinePassed, NotFoundError, QmpError, SpecError, StateError
from qmpsnap.machine.starting import argv
from qmpsnap.machine.starting.root_ports import without_lost
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec, numbered
from qmpsnap.ops.devices.nics import placed, without
from tests.live.booted import start_booted
from tests.live.machine import MIB, context_of, hold_invariants, user_monitor

SPEC = MachineSpec(
    name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),), nics=(NicSpec(), NicSpec(model="e1000"))
)


async def macs(vm: qmpsnap.MachineHandle) -> dict[str, str]:
    """The address of each card that QEMU has."""
    found: dict[str, str] = {}
    async with user_monitor(vm) as qemu:
        devices: Any = await qemu.execute("qom-list", {"path": "/machine/peripheral"})
        for device in devices:
            if device["name"].startswith("qs-nic"):
                where = {"path": f"/machine/peripheral/{device['name']}", "property": "mac"}
                found[device["name"]] = str(await qemu.execute("qom-get", where))
    return found


@pytest.mark.version
async def test_cards_come_and_go(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    await vm.start()
    before = await macs(vm)
    taken = await vm.snapshot("two", kind="full")
    new = await vm.apply(await vm.plan_attach_nic({"model": "e1000e"}))
    assert (new.number, [command for command, _ in new.commands]) == (2, ["netdev_add", "device_add"])
    assert [name for name, _ in new.unloadable] == [taken.name]
    assert await macs(vm) == {**before, "qs-nic2": new.mac}
    with pytest.raises(StateError, match="card 0 is on no PCIe root port"):
        await vm.detach_nic(0)
    with pytest.raises(DeadlinePassed, match="has not let go"):
        await vm.detach_nic(new.mac, timeout=0.2)
    await vm.snapshot("three", kind="full")
    await vm.stop(force=True)

    assert (await vm.detach_nic("0")).mac == before["qs-nic0"]
    await vm.start()
    assert await macs(vm) == {"qs-nic1": before["qs-nic1"], "qs-nic2": new.mac}
    await vm.revert("three", hardware="snapshot")
    assert await macs(vm) == {**before, "qs-nic2": new.mac}
    await vm.revert("two", hardware="snapshot")
    assert await macs(vm) == before
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()


async def test_what_is_refused_changes_nothing(q: qmpsnap.Controller) -> None:
    vm = await q.define(replace(SPEC, root_ports=1))
    await vm.start()
    before = await vm.record()
    mine = argv.mac(SPEC.nics[1], before.uuid, 1)
    for wrong in ({"kind": "tap"}, {"kind": "none"}, {"mac": mine.upper()}, {"number": 7}, {"address": "pcie.0"}):
        with pytest.raises(SpecError):
            await vm.attach_nic(wrong)
    with pytest.raises(QmpError):
        await vm.attach_nic({"mac": "52:54:00:00:00:01", "forwards": [{"host": 1, "guest": 1, "address": "192.0.2.1"}]})
    with pytest.raises(StateError, match="helper for bridges"):
        await vm.attach_nic({"kind": "bridge", "bridge": "br0"})
    with pytest.raises(NotFoundError, match="no network card"):
        await vm.detach_nic(7)
    assert (await vm.record()).spec == before.spec
    await vm.attach_nic({})
    with pytest.raises(StateError, match="no free PCIe root port"):
        await vm.attach_nic({})
    assert await context_of(vm).astore.operations("still", only_open=True) == ()


async def test_what_others_have_done(q: qmpsnap.Controller) -> None:
    """A card that QEMU has lost is detached at once; what somebody else has named so is not removed."""
    vm = await q.define(replace(SPEC, nics=()))
    await vm.attach_nic({})
    await vm.start()
    async with user_monitor(vm) as qemu:
        await qemu.execute("netdev_add", {"id": "net1", "type": "user"})
    with pytest.raises(QmpError, match="net1"):
        await vm.attach_nic({})
    async with user_monitor(vm) as qemu:
        await qemu.execute("netdev_del", {"id": "net1"})
    assert (await vm.attach_nic({})).number == 1
    assert set(await macs(vm)) == {"qs-nic0", "qs-nic1"}


def test_cards_keep_their_numbers() -> None:
    spec = replace(SPEC, root_ports=1)
    plugged = placed(replace(spec, nics=(*spec.nics, NicSpec(model="vmxnet3"))))
    assert [(nic.number, nic.address) for nic in plugged.nics] == [(None, None), (None, None), (2, "qs-port0")]
    again = placed(replace(plugged, nics=(*plugged.nics, NicSpec())))
    assert (again.nics[-1].number, again.nics[-1].address) == (3, "")
    left = without(plugged, 0)
    assert [number for number, _ in numbered(left.nics)] == [1, 2]

    plain = left.unplugged()
    assert plain.plugged_as(left) == left
    other = replace(plain, nics=(plain.nics[0], replace(plain.nics[1], model="e1000e")))
    assert [nic.number for nic in other.plugged_as(left).nics] == [1, 2]
    assert replace(plain, nics=plain.nics[1:]).plugged_as(left).nics == left.nics[1:]
    more = replace(plain, nics=(NicSpec(model="rtl8139"), *plain.nics)).plugged_as(left)
    assert [nic.number for nic in more.nics] == [3, 1, 2]
    assert replace(spec, nics=spec.nics[1:]).plugged_as(spec).nics == spec.nics[1:]
    assert without_lost(replace(plugged, root_ports=0)).nics[-1].address == ""


@pytest.mark.grid
@pytest.mark.version
async def test_a_guest_that_lets_go(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    new = await vm.attach_nic({"model": "e1000e"})
    await vm.run("until test -e /sys/bus/pci/devices/0000:01:00.0; do sleep 0.1; done")
    await vm.detach_nic(new.number, timeout=60)
    assert await macs(vm) == {}
    assert (await vm.check()).findings == ()
    await vm.stop(force=True)
