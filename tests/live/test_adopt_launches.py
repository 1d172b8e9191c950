"""QEMUs launched in common ways: what their owner has set stays set, and what cannot be adopted says why."""

# ruff: noqa: F811 - "launched" and its "folder" are fixtures

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.adoption import adopt
from tests.live.machine import MIB, hold_invariants, user_monitor
from tests.live.test_adopt import Foreign, folder, launched, run  # noqa: F401

SET = {
    "drive": ["-drive", "file={folder}/top.qcow2,format=qcow2,if=virtio,discard=unmap,detect-zeroes=unmap"],
    "drive, direct": [
        "-drive",
        "file={folder}/top.qcow2,format=qcow2,if=virtio,cache=none,aio=native,detect-zeroes=on,file.locking=off",
    ],
    "drive, both cache flags": ["-drive", "file={folder}/top.qcow2,if=virtio,cache.direct=on,cache.no-flush=on"],
    "blockdev": [
        *("-blockdev", "driver=file,node-name=f,filename={folder}/top.qcow2,aio=io_uring,cache.direct=on"),
        *("-blockdev", "driver=qcow2,node-name=n,file=f,detect-zeroes=on,discard=ignore,cache.no-flush=on"),
        *("-device", "virtio-blk,drive=n,id=vda"),
    ],
}


