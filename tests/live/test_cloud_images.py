"""Disks larger than their base, as cloud images need them; CD images; kernels that are not there."""

from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import ImageRefused, QmpsnapError
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from qmpsnap.model.machines.spec import CloudInit, DiskSpec, MachineSpec
from tests.live.machine import MIB, fill, hold_invariants, user_monitor
from tests.live.test_import import image
from tests.machine import iso9660
from tests.volumes.guest import DEADLINE


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


@pytest.mark.version
@pytest.mark.parametrize("machine", ["q35", "microvm"])
async def test_cloud_init_is_told_anew_at_each_start(machine: str, q: qmpsnap.Controller, place: Path) -> None:
    (place / "user.yaml").write_text("#cloud-config\n{}\n")
    spec = MachineSpec(
        name="cloud",
        machine=machine,
        memory=64 * MIB,
        disks=(DiskSpec(name="vda", size=MIB),),
        cloud_init=CloudInit(user_data=str(place / "user.yaml")),
    )
    vm = await q.define(spec)
    await vm.start(paused=True)
    own = f'instance-id: {(await vm.record()).uuid}\nlocal-hostname: "cloud"\n'
    assert await told(vm) == {"user-data": "#cloud-config\n{}\n", "meta-data": own}
    assert [point.disk for point in (await vm.snapshot("s1")).points] == ["vda"]
    assert (await vm.save(name="with-memory")).outside == ()
    (place / "user.yaml").write_text("#!/bin/sh\n")
    (place / "net.yaml").write_text("version: 2\n")
    changed = await vm.set({"cloud-init.network": str(place / "net.yaml")})
    assert (changed.changes, changed.unloadable) == ((("cloud-init.network", None, str(place / "net.yaml")),), ())
    assert (await vm.restore(paused=True)).snapshot.name == "with-memory"
    assert await told(vm) == {"user-data": "#!/bin/sh\n", "meta-data": own, "network-config": "version: 2\n"}
    await hold_invariants(vm)
    await vm.stop(force=True)
    assert [name for name, _ in (await vm.set({"cloud-init": ""})).unloadable] == ["with-memory"]
    await vm.start(paused=True)
    assert await told(vm) is None
    await vm.stop(force=True)


@pytest.mark.grid
@pytest.mark.timeout(DEADLINE + 900)  # the image may have to be built first
async def test_debian_mounts_what_cloud_init_is_told(debian: Path, q: qmpsnap.Controller, place: Path) -> None:
    (place / "user.yaml").write_text("#cloud-config\nhostname: told-by-its-spec\n")
    found = "mount -o ro LABEL=cidata /mnt && ls -1 /mnt && cat /mnt/user-data && echo that is all"
    spec = MachineSpec(
        name="cloud",
        kernel=str(debian / "vmlinuz"),
        initrd=str(debian / "initrd"),
        append=f'root=/dev/vda ro console=ttyS0 quiet panic=-1 init=/bin/sh -- -c "{found}; sleep 1000"',
        memory=256 * MIB,
        disks=(DiskSpec(name="vda", base=str(debian / "root.raw"), format="raw"),),
        cloud_init=CloudInit(user_data=str(place / "user.yaml")),
    )
    vm = await q.define(spec, folders=[debian])
    await vm.start()
    console = q.context.home.log_dir("cloud") / CONSOLE_LOG
    with anyio.fail_after(DEADLINE):
        while b"that is all" not in console.read_bytes():
            await anyio.sleep(0.2)
    said = console.read_text().replace("\r", "")
    await vm.stop(force=True)
    assert "meta-data\nuser-data\n#cloud-config\nhostname: told-by-its-spec\nthat is all\n" in said


async def told(vm: qmpsnap.MachineHandle) -> dict[str, str] | None:
    """The files on the disk that cloud-init looks at, as its QEMU has them; None without one."""
    async with user_monitor(vm) as qemu:
        backends: Any = await qemu.execute("query-block")
    for drive in backends:
        if "qs-seed" in str(drive):
            process = (await vm.record()).process
            assert drive["inserted"]["ro"]
            assert process
            path = drive["inserted"]["file"].replace("self", str(process.pid))
            return {name: content.decode() for name, content in iso9660.files(Path(path).read_bytes()).items()}
    return None


MISSING: dict[str, dict[str, Any]] = {
    "there is no kernel /nonexistent/vmlinuz": {"kernel": "/nonexistent/vmlinuz"},
    "there is no initrd /nonexistent/initrd": {"kernel": "/proc/version", "initrd": "/nonexistent/initrd"},
    "the kernel /proc is not a file": {"kernel": "/proc"},
    "the small guest is not built: there is no kernel": {"kernel": "@guest/vmlinux"},
    "there is no image /nonexistent/a.iso": {"cdrom": "/nonexistent/a.iso"},
    "there is no user-data /nonexistent/u": {"cloud_init": CloudInit(user_data="/nonexistent/u")},
    "the meta-data /proc is not a file": {"cloud_init": CloudInit(user_data="/proc/version", meta_data="/proc")},
    "the user-data /bin/bash is larger than 1 MiB": {"cloud_init": CloudInit(user_data="/bin/bash")},
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
