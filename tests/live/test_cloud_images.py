"""Disks that are larger than the image that they are based on, as cloud images are used."""

import pytest

import qmpsnap
from qmpsnap.errors import ImageRefused
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB, fill, hold_invariants, user_monitor
from tests.live.test_import import image


async def test_a_disk_grows_beyond_its_base(q: qmpsnap.Controller, place: object) -> None:
    base = image(q.context.home.data / "elsewhere" / "base.qcow2", mark=1)
    disk = DiskSpec(name="vda", base=str(base), size=48 * MIB)
    vm = await q.define(MachineSpec(name="cloud", memory=64 * MIB, disks=(disk,)), folders=[base.parent])
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        backends: object = await qemu.execute("query-block")
    assert f"'virtual-size': {48 * MIB}" in str(backends)
    await fill(vm, "vda", 7, offset=40 * MIB)  # beyond the base's end
    await vm.snapshot("s1")
    await vm.revert("s1")
    await hold_invariants(vm)
    await vm.stop(force=True)


async def test_a_disk_is_not_cut_below_its_base(q: qmpsnap.Controller, place: object) -> None:
    base = image(q.context.home.data / "elsewhere" / "base.qcow2", mark=1)
    disk = DiskSpec(name="vda", base=str(base), size=8 * MIB)
    with pytest.raises(
        ImageRefused, match=f"its size of {8 * MIB} bytes is less than the {16 * MIB} bytes of its base"
    ):
        await q.define(MachineSpec(name="cloud", memory=64 * MIB, disks=(disk,)), folders=[base.parent])
