"""A TPM by swtpm: it lives as long as its QEMU, and its state goes along with snapshots and reverts."""

import os
import shutil
import signal
from pathlib import Path

import anyio
import psutil
import pytest

import qmpsnap
from qmpsnap.errors import QmpsnapError, StateError
from qmpsnap.machine.config import firmware_files
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.lifecycle import bundle as bundles
from qmpsnap.ops.rebuild import rebuild
from tests.harness.deaths import Call, die_at
from tests.live.machine import MIB, context_of, hold_invariants
from tests.live.test_rebuild import at, lose
from tests.live.test_run_as import USER, as_nobody

__all__ = ["as_nobody"]

pytestmark = pytest.mark.version
SPEC = MachineSpec(
    name="still", memory=256 * MIB, firmware="uefi", tpm=True, disks=(DiskSpec(name="vda", size=2 * MIB),)
)


@pytest.fixture(autouse=True)
def _swtpm() -> None:
    if not shutil.which("swtpm") and not os.environ.get("CI"):
        pytest.skip("swtpm is missing: scripts/setup test installs it")


def state_file(vm: qmpsnap.MachineHandle) -> Path:
    found = firmware_files.tpm_state(context_of(vm).home.variables(vm.name))
    assert found
    return found


def put(vm: qmpsnap.MachineHandle, mark: bytes) -> None:
    """As if swtpm had written it."""
    state_file(vm).parent.mkdir(mode=0o700, exist_ok=True)
    state_file(vm).write_bytes(mark)


def mark(vm: qmpsnap.MachineHandle) -> bytes:
    return state_file(vm).read_bytes()


def mark_in(variables: str | None) -> bytes:
    assert variables
    copy = firmware_files.tpm_state(variables)
    assert copy
    return copy.read_bytes()


def copies(vm: qmpsnap.MachineHandle) -> set[str]:
    return {str(path) for path in context_of(vm).home.machine_dir(vm.name).glob("vars-*")}


async def listed(vm: qmpsnap.MachineHandle) -> set[str]:
    kept = [snapshot.variables for snapshot in await vm.snapshots() if snapshot.variables]
    return {path for variables in kept for path in firmware_files.copies(variables)}


