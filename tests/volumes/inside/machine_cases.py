"""In the guest: machines whose disks are logical volumes, in a QEMU that stands still."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from qemu.qmp import QMPClient

import qmpsnap
from qmpsnap.errors import ImageInUse, ImageRefused, NotFoundError, QmpsnapError, StateError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.rebuild import rebuild

from .conftest import GROUP, POOL, tool

MIB = 1 << 20


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    monkeypatch.setenv("QMPSNAP_HOME", str(folder))
    yield folder
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    tool("udevadm", "settle")
    shutil.rmtree(folder)


def made(lv: str, *, thin: bool, size: int = 32) -> str:
    """A volume of zeros."""
    if thin:
        tool("lvcreate", "-y", "-V", f"{size}M", "--thinpool", f"{GROUP}/{POOL}", "-n", lv)
    else:
        tool("lvcreate", "-y", "-L", f"{size}M", "-n", lv, GROUP)
    path = f"/dev/{GROUP}/{lv}"
    with Path(path).open("r+b") as device:
        device.write(b"\0" * size * MIB)
    return path


def of(path: str, name: str = "web") -> MachineSpec:
    return MachineSpec(name=name, memory=32 * MIB, disks=(DiskSpec(name="vda", device=path),), agent=False)


async def fill(vm: qmpsnap.MachineHandle, number: int) -> None:
    """A MiB of that byte, in the MiB of that number."""
    client = QMPClient(vm.name)
    await client.connect(str(vm._context.home.run_dir(vm.name) / "user.sock"))
    try:
        backends: Any = await client.execute("query-block")
        (qdev,) = (found["qdev"] for found in backends if "vda" in str(found.get("qdev", "")).split("/"))
        line = f'qemu-io -d {qdev} "write -P {number} {number * MIB} {MIB}"'
        said = await client.execute("human-monitor-command", {"command-line": line})
        assert not said, said
    finally:
        await client.disconnect()


def data(path: str) -> list[int]:
    """The first byte of each MiB from the second to the fifth, by the device itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return [os.pread(descriptor, 1, number * MIB)[0] for number in range(1, 5)]
    finally:
        os.close(descriptor)


def names() -> set[str]:
    return set(tool("lvs", "--noheadings", "-o", "lv_name", GROUP).split()) - {POOL}


async def path_of(vm: qmpsnap.MachineHandle, name: str) -> str:
    """Where the snapshot of the disk lies."""
    snapshot = next(one for one in await vm.snapshots() if one.name == name)
    return vm._context.store.layer(snapshot.points[0].layer).path


async def active(vm: qmpsnap.MachineHandle) -> str:
    (chain,) = await vm.chains()
    assert len(chain.layers) == 1
    return chain.active.path


async def whole(vm: qmpsnap.MachineHandle) -> None:
    found = (await vm.check()).findings
    assert found == (), found


@asynccontextmanager
async def machine(path: str, *, size: str | None = None) -> AsyncIterator[tuple[Any, qmpsnap.MachineHandle]]:
    """One with a volume snapshot ``one`` before the second write."""
    async with qmpsnap.open() as q:
        vm = await q.define(of(path))
        await vm.start(paused=True)
        await fill(vm, 1)
        await vm.snapshot("one", kind="volume", lvm_size=size)
        await fill(vm, 2)
        yield q, vm


@contextmanager
def reading(path: str) -> Iterator[int]:
    """Another process that has a volume open; its number."""
    descriptor = os.open(path, os.O_RDONLY)
    with subprocess.Popen(["sleep", "600"], stdin=descriptor) as process:
        os.close(descriptor)
        yield process.pid
        process.kill()


