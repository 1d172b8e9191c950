"""QEMUs that the test launches itself, in the ways people do, taken over; and chains from disk that nobody runs."""

import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from qemu.qmp import ConnectError, QMPClient

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed, ImageInUse, ImageRefused, NameTaken, QemuGone, StateError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.adoption import adopt
from qmpsnap.ops.merge import commit
from qmpsnap.ops.merge.commit import CommitRequest
from tests.live.machine import MIB, content_hash, fill, hold_invariants

pytestmark = pytest.mark.version

THROTTLED = "driver=throttle,node-name=slow,throttle-group=tg,file=fmt"
BLOCKDEV = "driver=qcow2,node-name=fmt,file.driver=file,file.filename={folder}/top.qcow2"
FORMS = {
    "drive": ["-drive", "file={folder}/top.qcow2,format=qcow2,if=virtio"],
    "drive with an id, relative": [
        "-drive",
        "file=top.qcow2,format=qcow2,if=none,id=D0",
        "-device",
        "virtio-blk,drive=D0",
    ],
    "throttled drive": ["-drive", "file={folder}/top.qcow2,format=qcow2,if=virtio,throttling.iops-total=5000"],
    "blockdev": ["-blockdev", BLOCKDEV, "-device", "virtio-blk,drive=fmt,id=disk0"],
    "blockdev under a throttle": [
        *("-object", "throttle-group,id=tg,x-iops-total=5000", "-blockdev", BLOCKDEV),
        *("-blockdev", THROTTLED, "-device", "virtio-blk,drive=slow"),
    ],
    "blockdev under copy-on-read": [
        *("-blockdev", BLOCKDEV, "-blockdev", "driver=copy-on-read,node-name=cor,file=fmt"),
        *("-device", "virtio-blk,drive=cor,id=not-a-disk-name"),
    ],
    "nodes named like layers": [
        *("-blockdev", "driver=qcow2,node-name=vda-2,file.driver=file,file.filename={folder}/base.qcow2,read-only=on"),
        *("-blockdev", "driver=qcow2,node-name=vda-1,file.driver=file,file.filename={folder}/top.qcow2,backing=vda-2"),
        *("-device", "virtio-blk,drive=vda-1,id=vda"),
    ],
}
NAMES = {
    "drive": "virtio0",
    "drive with an id, relative": "vda",
    "throttled drive": "virtio0",
    "blockdev": "disk0",
    "blockdev under a throttle": "vda",
    "blockdev under copy-on-read": "vda",
    "nodes named like layers": "vda",
}