@pytest.fixture
def daemon(home: Path) -> Iterator[Any]:
    """Launches QEMUs that become daemons, as scripts do; they end with the test."""
    pid_file = home / "daemon.pid"

    def launch(folder: Path, *arguments: str) -> Path:
        socket = folder / "given.sock"
        subprocess.run(
            [
                *(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64", "-M", "q35,accel=tcg", "-m", "64"),
                *("-nodefaults", "-display", "none", "-S", "-daemonize", "-pidfile", str(pid_file), *arguments),
                *("-chardev", f"socket,id=c,path={socket},server=on,wait=off"),
                *("-mon", f"chardev=c,mode=control,pretty={'on' if 'pretty' in folder.name else 'off'}"),
            ],
            cwd=folder,
            check=True,
            timeout=20,
        )
        return socket

    yield launch
    if pid_file.exists():
        psutil.Process(int(pid_file.read_text())).kill()


async def active_nodes(theirs: Foreign) -> tuple[Any, Any]:
    """The node that the guest writes to, and the one below it."""
    nodes = {node["node-name"]: node for node in await theirs.nodes()}
    async with theirs.monitor() as qemu:
        backends: Any = await qemu.execute("query-block")
    active = nodes[backends[0]["inserted"]["node-name"]]
    names = {(parent, edge): child for parent, edge, child in await theirs.graph()}
    return active, nodes[names[active["node-name"], "file"]]


async def settings(theirs: Foreign) -> tuple[Any, ...]:
    active, file = await active_nodes(theirs)
    kept: tuple[Any, ...] = (active["detect_zeroes"], active["ro"])
    return (*kept, *((node["cache"]["direct"], node["cache"]["no-flush"]) for node in (active, file)))


def locks(path: Path) -> int:
    inode = path.stat().st_ino
    return sum(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())


@pytest.mark.parametrize("form", SET)
async def test_what_the_owner_has_set_is_so_for_every_later_layer(
    q: qmpsnap.Controller,
    home: Path,
    launched: Any,
    form: str,
) -> None:
    theirs = launched(SET[form])
    before = await settings(theirs)
    locked = locks(theirs.folder / "top.qcow2")
    done = await adopt.run(q.context, "theirs", Path(theirs.socket))
    assert done.disks[0].untold == ""
    vm = await q.machine("theirs")
    disk = done.disks[0].name
    for step in ("s1", "s2"):
        await vm.snapshot(step)
        assert await settings(theirs) == before
    plan: Any = (await vm.plan_snapshot("s3")).details
    assert plan.overlays
    await vm.stream(disk, base="s1")
    assert await settings(theirs) == before
    await vm.mirror(disk, target=home / "machines" / "theirs" / "copy.qcow2", mode="pivot")
    assert await settings(theirs) == before
    assert (locks(Path((await vm.chains())[0].active.path)) > 0) == (locked > 0)
    opened = (await vm.record()).spec.disks[0].opened
    assert opened
    if form == "drive":
        await theirs.io("discard 0 1M")
        await theirs.io("write -P 0 2M 8M")
        assert Path((await vm.chains())[0].active.path).stat().st_blocks * 512 < 2 * MIB
    if form == "drive, direct":
        assert opened.file["aio"] == "native"
        assert opened.format["discard"] == "ignore"
    if form == "blockdev":
        assert opened.file == {"discard": "ignore", "aio": "io_uring", "cache": {"direct": True, "no-flush": False}}


async def test_what_is_not_known_of_a_disk_is_told(
    q: qmpsnap.Controller,
    launched: Any,
) -> None:
    theirs = launched(["-device", "virtio-scsi,id=bus"])
    async with theirs.monitor() as qemu:
        file = {"driver": "file", "filename": str(theirs.folder / "top.qcow2")}
        await qemu.execute(
            "blockdev-add",
            {"driver": "qcow2", "node-name": "n", "detect-zeroes": "unmap", "discard": "unmap", "file": file},
        )
        await qemu.execute("device_add", {"driver": "scsi-hd", "id": "x", "drive": "n"})
    done = await adopt.run(q.context, "theirs", Path(theirs.socket))
    assert "do not name its image" in done.disks[0].untold
    vm = await q.machine("theirs")
    await vm.snapshot("s")
    assert (await settings(theirs))[0] == "unmap"


# --- names ------------------------------------------------------------------------------------------------------------


async def test_names_that_the_owner_has_taken_are_passed_over(q: qmpsnap.Controller, launched: Any) -> None:
    """A node, a node as that of a file, a drive; before the adoption and after it."""
    theirs = launched(
        [
            *("-blockdev", "driver=qcow2,node-name=vda-3,file.driver=file,file.filename={folder}/top.qcow2"),
            *("-device", "virtio-blk,drive=vda-3,id=vda"),
            *("-drive", "if=none,id=vda-4,driver=null-co,read-only=on"),
            *("-blockdev", "driver=null-co,node-name=vda-5.file"),
        ]
    )
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    planned = (await vm.plan_snapshot("s1")).details
    assert (await vm.snapshot("s1")).operation == planned.change.snapshots[0].operation == 6
    async with theirs.monitor() as qemu:
        await qemu.execute("blockdev-add", {"driver": "null-co", "node-name": "vda-7"})
    await vm.snapshot("s2")
    async with theirs.monitor() as qemu:
        await qemu.execute("blockdev-add", {"driver": "null-co", "node-name": "vda-9"})
    await vm.mirror("vda", target=theirs.folder / "copy.qcow2", mode="pivot")
    await vm.snapshot("s3")
    assert [layer.layer.id for layer in (await vm.chains())[0].layers][-1] == "vda-11"


async def test_our_own_qemu_has_its_users_names_too(q: qmpsnap.Controller) -> None:
    vm = await q.define(MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),)))
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        await qemu.execute("blockdev-add", {"driver": "null-co", "node-name": "vda-2"})
    await vm.snapshot("s")
    async with user_monitor(vm) as qemu:
        await qemu.execute("blockdev-del", {"node-name": "vda-2"})
    await hold_invariants(vm)


# --- where the images are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["top.qcow2", "./top.qcow2", "../theirs/top.qcow2"])
async def test_relative_paths_of_a_daemon(q: qmpsnap.Controller, folder: Path, daemon: Any, given: str) -> None:
    socket = daemon(folder, "-drive", f"file={given},if=virtio,format=qcow2")
    done = await adopt.run(q.context, "theirs", Path(socket))
    assert [layer.path for layer in done.disks[0].found.layers] == [
        str(folder / n) for n in ("base.qcow2", "top.qcow2")
    ]
    vm = await q.machine("theirs")
    await vm.snapshot("s")
    assert all(view.problems == () for view in await vm.chains())


