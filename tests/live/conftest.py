"""Fixtures for tests on a real QEMU: which one it is, is told by QMPSNAP_QEMU; every process is ended with its test."""

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

import qmpsnap
from qmpsnap.model.home import Home
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.qmp import jobs
from tests.live.machine import MIB
from tests.volumes import guest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/live/" in str(item.path):
            item.add_marker(pytest.mark.live)


def _require(program: str, remedy: str) -> None:
    if shutil.which(program):
        return
    if os.environ.get("CI"):
        pytest.fail(f"{program} is missing, and in CI a live test does not skip: {remedy}")
    pytest.skip(f"{program} is missing: {remedy}")


@pytest.fixture(scope="session")
def small_guest() -> Path:
    """Kernel and initrd of the small guest, as scripts/setup has built them."""
    folder = Home.from_environment(os.environ, uid=os.geteuid()).guest
    if not (folder / "initrd").is_file():
        message = "the small guest is not built: scripts/setup does it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def debian() -> Path:
    """Kernel, initrd and file system (``root.raw``) of a small Debian, which the first that asks builds."""
    _require("mmdebstrap", "scripts/setup installs it")
    return guest.image()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A QMPSNAP_HOME of the test's own; whatever QEMU is left in it is killed, and it must be none that ended well."""
    _require(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64", "scripts/setup installs it")
    _require(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img", "scripts/setup installs it")
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    monkeypatch.setenv("QMPSNAP_HOME", str(folder))
    monkeypatch.setenv("QMPSNAP_TEMPLATES", str(folder / "templates"))
    try:
        yield folder
    finally:
        _kill_all_below(folder)
        shutil.rmtree(folder)


def _kill_all_below(folder: Path) -> None:
    """End every process that works in the folder, as QEMU does, or is told of it where that was unmounted under it."""
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) or any(f"{folder}/" in word for word in process.cmdline()):
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait(10)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.fixture
def place(home: Path) -> Path:
    """An empty folder where users keep images of their own."""
    folder = home / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def slow_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits and streams that are not over before the test hears of them; cancelling takes no longer."""
    monkeypatch.setitem(jobs._COMMON, "speed", 64 << 10)


@pytest.fixture
async def q(home: Path) -> AsyncIterator[qmpsnap.Controller]:
    """A controller on the test's own home."""
    async with qmpsnap.open() as controller:
        yield controller


@pytest.fixture
def guest_spec(small_guest: Path) -> MachineSpec:
    """A machine that boots the small guest, with two disks of 64 MiB."""
    return MachineSpec(
        name="guest",
        kernel=str(small_guest / "vmlinux"),
        initrd=str(small_guest / "initrd"),
        append="console=ttyS0 quiet panic=-1",
        memory=256 * MIB,
        disks=(DiskSpec(name="vda", size=64 * MIB), DiskSpec(name="vdb", size=64 * MIB)),
    )


@pytest.fixture
def still_spec() -> MachineSpec:
    """A machine that is only ever started with -S: its disks are written to through the monitor."""
    return MachineSpec(
        name="still",
        memory=64 * MIB,
        disks=(DiskSpec(name="vda", size=16 * MIB), DiskSpec(name="vdb", size=16 * MIB, format="raw")),
    )
