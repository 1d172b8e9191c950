"""A mirror whose target fails, fills up or is too slow for its guest; the chain and the guest never suffer for it."""

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import content
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot, OperationPending
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.ops.mirror.mirror import Mode
from qmpsnap.qmp import jobs
from qmpsnap.qmp.commands import JobInfo
from tests.live.machine import MIB, active_hash, context_of, grown_and_stopped, hold_invariants
from tests.live.test_mirror import SIZE, file_hash, make_image

pytestmark = pytest.mark.version

MIDDLE = 2 * MIB
"""Bytes after which a server dies: these disks hold 3 MiB."""


@contextmanager
def served(image: Path, socket: Path, *, rate: int | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """The image as NBD export ``disk``; ``rate``: bytes per second that the server takes."""
    socket.unlink(missing_ok=True)
    what = ["-f", "qcow2", str(image)]
    if rate:
        opened = (
            f"driver=throttle,throttle-group=slow,file.driver=qcow2,file.file.driver=file,file.file.filename={image}"
        )
        what = ["--object", f"throttle-group,id=slow,x-bps-write={rate}", "--image-opts", opened]
    argv = ["qemu-nbd", "--persistent", "-x", "disk", "-k", str(socket), "--discard=unmap", *what]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(400):
                if socket.exists() or server.poll() is not None:
                    break
                subprocess.run(["sleep", "0.05"], check=True)
            assert socket.exists()
            yield server
        finally:
            server.kill()


@asynccontextmanager
async def dying(path: Path, behind: Path) -> AsyncIterator[None]:
    """A server at ``path`` that passes everything on to the one behind, and is gone once MIDDLE bytes came."""
    came = 0
    writers: list[asyncio.StreamWriter] = []

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool) -> None:
        nonlocal came
        with contextlib.suppress(OSError):
            while came <= MIDDLE and (data := await reader.read(1 << 16)):
                came += len(data) if counted else 0
                writer.write(data)
        writer.close()
        if came > MIDDLE:
            server.close()
            path.unlink(missing_ok=True)
            for each in writers:
                each.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(behind)
        writers.extend((writer, far_writer))
        async with anyio.create_task_group() as group:
            group.start_soon(partial(passed_on, reader, far_writer, counted=True))
            group.start_soon(partial(passed_on, far_reader, writer, counted=False))

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield
    assert came > MIDDLE


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_the_server_of_the_target_dies_in_the_middle(q: qmpsnap.Controller, place: Path, state: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    if state == "running":
        await vm.start()
    far, uri = place / "far", f"nbd+unix:///disk?socket={place / 's'}"
    make_image(vm, far)
    told: list[JobInfo] = []
    with served(far, place / "behind"):
        async with dying(place / "s", place / "behind"):
            with pytest.raises(HostCannot, match="a write failed; the chain is unchanged") as lost:
                await vm.mirror("vda", uri, mode="finish", report=told.append)
    assert told[-1].current_progress < told[-1].total_progress
    if state == "running":
        assert lost.value.effect == "unknown"
        assert "qmpsnap job wait still" in as_typed(lost.value.hint)
        assert "qmpsnap job cancel still" in as_typed(lost.value.hint)
        assert await vm.state() == "running"
        with pytest.raises(OperationPending, match="paused"):
            await vm.snapshot("no")
        with pytest.raises(HostCannot, match="a write failed") as still:
            await vm.wait()
        assert "qmpsnap job cancel still" in as_typed(still.value.hint)
        await vm.cancel()
        assert await vm.state() == "running"
    else:
        assert lost.value.effect == "none"
        assert "job" not in as_typed(lost.value.hint)
    assert context_of(vm).store.operations("still", only_open=True) == ()
    assert (await vm.chains())[0].ids == ("vda-1", "vda-2", "vda-3")
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now
    with served(far, place / "s"):
        await vm.mirror("vda", uri, mode="finish")
    assert await file_hash(vm, far) == now
    await hold_invariants(vm, hashes)


@contextmanager
def small(place: Path, *, size: int) -> Iterator[Path]:
    """A file system of that many bytes."""
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    folder = place / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("then", ["goes on", "is cancelled"])
@pytest.mark.parametrize("mode", ["pivot", "finish"])
async def test_a_full_disk_pauses_the_copy(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, then: str
) -> None:
    """The space that was there when we looked is gone when the job writes."""
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start()
    monkeypatch.setattr("qmpsnap.ops.base.free_space.require", lambda *_, **__: None)
    with small(place, size=8 * MIB) as folder:
        (folder / "filler").write_bytes(bytes(6 * MIB))
        target = folder / "copy"
        with pytest.raises(
            HostCannot, match="no space is left; the chain is unchanged and the guest keeps running"
        ) as full:
            await vm.mirror("vda", target, mode=mode)
        assert full.value.effect == "unknown"
        assert "qmpsnap job wait still" in as_typed(full.value.hint)
        assert [job.status for job in await vm.jobs()] == ["paused"]
        assert await vm.state() == "running"
        with pytest.raises(HostCannot, match="no space is left"):
            await vm.wait()
        if then == "goes on":
            (folder / "filler").unlink()
            await vm.wait()
            assert (await vm.chains())[0].active.path == (str(target) if mode == "pivot" else vda_3(vm))
            assert mode == "pivot" or await file_hash(vm, moved(target, place / "copy")) == now
        else:
            await vm.cancel()
            assert [file.name for file in folder.iterdir()] == ["filler"]
            assert (await vm.chains())[0].active.path == vda_3(vm)
        await hold_invariants(vm, hashes)
        assert await active_hash(vm) == now
        await vm.stop(force=True)


async def test_a_full_disk_ends_the_copy_of_a_stopped_machine(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    monkeypatch.setattr("qmpsnap.ops.base.free_space.require", lambda *_, **__: None)
    with small(place, size=2 * MIB) as folder:
        with pytest.raises(HostCannot, match="no space is left; the chain is unchanged") as full:
            await vm.mirror("vda", folder / "copy", mode="pivot")
        assert full.value.effect == "none"
        assert "guest" not in full.value.message
        assert "job" not in as_typed(full.value.hint)
        assert list(folder.iterdir()) == []
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now


def vda_3(vm: qmpsnap.MachineHandle) -> str:
    return context_of(vm).store.layer(LayerId("vda-3")).path


def moved(path: Path, to: Path) -> Path:
    """The file where there is room to look at it."""
    shutil.copy(path, to)
    return to


NUMBERED = """
i=0
while :; do
    i=$((i+1)); yes $i | head -c 1048576 > /tmp/pass
    for block in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        dd if=/tmp/pass of=/dev/vda bs=1M seek=$block oflag=direct conv=notrunc 2>/dev/null; test -e /tmp/stop && exit
    done
    test $i = 1 && touch /tmp/written
done
"""
"""A guest that writes its disk from end to end without rest, the number of the pass into every block."""


async def test_a_guest_outruns_the_copy(
    q: qmpsnap.Controller, guest_spec: MachineSpec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writes are made to wait, where QEMU can; else it is said. The copy is of one moment all the same."""
    monkeypatch.setattr("qmpsnap.qmp.jobs.follow_mirror", partial(jobs.follow_mirror, patience=1))
    vm = await q.define(replace(guest_spec, disks=(DiskSpec(name="vda", size=SIZE),)))
    await vm.start()
    await vm.run(f"({NUMBERED}) >/dev/null 2>&1 & while ! test -e /tmp/written; do sleep 0.1; done")
    far = place / "far"
    make_image(vm, far)
    told: list[str] = []

    async with anyio.create_task_group() as group:

        def report(info: JobInfo) -> None:
            if info.status == "outrun" and "outrun" not in told:
                group.start_soon(vm.run, "touch /tmp/stop")
            told.append(info.status)

        with served(far, place / "s", rate=4 * MIB):
            uri = f"nbd+unix:///disk?socket={place / 's'}"
            await vm.mirror("vda", uri, mode="finish", report=report)
    assert told[-1] == "concluded"
    assert ("blocking" in told) != ("outrun" in told)
    process = (await vm.record()).process
    assert process
    assert ("outrun" in told) == (version(process.qemu_version) < (8, 2))
    if "blocking" in told:
        await vm.run("test ! -e /tmp/stop")  # it still writes
    await hold_invariants(vm)
    await vm.stop(force=True)
    assert await vm.state() == "stopped"
    raw = place / "raw"
    layer = Layer(id=LayerId("copy-0"), path=str(far), format="qcow2", backing=None, virtual_size=SIZE)
    await content.copy_out(layer, raw, qemu_img=context_of(vm).image.binary)
    held = raw.read_bytes()
    passes = [int(held[at * MIB : at * MIB + 16].split()[0]) for at in range(SIZE // MIB)]
    assert all(new >= old for new, old in itertools.pairwise(passes)), passes
    assert passes[0] - passes[-1] <= 1, passes


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
