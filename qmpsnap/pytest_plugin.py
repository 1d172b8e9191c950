"""Fixtures for test suites that need machines: whatever a test starts is ended, and its files go, however it ends.

``qmpsnap_controller`` is a :class:`qmpsnap.Controller` with a home of its own, ``qmpsnap_small_guest`` a booted Linux
whose agent answers. pytest loads this module in every run of an environment that has qmpsnap, so all that is slow
(asyncio, qemu.qmp) is imported inside the fixtures.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pytest

try:
    import pytest_asyncio
except ImportError:  # then pytest itself says what async fixtures need, to those who use them
    _decorator: Any = pytest.fixture
else:
    _decorator = pytest_asyncio.fixture

if TYPE_CHECKING:
    from qmpsnap import Controller, MachineHandle

Fixture = TypeVar("Fixture", bound=Callable[..., object])
fixture: Callable[[Fixture], Fixture] = _decorator

BOOT_DEADLINE = 60.0
"""Seconds the small guest may take until its agent answers; without KVM it needs two or three."""


@fixture
async def qmpsnap_controller() -> "AsyncIterator[Controller]":
    """A controller on an empty home in a short temporary folder; at the end every machine is stopped and removed."""
    import qmpsnap

    _require(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64", "QMPSNAP_QEMU")
    _require(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img", "QMPSNAP_QEMU_IMG")
    # Not pytest's tmp_path: a socket's path has 107 bytes at most, and tests like to connect to sockets.
    with tempfile.TemporaryDirectory(prefix="qmpsnap-") as home:
        cache = _cache()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        (Path(home) / "cache").symlink_to(cache)  # the small guest and what QEMU can do need not be found out again
        async with qmpsnap.open(home) as controller:
            try:
                yield controller
            finally:
                await _stop_all(controller)


@fixture
async def qmpsnap_small_guest(qmpsnap_controller: "Controller") -> "MachineHandle":
    """The small guest (``launch/profiles/guest.yaml``), running and with an agent that answers."""
    from qmpsnap.machine.config.launch_dir import launch_dir

    launch = launch_dir()
    built = subprocess.run(  # noqa: ASYNC221 - nothing else runs in this loop yet
        [launch / "guest" / "build", _cache() / "guest"], check=False, capture_output=True, stdin=subprocess.DEVNULL
    )
    if built.returncode:
        _give_up(f"the small guest could not be built: {built.stderr.decode(errors='replace').strip()}")
    vm = await qmpsnap_controller.start(launch / "profiles" / "guest.yaml")
    await vm.run(["true"], deadline=BOOT_DEADLINE)
    return vm


async def _stop_all(controller: "Controller") -> None:
    from qmpsnap.errors import QmpsnapError
    from qmpsnap.machine.starting.process import terminate

    for vm in await controller.machines():
        if process := controller.context.process(await vm.record()):
            with contextlib.suppress(QmpsnapError):  # a test may have left the machine locked or its monitor taken
                await vm.stop(force=True)
            terminate(process)


def _cache() -> Path:
    from qmpsnap.model.home import Home

    return Home.from_environment(os.environ, uid=os.geteuid()).cache


def _require(program: str, variable: str) -> None:
    if shutil.which(program) is None:
        _give_up(f"{program} is missing: install it, or name it in {variable}")


def _give_up(reason: str) -> NoReturn:
    """Skip; in CI fail, for there a test that never runs looks like one that passes."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
