"""Disks larger than their base, as cloud images need them; CD images; kernels that are not there."""

from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.errors import ImageRefused, QmpsnapError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB, fill, hold_invariants, user_monitor
from tests.live.test_import import image


async def test_a_disk_grows_beyond_its_base(q: qmpsnap.Controller, place: Path) -> None:
    base = image(place / "base.qcow2", mark=1)
    disk = DiskSpec(name="vda", base=str(base), size=48 * MIB)
    vm = await q.define(MachineSpec(name="cloud", memory=64 * MIB, disks=(disk,)), folders=[base.parent])
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        backends: Any = await qemu.execute("query-block")
    assert f"'virtual-size': {48 * MIB}" in str(backends)
    await fill(vm, "vda", 7, offset=40 * MIB)  # beyond the base's end
    await vm.snapshot("s1")
    await vm.revert("s1")
    await hold_invariants(vm)
    await vm.stop(force=True)


async def test_a_disk_is_not_cut_below_its_base(q: qmpsnap.Controller, place: Path) -> None:
    base = image(place / "base.qcow2", mark=1)
    disk = DiskSpec(name="vda", base=str(base), size=8 * MIB)
    with pytest.raises(
        ImageRefused, match=f"its size of {8 * MIB} bytes is less than the {16 * MIB} bytes of its base"
    ):
        await q.define(MachineSpec(name="cloud", memory=64 * MIB, disks=(disk,)), folders=[base.parent])


@pytest.mark.version
@pytest.mark.parametrize("machine", ["q35", "pc"])
async def test_a_cdrom_is_there_and_in_no_snapshot(machine: str, q: qmpsnap.Controller, place: Path) -> None:
    iso = place / "a.iso"
    iso.write_bytes(b"\1" * MIB)
    spec = MachineSpec(
        name="cd", machine=machine, memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),), cdrom=str(iso)
    )
    vm = await q.define(spec, folders=[place])
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        backends: Any = await qemu.execute("query-block")
    drive = next(one for one in backends if "qs-cdrom" in one["qdev"])
    assert (drive["inserted"]["ro"], drive["inserted"]["file"]) == (True, str(iso))
    assert [point.disk for point in (await vm.snapshot("s1")).points] == ["vda"]
    assert (await vm.save(name="with-memory")).outside == ()
    assert (await vm.restore(paused=True)).snapshot.name == "with-memory"
    await hold_invariants(vm)
    await vm.stop(force=True)
    iso.unlink()
    with pytest.raises(ImageRefused, match=r"there is no image .*a\.iso"):
        await vm.start(paused=True)


MISSING: dict[str, dict[str, Any]] = {
    "there is no kernel /nonexistent/vmlinuz": {"kernel": "/nonexistent/vmlinuz"},
    "there is no initrd /nonexistent/initrd": {"kernel": "/proc/version", "initrd": "/nonexistent/initrd"},
    "the kernel /proc is not a file": {"kernel": "/proc"},
    "the small guest is not built: there is no kernel": {"kernel": "@guest/vmlinux"},
    "there is no image /nonexistent/a.iso": {"cdrom": "/nonexistent/a.iso"},
}


@pytest.mark.parametrize("said", MISSING)
async def test_what_a_machine_boots_is_looked_at(said: str, q: qmpsnap.Controller) -> None:
    disk = DiskSpec(name="vda", size=MIB)
    with pytest.raises(QmpsnapError) as caught:
        await q.define(
            MachineSpec(name="m", memory=64 * MIB, disks=(disk,), **MISSING[said]), folders=[Path("/nonexistent")]
        )
    assert said in caught.value.message
    if "built" in said:
        assert caught.value.hint.endswith(f"launch/guest/build {q.context.home.guest}")
    assert await q.machines() == ()
