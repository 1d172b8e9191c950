"""Mirror on real chains with known bytes: full and shallow, to go on with the copy or to have it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, ImageInUse, ImageRefused, QmpsnapError, StateError, UsageError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, Format, MachineSpec
from qmpsnap.model.names import LayerId
from tests.live.machine import (
    MIB,
    active_hash,
    content_hash,
    context_of,
    fill,
    grown_and_stopped,
    hash_of,
    hold_invariants,
)

pytestmark = pytest.mark.version

SIZE = 16 * MIB


async def file_hash(vm: qmpsnap.MachineHandle, path: Path, kind: Format = "qcow2") -> str:
    """SHA-256 of what an image of the user's holds."""
    return await hash_of(vm, Layer(id=LayerId("copy-0"), path=str(path), format=kind, backing=None, virtual_size=SIZE))


def make_image(vm: qmpsnap.MachineHandle, path: Path, *more: str, size: int = SIZE, kind: str = "qcow2") -> None:
    binary = context_of(vm).image.binary
    subprocess.run([binary, "create", "-q", "-f", kind, *more, str(path), str(size)], check=True)


def _scribble(path: Path, kind: str) -> None:
    subprocess.run(["qemu-io", "-f", kind, "-c", "write -q -P 77 4M 1M", str(path)], check=True)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("mode", ["pivot", "finish"])