async def test_a_monitor_that_writes_prettily(q: qmpsnap.Controller, home: Path, daemon: Any) -> None:
    place = home / "pretty"
    place.mkdir()
    run(place, "create", "-q", "-f", "qcow2", "d.qcow2", "1M")
    await q.adopt("theirs", daemon(place, "-drive", f"file={place}/d.qcow2,if=virtio,format=qcow2"))
    vm = await q.machine("theirs")
    await vm.snapshot("s")
    await vm.stop(force=True)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("snapshot=on", "launched with -snapshot or snapshot=on"),
        ("-snapshot", "launched with -snapshot or snapshot=on"),
        ("deleted", "was deleted while QEMU has it open"),
        ("renamed", "was moved or renamed"),
        ("relative, renamed", "none of its open files has that name"),
        ("two of that name", "several files of that name"),
    ],
)
async def test_images_that_are_not_there(
    q: qmpsnap.Controller,
    folder: Path,
    daemon: Any,
    what: str,
    said: str,
) -> None:
    drive = f"file={folder}/top.qcow2,if=virtio,format=qcow2"
    arguments = ["-drive", drive]
    if what == "snapshot=on":
        arguments = ["-drive", f"{drive},snapshot=on"]
    elif what == "-snapshot":
        arguments += ["-snapshot"]
    elif what == "relative, renamed":
        arguments = ["-drive", "file=top.qcow2,if=virtio,format=qcow2"]
    elif what == "two of that name":
        (folder / "x").mkdir()
        run(folder, "create", "-q", "-f", "qcow2", "x/top.qcow2", "1M")
        more = "file=x/top.qcow2,if=virtio,format=qcow2"
        arguments = ["-drive", "file=top.qcow2,if=virtio,format=qcow2", "-drive", more]
    socket = daemon(folder, *arguments)
    if what == "deleted":
        (folder / "top.qcow2").unlink()
    elif "renamed" in what:
        (folder / "top.qcow2").rename(folder / "other.qcow2")
    with pytest.raises(StateError, match=said) as refused:
        await q.adopt("theirs", socket)
    assert refused.value.hint
    assert refused.value.effect == "none"


# --- images of other formats: the hint is done, and what it makes is taken -------------------------------------------


def by_hint(hint: str) -> Path:
    command = shlex.split(hint.partition(": ")[2])
    subprocess.run(command, check=True, timeout=20)
    return Path(command[-1])


@pytest.mark.parametrize("kind", ["vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "parallels"])
def test_the_hint_at_an_image_of_another_format_leads_to_a_machine(
    home: Path, place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = place / "a disk"
    run(place, "create", "-q", "-f", kind, str(image), "8M")
    assert main(["adopt", "m", "--image", f"vda={image}"]) == 2
    hint = re.search(r"hint: (.*)", capsys.readouterr().err)
    assert hint
    assert main(["adopt", "m", "--image", f"vda={image},format={kind}"]) == 2
    assert hint[1] in capsys.readouterr().err
    assert main(["adopt", "m", "--image", f"vda={image},format=raw"]) == 2
    said = capsys.readouterr().err
    assert f"like a {kind} image" in said
    assert hint[1] in said
    made = by_hint(hint[1])
    assert main(["adopt", "m", "--image", f"vda={made}"]) == 0


def test_an_image_that_is_still_packed(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = place / "d.qcow2"
    run(place, "create", "-q", "-f", "qcow2", "d.qcow2", "1M")
    subprocess.run(["gzip", str(image)], check=True)
    image.with_name("d.qcow2.gz").rename(image)
    assert main(["adopt", "m", "--image", f"vda={image}"]) == 2
    assert "unpack it: gunzip" in capsys.readouterr().err


async def test_a_running_qemu_on_an_image_of_another_format(
    q: qmpsnap.Controller,
    folder: Path,
    launched: Any,
) -> None:
    run(folder, "create", "-q", "-f", "vmdk", "d.vmdk", "1M")
    theirs = launched(["-drive", "file={folder}/d.vmdk,format=vmdk,if=virtio"])
    with pytest.raises(StateError, match="'vmdk'") as refused:
        await q.adopt("theirs", theirs.socket)
    theirs.process.kill()
    theirs.process.wait(10)
    made = by_hint(refused.value.hint)
    await q.define(MachineSpec(name="m", disks=(DiskSpec(name="vda", image=str(made)),)), folders=[folder])