async def stopped_with_a_snapshot(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    """Snapshot ``s`` holds the state ``1``; by now the TPM has ``2``."""
    vm = await q.define(SPEC)
    put(vm, b"1")
    await vm.snapshot("s", kind="internal")
    put(vm, b"2")
    return vm


def emulators(home: Path) -> list[psutil.Process]:
    """What runs of them in that home: each has its folder open."""
    found = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "swtpm" and process.status() != psutil.STATUS_ZOMBIE:
            descriptors = Path(f"/proc/{process.pid}/fd").iterdir()
            found += [process] if any(str(each.resolve()).startswith(f"{home}/") for each in descriptors) else []
    return found


async def begin(vm: qmpsnap.MachineHandle) -> bytes:
    """Start it, and wait until the firmware, which uses the TPM first, looks for something to boot; its state then."""
    log = context_of(vm).home.log_dir(vm.name) / CONSOLE_LOG
    before = log.stat().st_size if log.exists() else 0
    await vm.start()
    with anyio.fail_after(120):
        while b"BdsDxe" not in log.read_bytes()[before:]:
            await anyio.sleep(0.1)
    return mark(vm)


async def gone(home: Path) -> None:
    with anyio.fail_after(20):
        while emulators(home):
            await anyio.sleep(0.02)


async def test_it_lives_as_long_as_its_qemu(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(SPEC)
    assert mark_in((await vm.snapshot("fresh")).variables) == b""
    await vm.start(paused=True)
    (emulator,) = emulators(home)
    assert "--seccomp action=kill" in " ".join(emulator.cmdline())
    first = mark(vm)
    assert first
    await hold_invariants(vm)
    await vm.stop(force=True)
    await gone(home)
    assert mark(vm) == first
    await vm.revert("fresh", discard=True)
    assert not state_file(vm).exists(), "nobody had used it then"
    await vm.start(paused=True)
    assert mark(vm) != first, "another TPM, with other keys"
    await vm.stop(force=True)
    await vm.undefine(disks="remove")
    assert not context_of(vm).home.machine_dir("still").exists()


async def test_a_revert_is_undone_by_another(q: qmpsnap.Controller, home: Path) -> None:
    vm = await stopped_with_a_snapshot(q)
    kept = (await vm.revert("s")).kept
    assert kept is not None
    assert (mark_in(kept.variables), mark(vm)) == (b"2", b"1")
    await hold_invariants(vm)
    await vm.revert(kept.name)
    assert (mark(vm), copies(vm)) == (b"2", await listed(vm))
    await vm.revert("s")
    put(vm, b"3")  # nothing on the disk, but in the TPM
    again = (await vm.revert("s")).kept
    assert again is not None
    assert mark_in(again.variables) == b"3"

    bundle, context = home / "moved.bundle", context_of(vm)
    held = {snapshot.name: mark_in(snapshot.variables) for snapshot in await vm.snapshots()}
    await bundles.export(context, "still", bundle)
    await vm.undefine(disks="remove")
    await bundles.unpack(context, bundle, name=None, allow_extra=False)
    vm = await q.machine("still")
    assert {snapshot.name: mark_in(snapshot.variables) for snapshot in await vm.snapshots()} == held
    assert mark(vm) == b"1"
    await hold_invariants(vm)


async def test_a_copy_that_is_gone_is_found(q: qmpsnap.Controller) -> None:
    vm = await stopped_with_a_snapshot(q)
    (snapshot,) = await vm.snapshots()
    assert snapshot.variables
    copy = firmware_files.tpm_state(snapshot.variables)
    assert copy
    copy.unlink()
    assert [(found.code, found.file) for found in (await vm.check()).findings] == [("variables-missing", str(copy))]
    with pytest.raises(QmpsnapError, match="does not exist"):
        await vm.revert("s")
    assert mark(vm) == b"2"


async def test_memory_brings_its_own_along(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(SPEC)
    first = await begin(vm)
    await vm.snapshot("all", kind="full")
    await vm.snapshot("inside", kind="internal")
    await vm.stop(force=True)
    await gone(home)
    state_file(vm).unlink()
    await vm.start(paused=True)
    second = mark(vm)
    assert second != first
    await vm.stop(force=True)
    kept = (await vm.revert("all")).kept
    assert kept is not None
    assert (mark_in(kept.variables), mark(vm)) == (second, first)
    assert await vm.state() == "running"
    await vm.revert(kept.name)
    assert mark(vm) == second
    await vm.revert("inside")
    assert mark(vm) == first
    await vm.save()
    await gone(home)
    await vm.restore()
    assert mark(vm) == first
    await hold_invariants(vm)
    with pytest.raises(StateError, match="has a TPM"):
        await vm.fork("all")


async def test_one_that_has_ended_is_told(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(SPEC)
    await vm.start()
    (emulator,) = emulators(home)
    emulator.send_signal(signal.SIGKILL)
    await gone(home)
    assert [found.code for found in (await vm.check()).findings] == ["tpm-ended"]
    for kind in ("full", "internal"):
        with pytest.raises(StateError, match="its emulator, swtpm, has ended"):
            await vm.snapshot("no", kind=kind)
    assert await vm.state() == "running"
    await vm.snapshot("disks")
    await vm.stop(force=True)
    await vm.start(paused=True)
    await hold_invariants(vm)


@pytest.mark.parametrize("how", ["missing", "damaged"])
async def test_one_that_does_not_start(
    q: qmpsnap.Controller, home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    vm = await q.define(SPEC)
    with monkeypatch.context() as patched:
        if how == "missing":
            real = shutil.which
            patched.setattr(shutil, "which", lambda name, **more: None if name == "swtpm" else real(name, **more))
        else:
            put(vm, b"no state of a TPM")
        with pytest.raises(QmpsnapError, match=r"no swtpm|tpm-emulator"):
            await vm.start()
    assert await vm.state() == "stopped"
    await gone(home)
    state_file(vm).unlink(missing_ok=True)
    await vm.start(paused=True)


async def test_a_death_before_qemu_is_there_leaves_none(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(SPEC)
    launch = Call("qmpsnap.ops.lifecycle.power", "launch", "before", 1)
    await die_at(launch, "start", "still")
    assert len(emulators(home)) == 1, "it waits for its QEMU, which nobody has started"
    assert [found.code for found in (await vm.check()).findings] == ["worker-left"]
    await vm.recover()
    assert not emulators(home)
    await die_at(launch, "start", "still")
    await vm.start(paused=True)
    assert len(emulators(home)) == 1
    await hold_invariants(vm)


COPY = ("qmpsnap.machine.config.firmware_files", "replace_durably")


@pytest.mark.parametrize("count", range(1, 5))
async def test_killed_while_it_is_replaced(q: qmpsnap.Controller, count: int) -> None:
    """The state is copied, then the variables; both are replaced in the same order."""
    vm = await stopped_with_a_snapshot(q)
    await die_at(Call(*COPY, "before", count), "snapshot", "revert", "still", "s")
    await vm.recover()
    assert await vm.recover() == []
    kept = (await vm.snapshots())[-1]
    assert (mark_in(kept.variables), mark(vm)) == (b"2", b"1")
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)


async def test_it_is_found_again_by_a_rebuilt_store(home: Path) -> None:
    async with qmpsnap.open() as q:
        await stopped_with_a_snapshot(q)
    lose(home)
    assert (await rebuild.run(at(home), set_aside=False)).left_out == ()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert [mark_in(snapshot.variables) for snapshot in await vm.snapshots()] == [b"1"]
        assert mark(vm) == b"2"
        await hold_invariants(vm)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run QEMU as another user")
async def test_it_is_the_user_s_of_its_qemu(as_nobody: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        await vm.snapshot("fresh")
        first = await begin(vm)
        (emulator,) = emulators(as_nobody)
        assert emulator.username() == USER
        await vm.snapshot("s", kind="full")
        await vm.stop(force=True)
        await vm.revert("fresh", discard=True)
        await vm.revert("s")
        assert mark(vm) == first
        await hold_invariants(vm)
