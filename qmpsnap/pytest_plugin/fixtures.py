"""A controller, and the small guest, of one test alone."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest

try:
    import pytest_asyncio
except ImportError:  # pytest then reports, to tests that use the fixtures, that async fixtures need a plugin
    _decorator: Any = pytest.fixture
else:
    _decorator = pytest_asyncio.fixture

if TYPE_CHECKING:
    from qmpsnap import Controller, MachineHandle

Fixture = TypeVar("Fixture", bound=Callable[..., object])
fixture: Callable[[Fixture], Fixture] = _decorator

BOOT_DEADLINE = 60.0
"""Seconds to wait for the small guest's agent after a start; without KVM a boot takes two or three."""


@fixture
async def qmpsnap_controller() -> "AsyncIterator[Controller]":
    """A controller on an empty home; after the test every machine is stopped and the home removed."""
    import qmpsnap

    require_programs()
    # Not tmp_path: the path of a Unix socket is limited to 107 bytes, and pytest's paths are long.
    with tempfile.TemporaryDirectory(prefix="qmpsnap-") as home:
        cache = cache_folder()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        (Path(home) / "cache").symlink_to(cache)  # reuse the built guest and the probe of QEMU
        async with qmpsnap.open(home) as controller:
            try:
                yield controller
            finally:
                await _stop_all(controller)


@fixture
async def qmpsnap_small_guest(qmpsnap_controller: "Controller") -> "MachineHandle":
    """A machine from ``launch/profiles/guest.yaml``, running, with a guest agent that answers."""
    from qmpsnap.errors import HostCannot
    from qmpsnap.machine.config.launch_dir import build_guest, launch_dir

    try:
        build_guest(cache_folder() / "guest")
    except HostCannot as error:
        give_up(error.message)
    vm = await qmpsnap_controller.define(launch_dir() / "profiles" / "guest.yaml", exist_ok=True)
    await vm.start()
    await vm.run(["true"], timeout=BOOT_DEADLINE)
    return vm


async def _stop_all(controller: "Controller") -> None:
    from qmpsnap.errors import QmpsnapError
    from qmpsnap.machine.starting.process import terminate

    for vm in await controller.machines():
        if process := controller.context.process(await vm.record()):
            with contextlib.suppress(QmpsnapError):  # the machine may still be locked, or its monitor in use
                await vm.stop(force=True)
            terminate(process)


def cache_folder() -> Path:
    """Where the user's small guest is, and what was asked of QEMUs."""
    from qmpsnap.model.home import Home

    return Home.from_environment(os.environ, uid=os.geteuid()).cache


def require_programs() -> None:
    """Skip the test if there is no QEMU."""
    _require(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64", "QMPSNAP_QEMU")
    _require(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img", "QMPSNAP_QEMU_IMG")


def _require(program: str, variable: str) -> None:
    if shutil.which(program) is None:
        give_up(f"{program} is missing: install it, or name it in {variable}")


def give_up(reason: str) -> NoReturn:
    """Skip the test; with ``CI=true`` fail it, because there a skipped test would go unnoticed."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
