"""Disks that are block devices: every verb on one, and what tells a device from another and its users from none."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.block.usage import survey
from qmpsnap.errors import HostCannot, ImageInUse, ImageRefused, StateError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.rebuild import rebuild
from tests.live.devices import MIB, loop, require_loops, run
from tests.live.machine import Hashes, active_hash, context_of, fill, hold_invariants, snapshot_hashes, user_monitor

# "launched" and its "folder" are fixtures
from tests.live.test_adopt import folder, launched  # noqa: F401
from tests.live.test_rebuild import at, lose

DEVICE = ("-device", "virtio-blk-pci,drive=n,id=vda")


@pytest.fixture
def device(place: Path) -> Iterator[Path]:
    require_loops()
    with loop(place / "disk.img") as found:
        yield found


@pytest.fixture
def named(place: Path, device: Path) -> Path:
    """The device by a link, as a logical volume has only such names."""
    name = place / "volume"
    name.symlink_to(device)
    return name


def of(name: Path) -> MachineSpec:
    return MachineSpec(name="web", memory=64 * MIB, disks=(DiskSpec(name="vda", device=str(name)),))


async def grown(q: qmpsnap.Controller, spec: MachineSpec) -> tuple[qmpsnap.MachineHandle, Hashes, str]:
    """A machine of one disk with two snapshots, stopped; what they read as, and what its disk does."""
    vm = await q.define(spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("s1")
    await fill(vm, "vda", 2, offset=MIB)
    await vm.snapshot("s2")
    await fill(vm, "vda", 3, offset=2 * MIB)
    await vm.stop(force=True)
    return vm, await snapshot_hashes(vm), await active_hash(vm)


async def require_rebuilt(home: Path, spec: MachineSpec) -> None:
    """A machine of that spec is what it was, after its store was lost and rebuilt."""
    async with qmpsnap.open() as q:
        vm, hashes, now = await grown(q, spec)
        chains = await vm.chains()
    lose(home)
    await rebuild.run(at(home), set_aside=False)
    async with qmpsnap.open() as q:
        vm = await q.machine("web")
        assert await vm.chains() == chains
        assert await active_hash(vm) == now
        await hold_invariants(vm, hashes)


def content(device: Path) -> bytes:
    return device.read_bytes()


@pytest.mark.version
async def test_a_device_has_its_place_in_the_store_and_in_qemu(q: qmpsnap.Controller, named: Path) -> None:
    vm, hashes, _ = await grown(q, of(named))
    chain = (await vm.chains())[0]
    base = chain.layers[0].layer
    assert (base.path, base.format, base.storage, base.virtual_size) == (str(named), "raw", "host_device", 16 * MIB)
    assert (base.device, base.inode, base.identity[:5], base.owned) == (0, 0, "loop:", False)
    assert len(chain.layers) == 3
    assert all(Path(at.layer.path).parent == context_of(vm).home.machine_dir("web") for at in chain.layers[1:])
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        nodes: Any = await qemu.execute("query-named-block-nodes")
    by_name = {node["node-name"]: node for node in nodes}
    assert by_name[f"{base.id}.file"]["drv"] == "host_device"
    # No name is an override: then its text would grow with each layer.
    assert all(not node["file"].startswith("json:") for node in nodes)
    await hold_invariants(vm, hashes)


@pytest.mark.version
async def test_a_snapshot_of_a_device_is_reverted_to(q: qmpsnap.Controller, named: Path) -> None:
    vm, hashes, _ = await grown(q, of(named))
    await vm.revert("s1")
    assert await active_hash(vm) == hashes["s1", "vda"]
    await vm.start(paused=True)
    await fill(vm, "vda", 4, offset=4 * MIB)
    await vm.revert("s2", state="paused")
    assert await active_hash(vm) == hashes["s2", "vda"]
    await hold_invariants(vm, hashes)


@pytest.mark.version
@pytest.mark.parametrize("runs", [False, True])
async def test_deleting_all_snapshots_leaves_all_data_on_the_device(
    q: qmpsnap.Controller, named: Path, device: Path, *, runs: bool
) -> None:
    vm, _, now = await grown(q, of(named))
    if runs:
        await vm.start(paused=True)
    await vm.delete_snapshots("s1")
    await hold_invariants(vm)
    await vm.delete_snapshots("s2")
    await hold_invariants(vm)
    (layer,) = (await vm.chains())[0].layers
    assert layer.layer.path == str(named)
    assert await active_hash(vm) == now
    assert content(device)[2 * MIB : 3 * MIB] == b"\3" * MIB
    assert not [*context_of(vm).home.machine_dir("web").glob("*.qcow2")]


@pytest.mark.version
@pytest.mark.parametrize("runs", [False, True])
async def test_a_commit_goes_into_the_device(q: qmpsnap.Controller, named: Path, device: Path, *, runs: bool) -> None:
    vm, _, now = await grown(q, of(named))
    if runs:
        await vm.start(paused=True)
    base = (await vm.chains())[0].layers[0].layer.id
    await vm.commit("vda", base=base, consume=True)
    assert [at.layer.id for at in (await vm.chains())[0].layers] == [base]
    await hold_invariants(vm)
    assert await active_hash(vm) == now
    assert content(device)[MIB : 2 * MIB] == b"\2" * MIB


@pytest.mark.version
@pytest.mark.parametrize("runs", [False, True])
async def test_a_stream_or_a_mirror_leaves_the_device_as_it_is(
    q: qmpsnap.Controller, named: Path, device: Path, place: Path, *, runs: bool
) -> None:
    vm, hashes, now = await grown(q, of(named))
    before = content(device)
    if runs:
        await vm.start(paused=True)
    await vm.stream("vda")
    await hold_invariants(vm, hashes)
    await vm.delete_snapshots("s1", "s2")
    assert await active_hash(vm) == now
    assert content(device) == before
    assert [at.layer.format for at in (await vm.chains())[0].layers] == ["qcow2"]
    await hold_invariants(vm)


@pytest.mark.version
async def test_a_mirror_moves_a_guest_from_a_device_to_a_file(
    q: qmpsnap.Controller, named: Path, device: Path, place: Path
) -> None:
    vm = await q.define(of(named))
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.mirror("vda", place / "copy.qcow2", mode="pivot")
    await fill(vm, "vda", 2)
    assert content(device)[:MIB] == b"\1" * MIB
    (layer,) = (await vm.chains())[0].layers
    assert layer.layer.storage == "file"
    await hold_invariants(vm)


@pytest.mark.version
async def test_memory_is_saved_beside_a_device(q: qmpsnap.Controller, named: Path) -> None:
    vm = await q.define(of(named))
    await vm.start()
    await vm.snapshot("full", kind="full")
    await fill(vm, "vda", 2)
    await vm.revert("full")
    hashes = await snapshot_hashes(vm)
    await hold_invariants(vm, hashes)


async def test_no_tag_goes_into_a_device(q: qmpsnap.Controller, named: Path) -> None:
    vm = await q.define(of(named))
    with pytest.raises(StateError, match="disk vda of machine web is raw: it cannot hold an internal snapshot"):
        await vm.snapshot("inside", kind="internal")


async def test_a_clone_reads_what_lies_on_a_device(q: qmpsnap.Controller, named: Path) -> None:
    vm, hashes, _ = await grown(q, of(named))
    first, second = (at.layer for at in (await vm.chains())[0].layers[:2])
    bases = {"raw": DiskSpec(name="vda", base=first.path, format="raw"), "top": DiskSpec(name="vda", base=second.path)}
    for name, disk in bases.items():
        clone = await q.define(MachineSpec(name=name, memory=64 * MIB, disks=(disk,)))
        assert await active_hash(clone) == hashes["s1" if name == "raw" else "s2", "vda"]
        assert (await clone.chains())[0].layers[0].layer.id == first.id
        await clone.start(paused=True)
        await hold_invariants(clone)
    await vm.start(paused=True)
    await vm.snapshot("s3")
    with pytest.raises(StateError, match="is read by"):
        await vm.commit("vda", base=first.id, consume=True)
    await hold_invariants(vm, hashes)


async def test_a_device_of_no_machine_is_no_base(q: qmpsnap.Controller, named: Path) -> None:
    disk = DiskSpec(name="vda", base=str(named), format="raw")
    with pytest.raises(ImageRefused, match="block device"):
        await q.define(MachineSpec(name="clone", memory=64 * MIB, disks=(disk,)))


async def test_a_machine_on_a_device_is_forgotten_and_the_device_is_not(
    q: qmpsnap.Controller, named: Path, device: Path
) -> None:
    vm, _, _ = await grown(q, of(named))
    before = content(device)
    await vm.undefine(disks="remove")
    assert content(device) == before
    assert named.exists()


async def test_a_store_is_rebuilt_with_its_devices(home: Path, named: Path) -> None:
    await require_rebuilt(home, of(named))


async def test_a_device_of_somebody_elses_qemu_is_taken_over_by_its_name(
    q: qmpsnap.Controller,
    launched: Any,  # noqa: F811
    named: Path,
) -> None:
    theirs = launched([*DEVICE, "-blockdev", f"driver=raw,node-name=n,file.driver=host_device,file.filename={named}"])
    vm = await q.adopt("theirs", theirs.socket)
    (layer,) = (await vm.chains())[0].layers
    assert (layer.layer.path, layer.layer.storage, layer.layer.identity[:5]) == (str(named), "host_device", "loop:")
    assert (await vm.record()).spec.disks[0].device == str(named)
    await theirs.io("write -P 1 0 1M")
    await vm.snapshot("s1")
    hashes = await snapshot_hashes(vm)
    await theirs.io("write -P 2 0 1M")
    await hold_invariants(vm, hashes)
    await vm.delete_snapshots("s1")
    assert len((await vm.chains())[0].layers) == 1
    await hold_invariants(vm)


# --- which device it is ---------------------------------------------------------------------------------------------


async def test_another_device_under_the_name_is_not_used(q: qmpsnap.Controller, named: Path, place: Path) -> None:
    vm, _, _ = await grown(q, of(named))
    named.unlink()
    with pytest.raises(StoreMismatch, match="volume"):
        await vm.start()
    with loop(place / "other.img") as other:
        named.symlink_to(other)
        for verb in (vm.start(), vm.snapshot("s3"), vm.delete_snapshots("s1")):
            with pytest.raises(StoreMismatch, match="volume is not the recorded file"):
                await verb
        assert {found.code for found in (await vm.check()).findings} == {"layer-replaced"}
        assert content(other) == bytes(16 * MIB)


async def test_a_device_with_another_number_is_the_same(q: qmpsnap.Controller, place: Path, named: Path) -> None:
    """As after a boot: a loop device is told by the file that it is on."""
    vm, hashes, _ = await grown(q, of(named))
    with loop(place / "disk.img") as again:
        assert again != named.resolve()
        named.unlink()
        named.symlink_to(again)
        await vm.start(paused=True)
        await hold_invariants(vm, hashes)
        await vm.stop(force=True)


async def test_a_device_has_one_writer_under_whatever_name(q: qmpsnap.Controller, named: Path, device: Path) -> None:
    await q.define(of(named))
    spec = MachineSpec(name="other", memory=64 * MIB, disks=(DiskSpec(name="vda", device=str(device)),))
    with pytest.raises(StateError, match="which machine web writes to"):
        await q.define(spec)
    twice = (DiskSpec(name="vda", device=str(device)), DiskSpec(name="vdb", device=str(device)))
    await (await q.machine("web")).undefine(disks="keep")
    with pytest.raises(StateError, match=r"which its disk vd[ab] reads"):
        await q.define(MachineSpec(name="other", memory=64 * MIB, disks=twice))


# --- who else uses it -----------------------------------------------------------------------------------------------


async def test_a_mounted_device_is_refused(q: qmpsnap.Controller, named: Path, device: Path, place: Path) -> None:
    vm, _, _ = await grown(q, of(named))
    await vm.delete_snapshots("s1", "s2")
    run("mkfs.ext4", "-q", str(device))
    mounted = place / "mounted"
    mounted.mkdir()
    run("mount", str(device), str(mounted))
    try:
        for verb in (vm.start(), vm.snapshot("s3")):
            with pytest.raises(ImageInUse, match=f"volume.*the file system that is mounted at {mounted}"):
                await verb
        findings = (await vm.check()).findings
        assert [found.code for found in findings] == ["image-in-use"]
        await vm.undefine(disks="keep")
        with pytest.raises(ImageInUse, match=f"volume.*the file system that is mounted at {mounted}"):
            await q.define(of(named))
        assert not await q.machines()
    finally:
        run("umount", str(mounted))


async def test_a_device_under_another_is_refused(q: qmpsnap.Controller, named: Path, device: Path) -> None:
    upper = run("losetup", "--find", "--show", str(device))
    try:
        with pytest.raises(ImageInUse, match=f"volume.*device {upper}"):
            await q.define(of(named))
    finally:
        run("losetup", "--detach", upper)


async def test_a_device_that_a_process_writes_to_is_refused(q: qmpsnap.Controller, named: Path, device: Path) -> None:
    descriptor = os.open(device, os.O_RDWR)
    with subprocess.Popen(["sleep", "60"], stdout=descriptor) as other:  # noqa: ASYNC220 - it is there at once
        os.close(descriptor)
        with pytest.raises(ImageInUse, match=rf"volume.*sleep \(process {other.pid}\)"):
            await q.define(of(named))
        other.kill()


# --- what is no device ----------------------------------------------------------------------------------------------


async def test_what_is_no_device_is_refused(q: qmpsnap.Controller, place: Path) -> None:
    (place / "file").write_bytes(bytes(MIB))
    for name, said in (("file", "is not a block device"), ("none", "there is no block device")):
        with pytest.raises(ImageRefused, match=said):
            await q.define(of(place / name))
    with pytest.raises(ImageRefused, match="is not a block device"):
        await q.define(of(Path("/dev/null")))
    assert not await q.machines()


# --- sizes ----------------------------------------------------------------------------------------------------------


async def test_a_device_that_grows_is_told_and_recorded(
    q: qmpsnap.Controller, named: Path, device: Path, place: Path
) -> None:
    vm = await q.define(of(named))
    os.truncate(place / "disk.img", 32 * MIB)
    run("losetup", "--set-capacity", str(device))
    found = (await vm.check()).findings
    assert [(one.code, one.repairable) for one in found] == [("size-differs", True)]
    with pytest.raises(StoreMismatch, match="volume has a virtual size of 33554432 bytes, the store has 16777216"):
        await vm.snapshot("s1")
    assert (await vm.check(repair=True)).repaired
    await vm.snapshot("s1")
    await vm.start(paused=True)
    await fill(vm, "vda", 7, offset=31 * MIB)
    await hold_invariants(vm)


async def test_qemu_grows_no_device(q: qmpsnap.Controller, named: Path) -> None:
    vm = await q.define(of(named))
    with pytest.raises(HostCannot, match="volume has 16777216 bytes and needs 33554432, but QEMU cannot grow a device"):
        await vm.resize("vda", "32M")
    await vm.snapshot("s1")
    await vm.resize("vda", "32M")  # its overlay
    await hold_invariants(vm)


async def test_a_list_of_snapshots_finds_a_device_by_its_link(q: qmpsnap.Controller, named: Path) -> None:
    vm, _, _ = await grown(q, of(named))
    reads = context_of(vm).store.images.read_by("web")
    assert survey.look(survey.wanted(reads, None)).word == "ok"
    named.unlink()
    assert survey.look(survey.wanted(reads, None)).word == "missing"
    named.symlink_to(named.parent / "disk.img")
    assert survey.look(survey.wanted(reads, None)).word == "replaced"
