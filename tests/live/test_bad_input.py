"""What cannot be done is refused with the right code, says who and since when, and leaves everything as it was."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.errors import HostCannot, LockHeld, QmpsnapError, StateError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.snapshot.plan import CreateRequest
from tests.live.machine import MIB, context_of, fill, hold_invariants, user_monitor


async def test_a_disk_busy_with_a_job_is_refused_by_the_jobs_name(
    q: qmpsnap.Controller, still_spec: MachineSpec, tmp_path: Path
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    async with user_monitor(vm) as qemu:
        target = tmp_path / "copy"
        target.write_bytes(bytes(16 * MIB))
        await qemu.execute(
            "blockdev-add", {"node-name": "copy", "driver": "raw", "file": {"driver": "file", "filename": str(target)}}
        )
        await qemu.execute(
            "blockdev-mirror", {"job-id": "users-own", "device": "vda-1", "target": "copy", "sync": "full"}
        )
        with pytest.raises(StateError, match="busy with job users-own") as failure:
            await vm.snapshot("s")
        assert failure.value.exit_code == 4
        await qemu.execute("block-job-cancel", {"device": "users-own", "force": True})
        while await qemu.execute("query-jobs"):
            pass
        await qemu.execute("blockdev-del", {"node-name": "copy"})
    await vm.snapshot("s")
    await hold_invariants(vm)


async def test_an_overlay_that_somebody_else_put_there_is_never_built_upon(
    q: qmpsnap.Controller, still_spec: MachineSpec, home: Path
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    foreign = home / "foreign.qcow2"
    async with user_monitor(vm) as qemu:
        await qemu.execute(
            "blockdev-snapshot-sync",
            {"node-name": "vda-1", "snapshot-file": str(foreign), "snapshot-node-name": "theirs"},
        )
    with pytest.raises(StoreMismatch, match=r"foreign\.qcow2") as failure:
        await vm.snapshot("s")
    assert failure.value.exit_code == 7
    assert await vm.snapshots() == ()
    assert not list(context_of(vm).home.machine_dir(vm.name).glob("vda-*3*"))


async def test_a_second_controller_is_told_who_holds_the_lock(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    lock = context_of(vm).home.lock(vm.name)
    holder = (
        "import sys; from pathlib import Path; from qmpsnap.store.lock import machine_lock\n"
        f"with machine_lock(Path({str(lock)!r}), machine='still', verb='a long one'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:  # noqa: ASYNC220
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LockHeld, match=rf"'a long one' \(pid {other.pid} on .*\) since 20") as failure:
            await vm.snapshot("s")
        assert failure.value.exit_code == 4
        other.stdin.close()
        other.wait(10)
    await vm.snapshot("s")
    await hold_invariants(vm)


async def test_read_only_disks_stay_out(q: qmpsnap.Controller, home: Path) -> None:
    image = home / "data.raw"
    image.write_bytes(b"fixed" + bytes(MIB - 5))
    spec = MachineSpec(
        name="ro",
        memory=64 * MIB,
        disks=(
            DiskSpec(name="vda", size=MIB),
            DiskSpec(name="cd", image=str(image), format="raw", read_only=True),
        ),
    )
    vm = await q.define(spec)
    await vm.start(paused=True)
    with pytest.raises(StateError, match="read-only"):
        await vm.snapshot("s", disks=["cd"])
    snapshot = await vm.snapshot("s")
    assert [point.disk for point in snapshot.points] == ["vda"]
    assert image.read_bytes().startswith(b"fixed")


async def test_nothing_to_snapshot_is_said(q: qmpsnap.Controller) -> None:
    vm = await q.define(MachineSpec(name="diskless", memory=64 * MIB))
    with pytest.raises(StateError, match="no disk"):
        await vm.snapshot("s")


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """The machines' folder on a file system of 2 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    folder = home / "machines"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _writes(descriptor: int) -> bool:
    try:
        return os.write(descriptor, bytes(4096)) == 4096
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_full_disk_changes_nothing(
    small_disk: Path, q: qmpsnap.Controller, still_spec: MachineSpec, state: str
) -> None:
    spec = MachineSpec(name="tight", memory=64 * MIB, disks=still_spec.disks[:1])
    vm = await q.define(spec)
    if state == "running":
        await vm.start(paused=True)
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT, 0o600)
    while _writes(filler):
        pass
    os.close(filler)
    before = sorted((path.name, path.stat().st_size) for path in small_disk.rglob("*"))
    with pytest.raises(HostCannot, match="space") as failure:
        await vm.snapshot("s")
    assert failure.value.exit_code == 9
    assert failure.value.effect == "none"
    assert sorted((path.name, path.stat().st_size) for path in small_disk.rglob("*")) == before
    (small_disk / "filler").unlink()
    await hold_invariants(vm)
    await vm.snapshot("s")
    await hold_invariants(vm)


async def test_a_swapped_image_is_not_started(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    layer = (await vm.chains())[0].layers[0].layer
    copy = Path(layer.path).read_bytes()
    Path(layer.path).unlink()
    Path(layer.path).write_bytes(copy)
    # An inode may be used again at once: make sure that this one is another.
    if Path(layer.path).stat().st_ino == layer.inode:
        Path(layer.path).rename(f"{layer.path}.x")
        Path(layer.path).write_bytes(copy)
    with pytest.raises(StoreMismatch, match="not the recorded file"):
        await vm.start()
    assert not await vm.is_running()


async def test_an_image_that_a_guest_writes_is_nobody_elses_base(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm = await q.define(still_spec)
    path = (await vm.chains())[0].layers[-1].layer.path
    for key in ("base", "image"):
        with pytest.raises(StateError, match="still"):
            await q.define(MachineSpec(name="thief", disks=(DiskSpec(name="vda", **{key: path}),)))  # type: ignore[arg-type]
    assert [found.name for found in await q.machines()] == ["still"]


async def test_undefine_says_what_would_be_lost(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.snapshot("precious")
    with pytest.raises(StateError, match="precious"):
        await vm.undefine()
    await vm.start(paused=True)
    with pytest.raises(StateError, match="is running"):
        await vm.undefine(disks="keep")
    await vm.stop(force=True)
    kept = await vm.undefine(disks="keep")
    assert len(kept) == 4
    assert all(Path(path).exists() for path in kept)
    with pytest.raises(QmpsnapError):
        await vm.record()


async def test_names_that_are_taken_or_wrong(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.snapshot("s")
    codes = {}
    for name in ("s", "S", "", "-x", "a/b", "x" * 64, "a\n"):
        with pytest.raises(QmpsnapError) as failure:
            await vm.snapshot(name)
        codes[name] = failure.value.exit_code
    assert codes.pop("s") == 4
    assert set(codes.values()) == {2}
    assert CreateRequest().name is None
    assert (await vm.snapshot()).name == "snap-1"
    await hold_invariants(vm)
