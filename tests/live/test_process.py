"""QEMU outlives whoever started it, is found again, and its end is noticed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import psutil
import pytest

import qmpsnap
from qmpsnap.errors import DeadlinePassed, QemuGone, StateError
from qmpsnap.machine.config.launch_dir import launch_dir
from qmpsnap.machine.starting.run_files import QMP_SOCKET
from qmpsnap.model.machines.spec import MachineSpec
from tests.harness.processes import kill_qemu
from tests.live.machine import MIB, context_of, hold_invariants, user_monitor

pytestmark = pytest.mark.version


async def test_qemu_outlives_the_process_that_started_it(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    done = await anyio.run_process(
        [sys.executable, "-m", "qmpsnap", "start", vm.name, "--paused"], check=False, stderr=subprocess.PIPE
    )
    assert done.returncode == 0, done.stderr
    assert await vm.is_running()
    assert await vm.state() in ("paused", "prelaunch")
    await vm.snapshot("taken-by-another-process")
    await hold_invariants(vm)


async def test_a_qemu_whose_starter_died_before_recording_it_is_found(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm = await q.define(still_spec)
    process = await vm.start(paused=True)
    context_of(vm).store.set_process(vm.name, None)  # as if the starter had died right after exec
    assert context_of(vm).process(await vm.record()) is not None
    with pytest.raises(StateError, match="runs already"):
        await vm.start()
    await vm.snapshot("s")
    await hold_invariants(vm)
    await vm.stop(force=True)
    assert not psutil.pid_exists(process.pid)


async def test_what_qemu_wrote_is_in_the_error(q: qmpsnap.Controller) -> None:
    spec = MachineSpec(name="bad", memory=64 * MIB, extra=("-device", "no-such-device"))
    vm = await q.define(spec, allow_extra=True)
    with pytest.raises(QemuGone, match="no-such-device") as failure:
        await vm.start()
    assert failure.value.exit_code == 5
    assert not await vm.is_running()


async def test_a_killed_qemu_is_noticed_and_the_machine_starts_again(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    kill_qemu(vm)
    assert not await vm.is_running()
    assert await vm.state() == "stopped"
    await vm.snapshot("while-down")
    await vm.start(paused=True)
    await hold_invariants(vm)


async def test_a_silent_monitor_ends_in_a_deadline_and_never_blocks_list(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qmpsnap.machine.qemu.monitor.__wrapped__.__kwdefaults__", {"socket": QMP_SOCKET, "deadline": 0.5}
    )
    vm = await q.define(still_spec)
    process = await vm.start(paused=True)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DeadlinePassed) as failure:
        await vm.snapshot("s")
    assert failure.value.exit_code == 6
    assert failure.value.effect == "none"
    with anyio.fail_after(20):
        listed = await anyio.run_process([sys.executable, "-m", "qmpsnap", "list", "-o", "name"])
    assert listed.stdout == b"still\n"
    os.kill(process.pid, signal.SIGCONT)
    assert await vm.snapshots() == ()
    await hold_invariants(vm)
    os.kill(process.pid, signal.SIGSTOP)
    await vm.stop(force=True)  # a QEMU that does not answer is killed
    assert not await vm.is_running()


async def test_a_second_client_has_its_own_monitor(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    async with user_monitor(vm):
        await vm.snapshot("while-the-user-looks-on")
    await hold_invariants(vm)


@pytest.mark.parametrize("profile", ["guest", "multi-disk", "microvm", "q35-uefi"])
async def test_every_profile_starts(q: qmpsnap.Controller, home: Path, small_guest: Path, profile: str) -> None:
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache/guest").symlink_to(small_guest)
    vm = await q.define(launch_dir() / "profiles" / f"{profile}.yaml")
    await vm.start(paused=True)
    await vm.snapshot("s")
    await hold_invariants(vm)
    await vm.stop(force=True)


async def test_a_long_home_is_no_obstacle(tmp_path: Path, still_spec: MachineSpec, home: Path) -> None:
    deep = home / ("d" * 60) / ("e" * 60)
    async with qmpsnap.open(deep) as controller:
        vm = await controller.define(still_spec)
        await vm.start(paused=True)
        await vm.snapshot("s")
        await vm.stop(force=True)
