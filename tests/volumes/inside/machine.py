"""In the guest: machines on logical volumes, and what cases ask of them."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from qemu.qmp import QMPClient

import qmpsnap
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec

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
    """A volume of zeros, as far as a case looks."""
    path = f"/dev/{GROUP}/{lv}"
    if thin:
        tool("lvcreate", "-y", "-V", f"{size}M", "--thinpool", f"{GROUP}/{POOL}", "-n", lv)
    else:
        tool("lvcreate", "-y", "-L", f"{size}M", "-n", lv, GROUP)
        tool("dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=10", "conv=fsync")
    return path


def of(path: str, name: str = "web") -> MachineSpec:
    return MachineSpec(name=name, memory=32 * MIB, disks=(DiskSpec(name="vda", device=path),), agent=False)


async def fill(vm: qmpsnap.MachineHandle, number: int) -> None:
    """A MiB of that byte, in the MiB of that number; it has reached the volume afterwards, and takes room there."""
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
    os.sync()


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
