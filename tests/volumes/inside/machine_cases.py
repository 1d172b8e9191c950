"""In the guest: machines whose disks are logical volumes, in a QEMU that stands still."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import (
    ImageInUse,
    ImageRefused,
    NotFoundError,
    OperationPending,
    QmpsnapError,
    StateError,
    StoreMismatch,
)
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.rebuild import rebuild
from qmpsnap.qmp.jobs import JobStuck

from .conftest import GROUP, POOL, tool
from .machine import MIB, active, case, data, fill, home, machine, made, names, of, path_of, reading, whole

__all__ = ["home"]


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
        found = (await vm.check()).findings
        assert "volume-invalid" in {one.code for one in found}
        assert {one.file for one in found} == {await path_of(vm, "small")}, found
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
        tool("dd", "if=/dev/zero", f"of={made('bulk', thin=True, size=200)}", "bs=1M", "count=200", "oflag=direct")
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
    tool("lvremove", "-y", f"{GROUP}/{POOL}")  # whoever comes next makes one of the usual size


async def _pool_fills() -> None:
    """While the storage works the pool runs full, so that what was written meanwhile has no room in the volume."""
    tool("lvchange", "--errorwhenfull", "y", f"{GROUP}/{POOL}")
    path, bulk = made("web", thin=True), made("bulk", thin=True, size=300)
    folder = Path(tempfile.mkdtemp())
    slow = folder / "lvcreate"
    slow.write_text('#!/bin/sh\n/sbin/lvcreate "$@" || exit\n: >"$0.done"\nuntil [ -e "$0.go" ]; do sleep 0.1; done\n')
    slow.chmod(0o755)
    failed: list[QmpsnapError] = []
    async with machine(path) as (_, vm):

        async def snapshot() -> None:
            with pytest.raises(QmpsnapError, match="snapshot two is taken, but an overlay") as left:
                await vm.snapshot("two", kind="volume")
            failed.append(left.value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(folder), prepend=os.pathsep)
            async with anyio.create_task_group() as group:
                group.start_soon(snapshot)
                with anyio.fail_after(400):
                    while not Path(f"{slow}.done").exists():
                        await anyio.sleep(0.2)
                await fill(vm, 3)
                subprocess.run(["dd", "if=/dev/zero", f"of={bulk}", "bs=1M", "oflag=direct"], check=False)  # noqa: ASYNC221
                Path(f"{slow}.go").touch()
        assert failed[0].exit_code == 8
        assert [one.name for one in await vm.snapshots()] == ["one", "two"]
        assert data(await path_of(vm, "two")) == [1, 2, 0, 0]
        tool("lvextend", "-L", "+64M", f"{GROUP}/{POOL}")
        with pytest.raises(JobStuck, match="a write failed"):  # the flush that failed is never tried again
            await vm.wait()
        with pytest.raises(OperationPending):
            await vm.cancel()
        await vm.stop(force=True)
        await vm.recover()
        assert await active(vm) == path
        assert data(path) == [1, 2, 3, 0]
        await whole(vm)
        await vm.undefine(disks="remove")
    tool("lvremove", "-y", f"{GROUP}/{POOL}")  # whoever comes next makes one of the usual size


_VERB = """
import anyio, qmpsnap
async def main():
    async with qmpsnap.open() as q:
        await (await q.machine("web")).{verb}
anyio.run(main)
"""


async def dies(verb: str, program: str) -> None:
    """A controller that does the verb dies right after one of LVM's programs has worked for it."""
    folder = Path(tempfile.mkdtemp())
    slow = folder / program
    slow.write_text(
        f'#!/bin/sh\n/sbin/{program} "$@" || exit\necho $$ >"$0.pid"\nmv "$0.pid" "$0.done"\nexec sleep 600\n'
    )
    slow.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    with subprocess.Popen([sys.executable, "-c", _VERB.format(verb=verb)], env=environment) as process:  # noqa: ASYNC220
        with anyio.fail_after(400):
            while not Path(f"{slow}.done").exists():
                assert process.poll() is None
                await anyio.sleep(0.2)
        process.kill()
    os.kill(int(Path(f"{slow}.done").read_text()), signal.SIGKILL)


async def _killed() -> None:
    path = made("web", thin=True)
    async with machine(path) as (_, vm):
        await dies('snapshot("two", kind="volume")', "lvcreate")
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


async def _merged() -> None:
    path = made("web", thin=False)
    async with machine(path, size="50%") as (_, vm):
        kept = await path_of(vm, "one")
        plan = await vm.plan_revert("one", discard=True)
        assert MIB <= plan.bytes < 2 * MIB
        assert [(file.action, file.path) for file in plan.files] == [("overwrite", path)]
        with reading(kept):  # a merge would wait until it is closed
            assert (await vm.plan_revert("one", discard=True)).bytes == 32 * MIB
        await vm.revert("one", discard=True, state="paused")
        assert (await active(vm), data(path), data(kept)) == (path, [1, 0, 0, 0], [1, 0, 0, 0])
        await whole(vm)
        for program in ("lvconvert", "lvcreate"):
            await fill(vm, 3)
            assert (data(path), data(kept)) == ([1, 0, 3, 0], [1, 0, 0, 0])
            await dies('revert("one", discard=True, state="paused")', program)
            await vm.recover()
            assert (data(path), data(kept)) == ([1, 0, 0, 0], [1, 0, 0, 0])
            assert [one.name for one in await vm.snapshots()] == ["one"]
            await whole(vm)
            await vm.start(paused=True)
        await vm.stop(force=True)
        await vm.undefine(disks="remove")
    assert names() == {"web"}


test_thin_volumes = case(_thin)
test_thick_volumes = case(_thick)
test_what_is_refused_changes_nothing = case(_refused)
test_a_pool_without_room_is_refused_before_anything = case(_pool_full)
test_a_pool_that_runs_full_loses_nothing = case(_pool_fills)
test_a_lost_store_is_made_again = case(_rebuilt)
test_a_controller_that_is_killed_leaves_nothing_behind = case(_killed)
test_a_thick_snapshot_is_merged_where_the_present_state_is_discarded = case(_merged)
