"""``disk attach`` and ``disk detach`` on real QEMU: what snapshots have of a disk that comes and goes."""

import subprocess
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.errors import NameTaken, NotFoundError, SpecError, StateError
from qmpsnap.machine.starting.argv import places
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.devices.attach import placed
from qmpsnap.ops.devices.detach import without
from tests.live.machine import MIB, context_of, hold_invariants

SPEC = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),))


def image(folder: Path, name: str = "data.qcow2", *, pattern: int = 7) -> Path:
    """An image of 1 MiB with 4 KiB of content."""
    path = folder / name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    write(path, pattern)
    return path


def write(path: Path | str, pattern: int) -> None:
    """Write 4 KiB of it."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 4k", path], check=True, capture_output=True)


def reads(path: Path | str, pattern: int) -> bool:
    """Whether 4 KiB of it read so."""
    asked = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} 0 4k", str(path)]
    return "verification failed" not in subprocess.run(asked, check=True, capture_output=True, text=True).stdout


async def active(vm: qmpsnap.MachineHandle) -> dict[str, str]:
    """The path that the guest writes to, by disk."""
    return {chain.disk: chain.active.path for chain in await vm.chains()}


@pytest.mark.version
async def test_a_disk_comes_goes_and_comes_back(q: qmpsnap.Controller, tmp_path: Path) -> None:
    vm = await q.define(SPEC)
    await vm.start()
    await vm.snapshot("alone", kind="full")
    with pytest.raises(StateError, match="runs"):
        await vm.attach_disk({"size": "1M"})
    await vm.stop(force=True)

    path = image(tmp_path)
    would = await vm.plan_attach_disk({"image": path}, folders=[tmp_path])
    assert await active(vm) == {"vda": (await active(vm))["vda"]}
    done = await vm.apply(would)
    assert (done.disk.name, done.path, [name for name, _ in done.unloadable]) == ("vdb", str(path), ["alone"])
    assert (await active(vm))["vdb"] == str(path)
    await vm.start()
    both = await vm.snapshot("both", kind="full")
    assert [point.disk for point in both.points] == ["vda", "vdb"]
    await vm.stop(force=True)
    write((await active(vm))["vdb"], 9)

    gone = await vm.detach_disk("vdb")
    assert gone.kept is not None
    assert [name for name, _ in gone.unloadable] == ["both"]
    assert reads(gone.path, 9)
    assert reads(path, 7)
    assert [*await active(vm)] == ["vda"]
    await vm.start()
    await vm.stop(force=True)
    with pytest.raises(StateError, match="different virtual hardware"):
        await vm.revert("both")
    await vm.revert("both", hardware="snapshot", state="paused")
    assert [*await active(vm)] == ["vda", "vdb"]
    await vm.stop(force=True)
    assert reads((await active(vm))["vdb"], 7)
    await vm.revert(gone.kept)
    assert reads((await active(vm))["vdb"], 9)

    await vm.revert("alone", hardware="snapshot", state="paused")
    assert [*await active(vm)] == ["vda"]
    await vm.stop(force=True)
    left = await vm.revert(gone.kept)
    assert "vdb" in left.notes[0]
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()

    again = await vm.attach_disk({"name": "vdb", "base": f"still@{gone.kept}"})
    assert reads(again.path, 9)
    for snapshot in await vm.snapshots():
        await vm.delete_snapshots(snapshot.name)
    assert reads((await active(vm))["vdb"], 9)
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()


async def test_an_image_of_somebody_else_is_theirs_again(q: qmpsnap.Controller, tmp_path: Path) -> None:
    vm = await q.define(SPEC)
    path = image(tmp_path)
    await vm.attach_disk({"image": path, "bus": "scsi", "name": "data"}, folders=[tmp_path])
    gone = await vm.detach_disk("data")
    assert gone.kept is None
    assert context_of(vm).store.layer_at(str(path)) is None
    assert await vm.snapshots() == ()
    await vm.attach_disk({"image": path}, folders=[tmp_path])
    assert (await vm.check()).findings == ()


async def test_one_that_was_made_for_it_is_kept(q: qmpsnap.Controller) -> None:
    vm = await q.define(SPEC)
    made = await vm.attach_disk({"size": "1M"})
    write(made.path, 5)
    gone = await vm.detach_disk("vdb")
    assert reads(made.path, 5)
    with pytest.raises(NameTaken, match="another disk vdb"):
        await vm.attach_disk({"size": "1M", "name": "vdb"})
    assert (await vm.attach_disk({"size": "1M"})).disk.name == "vdc"
    assert gone.kept
    await vm.delete_snapshots(gone.kept)
    assert not Path(made.path).exists()
    await hold_invariants(vm)


async def test_what_is_refused_changes_nothing(q: qmpsnap.Controller, tmp_path: Path) -> None:
    vm = await q.define(SPEC)
    before = await vm.record()
    path = image(tmp_path)
    for disk, error in (
        ({"size": "1M", "name": "vda"}, SpecError),
        ({"size": "much"}, SpecError),
        ({"image": path, "bus": "isa"}, SpecError),
        ({"image": path}, qmpsnap.errors.ImageRefused),
        ({}, SpecError),
    ):
        with pytest.raises(error):
            await vm.attach_disk(disk)
    with pytest.raises(NotFoundError, match="no disk"):
        await vm.detach_disk("vdx")
    assert await vm.record() == before
    assert await context_of(vm).astore.operations("still", only_open=True) == ()


def test_the_others_keep_their_places() -> None:
    scsi = MachineSpec(name="m", disks=tuple(DiskSpec(name=f"vd{c}", size=MIB, bus="scsi") for c in "abc"))
    left = without(scsi, "vdb")
    assert places(left.disks) == {"vda": 0, "vdc": 2}
    new = placed(left.disks, DiskSpec(name="vdd", size=MIB, bus="scsi"))
    assert places((*left.disks, new))["vdd"] == 1
    assert placed(left.disks, DiskSpec(name="vdd", size=MIB)).address == ""