def case(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def called() -> None:
        anyio.run(function)

    called.__name__ = function.__name__
    return called


async def _thin() -> None:
    path = made("web", thin=True)
    async with machine(path) as (q, vm):
        kept = await path_of(vm, "one")
        assert (data(path), data(kept)) == ([1, 2, 0, 0], [1, 0, 0, 0])
        assert await active(vm) == path
        await whole(vm)
        done = await vm.revert("one", state="paused")
        assert done.kept
        clone = await active(vm)
        assert clone.startswith(f"/dev/{GROUP}/qc-")
        await fill(vm, 3)
        await vm.snapshot("two", kind="volume")
        await vm.stop(force=True)
        assert (data(clone), data(path), data(await path_of(vm, "two"))) == ([1, 0, 3, 0], [1, 2, 0, 0], [1, 0, 3, 0])
        await whole(vm)

        # As after a boot: a verb gives the snapshots their devices.
        tool("vgchange", "-an", GROUP)
        tool("vgchange", "-ay", GROUP)
        assert not Path(kept).exists()
        await whole(vm)
        linked = MachineSpec(name="linked", memory=32 * MIB, disks=(DiskSpec(name="vda", base="web@one"),), agent=False)
        other = await q.define(linked)
        await other.start(paused=True)
        await fill(other, 4)
        await other.stop(force=True)
        await whole(other)
        await other.undefine(disks="remove")

        await vm.start(paused=True)
        with pytest.raises(QmpsnapError, match="extents of 4194304 bytes") as refused:
            await vm.resize("vda", "33M")
        assert refused.value.code == "usage"
        await vm.resize("vda", "36M")
        await vm.stop(force=True)
        await vm.resize("vda", "40M")
        assert tool("lvs", "--noheadings", "--units", "m", "-o", "lv_size", clone.removeprefix("/dev/")) == "40.00m"
        await whole(vm)

        assert (await vm.plan_delete_snapshots("one", "two")).bytes == 0
        await vm.delete_snapshots("one", "two")
        assert names() == {"web", clone.rpartition("/")[2]}
        back = await vm.revert(done.kept.name)
        assert back.kept
        await whole(vm)
        await vm.undefine(disks="remove")
    assert names() == {"web"}
    assert data(path) == [1, 2, 0, 0]


async def _thick() -> None:
    path = made("web", thin=False)
    async with machine(path, size="50%") as (_, vm):
        kept = await path_of(vm, "one")
        assert (data(path), data(kept)) == ([1, 2, 0, 0], [1, 0, 0, 0])
        await whole(vm)
        with reading(kept) as pid:
            with pytest.raises(ImageInUse, match=rf"{kept}, .* is read by .*\(process {pid}\)") as busy:
                await vm.delete_snapshots("one")
            assert busy.value.effect == "none"
        await whole(vm)
        plan = await vm.plan_revert("one")
        assert plan.bytes == 32 * MIB
        await vm.revert("one", state="paused")
        clone = await active(vm)
        await fill(vm, 3)
        assert (data(clone), data(path)) == ([1, 0, 3, 0], [1, 2, 0, 0])
        planned = (await vm.plan_snapshot("small", kind="volume", lvm_size="4M")).details
        assert planned.volumes[0].reserve == 4 * MIB
        await vm.snapshot("small", kind="volume", lvm_size="4M")
        await fill(vm, 4)
        with pytest.raises(StateError, match=r"it has snapshots: .*qs-"):
            await vm.revert("one", discard=True)
        for number in (5, 6, 7, 8, 9):
            await fill(vm, number)
        os.sync()  # only what has reached the volume takes its snapshot's room
        (found,) = (await vm.check()).findings
        assert (found.code, found.file) == ("volume-invalid", await path_of(vm, "small"))
        with pytest.raises(QmpsnapError, match=r"run full|cannot be read") as refused:
            await vm.revert("small")
        assert refused.value.effect == "none"
        await vm.delete_snapshots("small")
        await whole(vm)
        await vm.stop(force=True)
        await vm.undefine(disks="remove")
    assert names() == {"web"}


async def _refused() -> None:
    path = made("web", thin=True)
    before = names()
    async with qmpsnap.open() as q:
        tool("mkfs.ext4", "-q", path)
        Path("/mnt/x").mkdir(parents=True, exist_ok=True)
        tool("mount", path, "/mnt/x")
        with pytest.raises(ImageInUse, match="/mnt/x"):
            await q.define(of(path))
        tool("umount", "/mnt/x")
        for wrong in (f"/dev/{GROUP}/none", "/dev/none/web", f"/dev/{GROUP}/--help", "/dev/-h/web"):
            with pytest.raises((ImageRefused, NotFoundError)):
                await q.define(of(wrong))
        assert names() == before
        vm = await q.define(of(path))
        for size in ("0", "-5M", "200G5", "--yes"):
            with pytest.raises(QmpsnapError) as refused:
                await vm.snapshot("bad", kind="volume", lvm_size=size)
            assert (refused.value.code, refused.value.effect) == ("usage", "none")
        await vm.snapshot("one", kind="volume")
        kept = await path_of(vm, "one")
        tool("lvremove", "-y", kept.removeprefix("/dev/"))
        assert [one.code for one in (await vm.check()).findings] == ["layer-missing"]
        with pytest.raises((StoreMismatch, NotFoundError)) as refused:
            await vm.revert("one")
        assert refused.value.effect == "none"
        tool("lvcreate", "-y", "-V", "32M", "--thinpool", f"{GROUP}/{POOL}", "-n", kept.rpartition("/")[2])
        assert [one.code for one in (await vm.check()).findings] == ["layer-replaced"]
        with pytest.raises(StoreMismatch, match="not the recorded"):
            await vm.revert("one")
        tool("lvremove", "-y", kept.removeprefix("/dev/"))
        await vm.delete_snapshots("one")
        await whole(vm)
        await vm.undefine()
    assert names() == before


async def _rebuilt() -> None:
    path = made("web", thin=True)
    async with machine(path) as (_, vm):
        await vm.revert("one", state="paused")
        await fill(vm, 3)
        await vm.snapshot("two", kind="volume")
        await vm.stop(force=True)
        before, home = (await vm.snapshots(), await vm.chains()), vm._context.home
    for file in home.data.glob("qmpsnap.db*"):
        file.unlink()
    tool("vgchange", "-an", GROUP)
    tool("vgchange", "-ay", GROUP)
    done = await rebuild.run(home, set_aside=False)
    assert ([(made.name, made.notes) for made in done.machines], done.left_out) == ([("web", ())], ())
    async with qmpsnap.open() as q:
        vm = await q.machine("web")
        assert (await vm.snapshots(), await vm.chains()) == before
        await whole(vm)
        await vm.revert("one")
        assert data(await active(vm)) == [1, 0, 0, 0]
        await vm.undefine(disks="remove")
    assert names() == {"web"}


async def _pool_full() -> None:
    path = made("web", thin=True)
    async with machine(path) as (_, vm):
        made("bulk", thin=True, size=168)
        before = names()
        for verb in (vm.snapshot("two", kind="volume"), vm.revert("one")):
            with pytest.raises(QmpsnapError, match="less than 64 MiB are free") as refused:
                await verb
            assert refused.value.effect == "none"
        assert names() == before
        assert await active(vm) == path
        assert await vm.is_running()
        await whole(vm)
        await fill(vm, 3)
        tool("lvextend", "-L", "+128M", f"{GROUP}/{POOL}")
        await vm.snapshot("two", kind="volume")
        assert data(await path_of(vm, "two")) == [1, 2, 3, 0]
        await vm.stop(force=True)
        await vm.undefine(disks="remove")


_KILLED = """
import anyio, qmpsnap
async def main():
    async with qmpsnap.open() as q:
        await (await q.machine("web")).snapshot("two", kind="volume")
anyio.run(main)
"""


async def _killed() -> None:
    path = made("web", thin=True)
    folder = Path(tempfile.mkdtemp())
    slow = folder / "lvcreate"
    slow.write_text(
        '#!/bin/sh\n/sbin/lvcreate "$@" || exit\necho $$ >"$0.pid"\nmv "$0.pid" "$0.done"\nexec sleep 600\n'
    )
    slow.chmod(0o755)
    async with machine(path) as (_, vm):
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        with subprocess.Popen([sys.executable, "-c", _KILLED], env=environment) as process:  # noqa: ASYNC220
            with anyio.fail_after(200):
                while not Path(f"{slow}.done").exists():
                    await anyio.sleep(0.2)
            process.kill()
        os.kill(int(Path(f"{slow}.done").read_text()), signal.SIGKILL)
        await fill(vm, 3)
        await vm.recover()
        assert [one.name for one in await vm.snapshots()] in (["one"], ["one", "two"])
        await whole(vm)
        assert await active(vm) == path
        assert data(path) == [1, 2, 3, 0]
        await vm.snapshot("three", kind="volume")
        await whole(vm)
        await vm.stop(force=True)
        await vm.undefine(disks="remove")
    assert names() == {"web"}


test_thin_volumes = case(_thin)
test_thick_volumes = case(_thick)
test_what_is_refused_changes_nothing = case(_refused)
test_a_pool_without_room_is_refused_before_anything = case(_pool_full)
test_a_lost_store_is_made_again = case(_rebuilt)
test_a_controller_that_is_killed_leaves_nothing_behind = case(_killed)
