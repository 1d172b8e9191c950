"""``disk attach`` and ``disk detach`` on real QEMU: what snapshots have of a disk that comes and goes."""

import subprocess
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import DeadlinePassed, NameTaken, NotFoundError, SpecError, StateError
from qmpsnap.machine.starting.root_ports import places, without_lost
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.devices.attach import placed
from qmpsnap.ops.devices.detach import without
from tests.live.booted import start_booted
from tests.live.machine import MIB, context_of, hold_invariants, user_monitor

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
    with pytest.raises(StateError, match="stopped"):
        await vm.attach_disk({"size": "1M", "bus": "sata"})
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


@pytest.mark.version
async def test_while_it_runs(q: qmpsnap.Controller, tmp_path: Path) -> None:
    scsi = DiskSpec(name="vda", size=MIB, bus="scsi")
    vm = await q.define(replace(SPEC, disks=(scsi,)))
    await vm.start()
    would = await vm.plan_attach_disk({"size": "1M"})
    assert [each["execute"] for each in would.qmp] == ["blockdev-add", "device_add"]
    port = (await vm.apply(would)).disk
    assert (port.name, port.address) == ("vdb", "qs-port0")
    path = image(tmp_path)
    await vm.attach_disk({"image": path, "bus": "scsi"}, folders=[tmp_path])
    assert await devices(vm) >= {"vda", "vdb", "vdc"}
    taken = await vm.snapshot("three", kind="full")
    assert [point.disk for point in taken.points] == ["vda", "vdb", "vdc"]

    before = await vm.record()
    with pytest.raises(DeadlinePassed, match="has not let go of device vdb within 0"):
        await vm.detach_disk("vdb", timeout=0.2)
    assert (await vm.record()).spec == before.spec
    assert (await vm.plan_detach_disk("vdc")).qmp[0]["execute"] == "device_del"
    gone = await vm.detach_disk("vdc")
    assert "vdc" not in await devices(vm)
    assert await nodes(vm) == {layer.layer.id for chain in await vm.chains() for layer in chain.layers}
    assert gone.kept is not None
    await hold_invariants(vm)
    with pytest.raises(StateError, match="would keep the SCSI controller"):
        await vm.detach_disk("vda")
    await vm.revert("three", hardware="snapshot")
    assert await devices(vm) >= {"vda", "vdb", "vdc"}
    await vm.stop(force=True)
    await hold_invariants(vm)
    assert (await vm.check()).findings == ()


async def test_one_that_the_guest_lets_go_later(q: qmpsnap.Controller) -> None:
    two = tuple(DiskSpec(name=name, size=MIB, bus="scsi") for name in ("vda", "vdb"))
    vm = await q.define(replace(SPEC, disks=two, root_ports=0))
    await vm.start()
    with pytest.raises(StateError, match="no free PCIe root port"):
        await vm.attach_disk({"size": "1M"})
    async with user_monitor(vm) as qemu:
        await qemu.execute("device_del", {"id": "vdb"})
        with anyio.fail_after(20):
            while "vdb" in str(await qemu.execute("query-block")):
                await anyio.sleep(0.01)
    taken = await vm.snapshot("alone")
    assert [other.sentence for other in taken.outside] == ["disk vdb is not attached to the guest"]
    assert (await vm.detach_disk("vdb")).kept
    assert await nodes(vm) == {layer.layer.id for chain in await vm.chains() for layer in chain.layers}
    await hold_invariants(vm)


@pytest.mark.grid
@pytest.mark.version
async def test_a_guest_that_lets_go(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    assert (await vm.attach_disk({"size": "1M"})).disk.address == "qs-port0"
    await vm.run("until test -e /sys/block/vdc; do sleep 0.1; done")
    size = await vm.run("cat /sys/block/vdc/size")
    assert size.stdout == "2048\n"
    await vm.run("printf hello >/dev/vdc; sync")
    await vm.snapshot("warm", kind="full")
    gone = await vm.detach_disk("vdc", timeout=60)
    assert (await vm.run("test ! -e /sys/block/vdc")).exit_status == 0
    assert (await vm.check()).findings == ()
    await vm.revert("warm", hardware="snapshot")
    assert (await vm.run("head -c 5 /dev/vdc")).stdout == "hello"
    assert gone.kept
    await vm.stop(force=True)


async def devices(vm: qmpsnap.MachineHandle) -> set[str]:
    async with user_monitor(vm) as qemu:
        found: Any = await qemu.execute("qom-list", {"path": "/machine/peripheral"})
    return {each["name"] for each in found}


async def nodes(vm: qmpsnap.MachineHandle) -> set[str]:
    """The format nodes that QEMU has."""
    async with user_monitor(vm) as qemu:
        found: Any = await qemu.execute("query-named-block-nodes", {"flat": True})
    return {each["node-name"] for each in found if not each["node-name"].endswith(".file")}


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
    new = placed(left, DiskSpec(name="vdd", size=MIB, bus="scsi"))
    assert places((*left.disks, new))["vdd"] == 1
    assert placed(left, DiskSpec(name="vdd", size=MIB)).address == ""
    ports = replace(left, root_ports=1)
    first = placed(ports, DiskSpec(name="vdd", size=MIB))
    assert first.address == "qs-port0"
    assert placed(replace(ports, disks=(first,)), DiskSpec(name="vde", size=MIB)).address == ""
    plugged = replace(ports, disks=(first,))
    assert without_lost(plugged) == plugged
    assert without_lost(replace(plugged, root_ports=0)).disks[0].address == ""