class Foreign:
    """A QEMU that is not ours, with a monitor to hand over and one for the test."""

    def __init__(self, folder: Path, arguments: list[str], *, machine: str = "q35") -> None:
        self.folder = folder
        self.socket = folder / "given.sock"
        self.process = subprocess.Popen(
            [
                *(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64", "-nodefaults", "-display", "none", "-S"),
                *("-machine", machine, "-accel", "tcg", "-m", "64", *(a.format(folder=folder) for a in arguments)),
                *("-qmp", "unix:given.sock,server=on,wait=off", "-qmp", "unix:own.sock,server=on,wait=off"),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while not (folder / "own.sock").exists():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self._has_its_images()

    def _has_its_images(self) -> None:
        """Wait for the answer to a command: sockets are there, and QEMU greets, before it opens its images."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(60)
            while monitor.connect_ex(str(self.folder / "own.sock")):  # a socket is there before anybody listens on it
                assert self.process.poll() is None
                time.sleep(0.01)
            monitor.sendall(b'{"execute": "qmp_capabilities"}')
            answers = monitor.makefile()
            assert "QMP" in answers.readline()
            assert "return" in answers.readline()

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[QMPClient]:
        client = QMPClient("test")
        with anyio.fail_after(20):
            while True:  # a socket is there before anybody listens on it
                try:
                    await client.connect(str(self.folder / "own.sock"))
                    break
                except ConnectError as error:
                    if not isinstance(error.exc, ConnectionRefusedError):
                        raise
                    await anyio.sleep(0.01)
        try:
            yield client
        finally:
            await client.disconnect()

    async def io(self, command: str) -> None:
        """As the guest would: through its device, and so through whatever filters stand below that."""
        async with self.monitor() as qemu:
            backends: Any = await qemu.execute("query-block")
            line = f'qemu-io -d {backends[0]["qdev"]} "{command}"'
            said = await qemu.execute("human-monitor-command", {"command-line": line})
            assert not said, said

    async def graph(self) -> set[tuple[str, str, str]]:
        async with self.monitor() as qemu:
            found: Any = await qemu.execute("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in found["nodes"]}
        return {(names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in found["edges"]}

    async def nodes(self) -> list[Any]:
        async with self.monitor() as qemu:
            found: Any = await qemu.execute("query-named-block-nodes", {"flat": True})
        return list(found)


@pytest.fixture
def folder(home: Path) -> Path:
    """Somebody's images: ``base.qcow2`` under ``top.qcow2``, which names it by a relative string."""
    place = home / "theirs"
    place.mkdir()
    run(place, "create", "-q", "-f", "qcow2", "base.qcow2", "16M")
    subprocess.run(["qemu-io", "-c", "write -P 1 0 1M", "base.qcow2"], cwd=place, check=True, stdout=subprocess.DEVNULL)
    run(place, "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    return place


@pytest.fixture
def launched(folder: Path) -> Iterator[Any]:
    """Launches QEMUs; whatever is left of them ends with the test."""
    started: list[Foreign] = []

    def launch(form: str | list[str], **options: str) -> Foreign:
        started.append(Foreign(folder, FORMS[form] if isinstance(form, str) else form, **options))
        return started[-1]

    yield launch
    for qemu in started:
        qemu.process.kill()
        qemu.process.wait(10)


def run(folder: Path, *arguments: str) -> None:
    subprocess.run([os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img", *arguments], cwd=folder, check=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def agree(vm: qmpsnap.MachineHandle, hashes: dict[str, str]) -> None:
    """I1, I5, I6 of a machine that is not ours."""
    for view in await vm.chains():
        assert view.running
        assert view.problems == (), view
        assert all(layer.problems == () for layer in view.layers), view
    for snapshot in await vm.snapshots():
        if snapshot.name in hashes:
            assert await content_hash(vm, snapshot.points[0].layer) == hashes[snapshot.name], snapshot.name


async def layers(vm: qmpsnap.MachineHandle) -> list[str]:
    return [Path(layer.layer.path).name for layer in (await vm.chains())[0].layers]


async def _adopted(
    q: qmpsnap.Controller, launched: Any, form: str
) -> tuple[Foreign, qmpsnap.MachineHandle, dict[str, str]]:
    """An adopted machine with three snapshots, a MiB written before the first and after each."""
    theirs = launched(form)
    await theirs.io("write -P 2 1M 1M")
    before = await theirs.graph()
    done = await adopt.run(q.context, "theirs", Path(theirs.socket))
    assert [disk.name for disk in done.disks] == [NAMES[form]]
    assert await theirs.graph() == before
    vm = await q.machine("theirs")
    assert await layers(vm) == ["base.qcow2", "top.qcow2"]
    await agree(vm, {})
    hashes = {}
    for number, name in enumerate(("s1", "s2", "s3"), start=3):
        snapshot = await vm.snapshot(name)
        hashes[name] = await content_hash(vm, snapshot.points[0].layer)
        await theirs.io(f"write -P {number} {number}M 1M")
        await agree(vm, hashes)
    assert len(set(hashes.values())) == 3
    return theirs, vm, hashes


async def test_a_dry_run_tells_what_would_be_taken_over(q: qmpsnap.Controller, launched: Any) -> None:
    theirs = launched(FORMS["drive"])
    survey, plan = (await q.plan_adopt("theirs", theirs.socket)).details
    assert await q.machines() == ()
    assert not q.context.home.run_dir("theirs").exists()
    done = await adopt.run(q.context, "theirs", Path(theirs.socket))
    assert (survey.disks, plan.created) == (done.disks, ())


async def test_an_image_of_a_running_qemu_may_not_have_too_many_snapshots_inside(
    q: qmpsnap.Controller, launched: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, "snapshot", "-c", "inside", "base.qcow2")
    theirs = launched(FORMS["drive"])
    monkeypatch.setattr(header, "MAX_TAGS", 0)
    with pytest.raises(ImageRefused, match="1 internal snapshots"):
        await q.adopt("theirs", theirs.socket)
    assert await q.machines() == ()


@pytest.mark.parametrize("form", FORMS)
async def test_snapshots_are_taken_below_the_filters(q: qmpsnap.Controller, launched: Any, form: str) -> None:
    theirs, vm, _ = await _adopted(q, launched, form)
    active = (await vm.chains())[0].layers[-1].layer
    written = {node["file"] for node in await theirs.nodes() if node["drv"] == "file" and not node["ro"]}
    assert written == {active.path}
    above = {parent for parent, _, child in await theirs.graph() if child == active.id}
    roots = {child for _, edge, child in await theirs.graph() if edge == "root"}
    if form in ("blockdev under a throttle", "blockdev under copy-on-read"):
        assert above == roots == {"slow" if "throttle" in form else "cor"}
    else:
        assert roots == {active.id}
    _, (command, arguments) = await commit.preview(
        q.context, "theirs", CommitRequest(disk=NAMES[form], base="s2", consume=True)
    )
    assert command == "block-commit"
    assert {arguments["device"]} == roots


@pytest.mark.parametrize("form", FORMS)
async def test_layers_of_ours_are_merged_and_theirs_never_written(
    q: qmpsnap.Controller, folder: Path, launched: Any, form: str
) -> None:
    theirs, vm, hashes = await _adopted(q, launched, form)
    disk = NAMES[form]
    untouched = {file: digest(folder / file) for file in ("base.qcow2", "top.qcow2")}
    with pytest.raises(StateError, match="not created by qmpsnap"):
        await vm.commit(disk, consume=True)
    await vm.commit(disk, base="s2", top="s3", consume=True)
    del hashes["s2"]
    await agree(vm, hashes)
    assert len(await layers(vm)) == 4
    await vm.commit(disk, base="s3", consume=True)
    assert len(await layers(vm)) == 3
    del hashes["s3"]
    await agree(vm, hashes)
    await vm.snapshot("s4")
    await theirs.io("write -P 9 9M 1M")
    await vm.stream(disk, base="s1")
    await agree(vm, hashes)
    await vm.delete_snapshots("s2", "s3", "s4")
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["s1"]
    await vm.stream(disk)
    assert len(await layers(vm)) == 1
    await agree(vm, hashes)
    await vm.snapshot("s5")
    await vm.delete_snapshots("s1", "s5")
    assert len(await layers(vm)) == 1
    for place, pattern in enumerate((1, 2, 0, 3, 4, 5, 0, 0, 0, 9)):
        await theirs.io(f"read -P {pattern} {place}M 1M")
    assert {file: digest(folder / file) for file in untouched} == untouched
    async with theirs.monitor() as qemu:
        assert await qemu.execute("query-jobs") == []


async def test_stop_ends_it_and_nothing_starts_it_again(q: qmpsnap.Controller, launched: Any) -> None:
    theirs = launched("drive")
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    await vm.snapshot("s1")
    with pytest.raises(StateError, match="qmpsnap does not launch"):
        await vm.revert("s1")
    with pytest.raises(StateError, match="cannot load its memory again"):
        await vm.save()
    for attempt in (vm.run("true"), vm.fstrim()):
        with pytest.raises(StateError, match="no channel to its guest agent"):
            await attempt
    assert theirs.process.poll() is None
    await vm.stop(force=True)
    assert theirs.process.wait(10) == 0
    with pytest.raises(StateError, match="qmpsnap does not launch") as refused:
        await vm.start()
    assert refused.value.exit_code == 4
    with pytest.raises(StateError, match="qmpsnap does not launch"):
        await vm.snapshot("late")


async def test_it_is_given_back_untouched(
    q: qmpsnap.Controller, folder: Path, launched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = launched("drive")
    before, files = await theirs.graph(), {file: digest(folder / file) for file in ("base.qcow2", "top.qcow2")}
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    assert await vm.state() == "prelaunch"
    assert await vm.undefine() == []
    assert await theirs.graph() == before
    assert {file: digest(folder / file) for file in files} == files

    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    await vm.snapshot("s1")
    await theirs.io("write -P 7 0 1M")
    with pytest.raises(StateError, match="1 snapshot"):
        await vm.undefine()
    with pytest.raises(StateError, match="is running"):
        await vm.undefine(disks="remove")
    (overlay,) = await vm.undefine(disks="keep")
    await theirs.io("read -P 7 0 1M")
    assert Path(overlay).exists()
    assert theirs.process.poll() is None


async def test_what_an_adopted_machine_refuses(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    theirs = launched("drive")
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    with pytest.raises(NameTaken):
        await q.adopt("theirs", theirs.socket)
    with pytest.raises(StateError, match="is machine theirs already"):
        await q.adopt("again", theirs.socket)
    assert not (q.context.home.run_dir("again")).exists()
    with pytest.raises(StateError, match="machine theirs writes to"):
        await q.define(
            MachineSpec(name="clone", disks=(DiskSpec(name="vda", base=str(folder / "top.qcow2")),)), folders=[folder]
        )
    await vm.snapshot("s1")
    # A node that somebody else puts on top is not ours to build on.
    run(folder, "create", "-q", "-f", "qcow2", "other.qcow2", "16M")
    async with theirs.monitor() as qemu:
        await qemu.execute("blockdev-snapshot-sync", {"device": "virtio0", "snapshot-file": str(folder / "sync.qcow2")})
    with pytest.raises(StoreMismatch):
        await vm.snapshot("s2")


REFUSED = {
    "not a file": (
        ["-blockdev", "driver=raw,node-name=n,file.driver=null-co,file.size=1048576", "-device", "virtio-blk,drive=n"],
        "null-co",
    ),
    "no disk": ([], "no drive at all"),
    "only a medium": (["-drive", "file=base.qcow2,format=qcow2,if=ide,media=cdrom"], "is removable"),
    "copy-on-read flag": (["-drive", "file=top.qcow2,format=qcow2,if=virtio,copy-on-read=on"], "copy-on-read"),
}


@pytest.mark.parametrize("why", REFUSED)
async def test_what_cannot_be_adopted(q: qmpsnap.Controller, folder: Path, launched: Any, why: str) -> None:
    arguments, said = REFUSED[why]
    theirs = launched(arguments)
    with pytest.raises(StateError, match=said):
        await q.adopt("theirs", theirs.socket)
    assert await q.machines() == ()
    assert not q.context.home.run_dir("theirs").exists()


async def test_headers_and_files_have_to_agree_with_qemu(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    theirs = launched("drive")
    await theirs.graph()  # once it answers it has its images open
    shutil.copy(folder / "top.qcow2", folder / "copy.qcow2")
    (folder / "top.qcow2").rename(folder / "moved.qcow2")
    (folder / "copy.qcow2").rename(folder / "top.qcow2")
    with pytest.raises(StoreMismatch, match="another file open"):
        await q.adopt("theirs", theirs.socket)
    (folder / "moved.qcow2").rename(folder / "top.qcow2")
    theirs.process.kill()
    theirs.process.wait(10)
    for name in ("given.sock", "own.sock"):
        (folder / name).unlink()
    theirs = launched(["-blockdev", BLOCKDEV + ",backing=", "-device", "virtio-blk,drive=fmt"])
    with pytest.raises(StoreMismatch, match=r"names base\.qcow2 as its backing file, QEMU reads nothing"):
        await q.adopt("theirs", theirs.socket)


async def test_a_job_in_the_way(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    theirs = launched("blockdev")
    async with theirs.monitor() as qemu:
        await qemu.execute("block-stream", {"device": "fmt", "job-id": "their-job", "speed": 1})
        with pytest.raises(StateError, match="their-job"):
            await q.adopt("theirs", theirs.socket)


async def test_sockets_that_are_no_monitor(q: qmpsnap.Controller, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QemuGone, match="is not the QMP socket"):
        await q.adopt("theirs", home / "nothing.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "silent.sock"))
        listener.listen()
        with pytest.raises(DeadlinePassed) as silent:
            await q.adopt("theirs", home / "silent.sock")
    assert silent.value.exit_code == 6
    assert "another client" in silent.value.hint
    assert await q.machines() == ()


async def test_a_qemu_that_was_replaced_is_not_taken_for_it(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    theirs = launched("drive")
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    await vm.snapshot("s1")
    theirs.process.kill()
    theirs.process.wait(10)
    assert not await vm.is_running()
    for name in ("given.sock", "own.sock"):
        (folder / name).unlink()
    launched("drive")
    assert not await vm.is_running()
    with pytest.raises(ImageInUse, match=r"is open for writing in \S+ \(process"):
        await vm.snapshot("s2")
    assert {finding.code for finding in (await vm.check()).findings} >= {"image-in-use"}


def test_the_command_shows_the_mapping(
    home: Path, folder: Path, launched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = launched([*FORMS["blockdev under a throttle"], "-drive", "if=ide,media=cdrom,id=cd"])
    assert main(["adopt", "theirs", "--qmp", str(theirs.socket)]) == 0
    said = capsys.readouterr()
    line = said.out.splitlines()[1].split()
    assert (line[0], line[2], line[3], line[4]) == ("vda", "slow", "2", str(folder / "top.qcow2"))
    assert "left out: cd" in said.err
    assert main(["snapshot", "create", "theirs", "--dry-run"]) == 0
    assert '"node": "fmt"' in capsys.readouterr().out
    assert main(["show", "theirs"]) == 0
    assert str(theirs.socket) in capsys.readouterr().out
    assert main(["undefine", "theirs"]) == 0


# --- import ----------------------------------------------------------------------------------------------------------


async def test_a_deep_chain_from_disk(q: qmpsnap.Controller, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "deeper").mkdir()
    run(folder, "create", "-q", "-f", "qcow2", "-b", "../top.qcow2", "-F", "qcow2", "deeper/third.qcow2")
    files = {file: digest(folder / file) for file in ("base.qcow2", "top.qcow2")}
    vm = await q.define(
        MachineSpec(
            name="old", memory=64 * MIB, disks=(DiskSpec(name="vda", image=str(folder / "deeper/third.qcow2")),)
        ),
        folders=[folder],
    )
    assert await layers(vm) == ["base.qcow2", "top.qcow2", "third.qcow2"]
    await vm.start(paused=True)
    await fill(vm, "vda", 5, offset=5 * MIB)
    with pytest.raises(StateError, match="not created by qmpsnap"):
        await vm.stream("vda")
    await vm.snapshot("s1")
    third = digest(folder / "deeper/third.qcow2")
    hashes = {("s1", "vda"): await content_hash(vm, (await vm.snapshots())[0].points[0].layer)}
    await fill(vm, "vda", 6, offset=6 * MIB)
    await hold_invariants(vm, hashes)
    await vm.stream("vda")
    assert len(await layers(vm)) == 1
    await hold_invariants(vm, hashes)
    await vm.stop(force=True)
    await vm.delete_snapshots("s1")
    await vm.start(paused=True)
    await hold_invariants(vm)
    assert {file: digest(folder / file) for file in files} == files
    assert digest(folder / "deeper/third.qcow2") == third


def test_the_command_imports_images(home: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.raw").write_bytes(bytes(MIB))
    images = ["--image", f"vda={folder}/top.qcow2", "--image", f"vdb={folder}/data.raw,format=raw"]
    assert main(["adopt", "old", *images]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("vda", "2", str(folder / "top.qcow2")),
        ("vdb", "1", str(folder / "data.raw")),
    ]
    assert main(["adopt", "bad", "--image", "no-path"]) == 2
    assert main(["adopt", "bad", "--image", f"vda={folder}/top.qcow2,format=raw"]) == 2