@pytest.mark.parametrize("kind", ["full", "shallow"])
async def test_the_forms(
    q: qmpsnap.Controller, place: Path, kind: str, mode: Literal["pivot", "finish"], state: str
) -> None:
    shallow = kind == "shallow"
    vm, hashes, now = await grown_and_stopped(q)
    if state == "running":
        await vm.start(paused=True)
    target = place / "copy.qcow2"
    done = await vm.mirror("vda", target, mode=mode, shallow=shallow)
    assert done._plan.live == (state == "running")
    await hold_invariants(vm, hashes)
    assert [file.name for file in place.iterdir()] == ["copy.qcow2"]
    found = header.read(target, format="qcow2")
    base = context_of(vm).store.layer(LayerId("vda-2")).path
    assert found.backing == (base if shallow else None)
    ids = (await vm.chains())[0].ids
    if mode == "finish":
        assert ids == ("vda-1", "vda-2", "vda-3")
        assert await file_hash(vm, target) == now
        assert context_of(vm).store.layer_at(str(target)) is None
    else:
        assert ids == (("vda-1", "vda-2", "vda-4") if shallow else ("vda-4",))
        layer = (await vm.chains())[0].layers[-1].layer
        assert (layer.path, layer.owned) == (str(target), True)
        assert not (context_of(vm).home.machine_dir("still") / "vda-3.qcow2").exists()
    assert await active_hash(vm) == now
    if state == "stopped":
        await vm.start(paused=True)
    await vm.snapshot("afterwards")
    await fill(vm, "vda", 55)
    await hold_invariants(vm, hashes)
    if mode == "finish":
        assert await file_hash(vm, target) == now


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("mode", ["pivot", "finish"])
@pytest.mark.parametrize("kind", ["qcow2", "raw", "shallow"])
async def test_reuse(
    q: qmpsnap.Controller, place: Path, kind: str, mode: Literal["pivot", "finish"], state: str
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    form: Format = "raw" if kind == "raw" else "qcow2"
    target = place / "mine"
    base = context_of(vm).store.layer(LayerId("vda-2")).path
    make_image(vm, target, *(("-F", "qcow2", "-b", base) if kind == "shallow" else ()), kind=form)
    if kind != "shallow":  # whatever was there is overwritten
        _scribble(target, form)
    inode = target.stat().st_ino
    if state == "running":
        await vm.start(paused=True)
    await vm.mirror("vda", target, mode=mode, reuse=True, shallow=kind == "shallow")
    assert target.stat().st_ino == inode
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now
    if mode == "finish":
        assert await file_hash(vm, target, form) == now
        return
    layer = (await vm.chains())[0].layers[-1].layer
    assert (layer.path, layer.format, layer.owned) == (str(target), form, False)
    if state == "stopped":
        await vm.start(paused=True)
    await vm.snapshot("afterwards")
    await fill(vm, "vda", 55)
    await hold_invariants(vm, hashes)
    await vm.mirror("vda", place / "again.qcow2", mode="pivot")
    assert target.exists()  # never removed: it is not ours
    await hold_invariants(vm, hashes)


async def test_bad_requests_change_nothing(
    q: qmpsnap.Controller, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    base = context_of(vm).store.layer(LayerId("vda-2")).path
    taken, small, plain, other = (place / name for name in ("taken", "small", "plain", "other"))
    for image in (taken, plain):
        make_image(vm, image)
    make_image(vm, small, size=SIZE // 2)
    make_image(vm, other, "-F", "qcow2", "-b", str(taken))
    full = place / "full"
    make_image(vm, full, "-F", "qcow2", "-b", base)
    _scribble(full, "qcow2")
    link = place / "link"
    link.symlink_to(plain)
    hard = place / "hard"
    hard.hardlink_to(base)  # a layer under another name
    before = {file: file.stat().st_mtime_ns for file in place.iterdir()}
    serial = context_of(vm).store.next_serial()
    cases: list[tuple[type[QmpsnapError], Path | str, dict[str, Any]]] = [
        (StateError, taken, {}),
        (StateError, link, {}),
        (StateError, hard, {"reuse": True}),
        (UsageError, Path(base), {"reuse": True}),
        (ImageRefused, small, {"reuse": True}),
        (ImageRefused, taken, {"reuse": True, "format": "raw"}),
        (ImageRefused, plain, {"reuse": True, "shallow": True}),
        (ImageRefused, other, {"reuse": True}),
        (ImageRefused, other, {"reuse": True, "shallow": True}),
        (ImageRefused, full, {"reuse": True, "shallow": True}),
        (ImageRefused, link, {"reuse": True}),
        (ImageRefused, place / "missing", {"reuse": True}),
        (HostCannot, place / "no" / "folder", {}),
        (UsageError, Path("relative"), {}),
        (UsageError, place / "new", {"shallow": True, "format": "raw"}),
        (UsageError, context_of(vm).home.machine_dir("still") / "vda-9.qcow2", {}),
        (HostCannot, "nbd+unix:///?socket=/nowhere/at/all", {"mode": "finish"}),
        (UsageError, "nbd+unix:///?socket=/nowhere/at/all", {"mode": "pivot"}),
        (UsageError, "nbd+unix:///x", {"mode": "finish"}),
    ]
    for state in ("stopped", "running"):
        if state == "running":
            await vm.start(paused=True)
        for family, target, options in cases:
            with pytest.raises(QmpsnapError) as refused:
                await vm.mirror("vda", target, **{"mode": "pivot", **options})
            assert type(refused.value) is family, (target, options, refused.value)
            assert refused.value.effect == "none"
    assert {file: file.stat().st_mtime_ns for file in place.iterdir()} == before
    assert context_of(vm).store.next_serial() == serial
    await hold_invariants(vm, hashes)


async def test_an_image_that_somebody_has_open_is_refused(q: qmpsnap.Controller, place: Path) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    target, socket = place / "mine", place / "s"
    make_image(vm, target)
    with _served(target, socket, "qcow2"):
        for state in ("stopped", "running"):
            if state == "running":
                await vm.start(paused=True)
            with pytest.raises(ImageInUse, match="is open for writing in") as refused:
                await vm.mirror("vda", target, mode="pivot", reuse=True)
            assert refused.value.effect == "none"
            await hold_invariants(vm, hashes)
    await vm.mirror("vda", target, mode="pivot", reuse=True)
    await hold_invariants(vm, hashes)


async def test_no_space_is_said_before_anything_begins(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes, _ = await grown_and_stopped(q)

    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr("os.statvfs", lambda _: Full)
    with pytest.raises(HostCannot, match="40960 are free") as refused:
        await vm.mirror("vda", place / "copy", mode="finish")
    assert refused.value.effect == "none"
    assert list(place.iterdir()) == []
    await hold_invariants(vm, hashes)


@contextmanager
def _served(image: Path, socket: Path, kind: str) -> Iterator[None]:
    argv = ["qemu-nbd", "--persistent", "-f", kind, "-x", "disk", "-k", str(socket), "--discard=unmap", str(image)]
    with subprocess.Popen(argv) as server:
        try:
            for _ in range(100):
                if socket.exists():
                    break
                subprocess.run(["sleep", "0.05"], check=True)
            yield
        finally:
            server.terminate()


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_onto_an_nbd_export(q: qmpsnap.Controller, place: Path, state: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    far, socket = place / "far", place / "s"
    make_image(vm, far)
    if state == "running":
        await vm.start(paused=True)
    with _served(far, socket, "qcow2"):
        await vm.mirror("vda", f"nbd+unix:///disk?socket={socket}", mode="finish")
    assert await file_hash(vm, far) == now
    await hold_invariants(vm, hashes)
    small = place / "small"
    make_image(vm, small, size=SIZE // 2)
    socket.unlink(missing_ok=True)
    with _served(small, socket, "qcow2"), pytest.raises(ImageRefused, match="8388608 bytes") as refused:
        await vm.mirror("vda", f"nbd+unix:///disk?socket={socket}", mode="finish")
    assert refused.value.effect == "none"
    await hold_invariants(vm, hashes)


async def test_writes_that_wait_for_the_copy(q: qmpsnap.Controller, place: Path) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    told: list[str] = []
    await vm.mirror(
        "vda", place / "copy", mode="pivot", write_blocking=True, report=lambda job: told.append(job.status)
    )
    assert told[-1] == "concluded"
    assert await active_hash(vm) == now
    await hold_invariants(vm, hashes)


async def test_a_shared_base_and_a_shallow_copy_onto_an_empty_overlay(q: qmpsnap.Controller, place: Path) -> None:
    """OpenStack's flow: two machines on one base image; one moves to another overlay and starts again from it."""
    base = place / "cloud.raw"
    base.write_bytes(b"\x11" * SIZE)
    machines: list[qmpsnap.MachineHandle] = []
    for name in ("one", "two"):
        disk = DiskSpec(name="vda", base=str(base), format="raw")
        vm = await q.define(MachineSpec(name=name, memory=64 * MIB, disks=(disk,)), folders=[place])
        await vm.start(paused=True)
        await fill(vm, "vda", len(name) + len(machines), offset=MIB)
        machines.append(vm)
    one, two = machines
    before = await active_hash(one)
    overlay = place / "moved.qcow2"
    make_image(one, overlay, "-F", "raw", "-b", str(base))
    await one.mirror("vda", overlay, mode="pivot", shallow=True, reuse=True)
    await hold_invariants(one)
    await one.stop(force=True)
    await one.start(paused=True)
    assert [at.layer.path for at in (await one.chains())[0].layers] == [str(base), str(overlay)]
    assert await active_hash(one) == before
    await fill(one, "vda", 9)
    for vm in machines:
        await hold_invariants(vm)
    assert base.read_bytes() == b"\x11" * SIZE
    assert await two.is_running()


def test_on_the_command_line(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = home / "s.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n")
    assert main(["define", str(spec)]) == 0
    target = str(place / "copy.qcow2")
    assert main(["mirror", "still", "vda", target, "--finish", "--dry-run"]) == 0
    assert "blockdev-mirror" in capsys.readouterr().out
    assert list(place.iterdir()) == []
    assert main(["mirror", "still", "vda", target, "--finish", "--progress", "none"]) == 0
    assert "is not managed by qmpsnap" in capsys.readouterr().out
    assert main(["blockcopy", "still", "vda", target, "--pivot"]) == 4
    assert main(["mirror", "still", "vda", target]) == 2
    assert main(["mirror", "still", "vda", target, "--pivot", "--reuse", "--progress", "none"]) == 0
    assert main(["mirror", "still", "nope", target, "--pivot"]) == 3


@pytest.mark.parametrize("mode", ["pivot", "finish"])
async def test_a_guest_that_never_rests_is_held_for_the_end(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, mode: Literal["pivot", "finish"]
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start()
    monkeypatch.setattr("qmpsnap.ops.mirror.job.HOLD_AFTER", 0)
    await vm.mirror("vda", place / "copy", mode=mode)
    assert await vm.state() == "running"
    await hold_invariants(vm, hashes)
    await vm.stop(force=True)
    assert await content_hash(vm, (await vm.chains())[0].active.id) == now
