"""``QMPSNAP_QEMU`` is a script: the machine's process is the QEMU below it, and no start that fails leaves anything."""

import os
import shutil
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

import qmpsnap
from qmpsnap.errors import HostCannot, QemuGone, StoreMismatch
from qmpsnap.machine import qemu as machines
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.lifecycle import power
from qmpsnap.qmp import session
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.harness.deaths import Call, die_at
from tests.live.machine import MIB, context_of, hold_invariants

SPEC = MachineSpec(name="still", memory=64 * MIB, accel="tcg", disks=(DiskSpec(name="vda", size=MIB),), agent=False)

WORKS = {
    "waits for it": '{qemu} "$@"',
    "ends before it": '{qemu} "$@" &',
    "gives it a session of its own": 'setsid {qemu} "$@" & wait',
    "lets it see other processes than we do": 'unshare --pid --fork --kill-child {qemu} "$@" || {qemu} "$@"',
    "talks": 'echo starting; echo this >&2; {qemu} "$@"; echo ended',
}
FAILS = {
    "a device that is none": ('{qemu} "$@" -device nothing-such', "nothing-such"),
    "another process waits on": ('sleep 600 & {qemu} "$@" -device nothing-such', "did not open the monitor"),
    "no arguments": ("{qemu} -S -display none", "pass all its arguments"),
    "another folder": ('cd / && {qemu} "$@"', "keep its working directory"),
    "lets it fork, which our sandbox forbids": ('{qemu} "$@" -daemonize', "did not start machine"),
    "ends at once": ("echo not today; exit 1", "not today"),
}


@pytest.fixture
def wrapper(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the script."""
    qemu = shutil.which(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64")

    def write(script: str) -> None:
        path = home / "wrapper"
        path.write_text(f"#!/bin/sh\n{script.format(qemu=qemu)}\n")
        path.chmod(0o700)

    write('exec {qemu} "$@"')
    monkeypatch.setenv("QMPSNAP_QEMU", str(home / "wrapper"))
    return write


def left(home: Path) -> list[str]:
    """What runs of the home: by folder, or by what it was told."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if process.status() != "zombie" and (str(home) in line or str(home) in process.cwd()):
                found.append(line)
        except psutil.Error:
            continue
    return found


async def nothing_left(home: Path) -> bool:
    """A shell hears of its QEMU's end a moment later."""
    with anyio.move_on_after(20):
        while left(home):
            await anyio.sleep(0.01)
    return not left(home)


@pytest.mark.parametrize("how", WORKS)
async def test_qemu_below_a_wrapper_is_the_machines_process(home: Path, wrapper: Any, how: str) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        wrapper(WORKS[how])
        process = await vm.start(paused=True)
        assert "-uuid" in psutil.Process(process.pid).cmdline()
        assert psutil.Process(process.pid).name() != "sh"  # but QEMU, or the loader of one that was fetched
        await vm.snapshot("s")
        await vm.stop(force=True)
        assert not psutil.pid_exists(process.pid) or psutil.Process(process.pid).status() == "zombie"
        await vm.commit("vda", consume=True)  # a QEMU without a guest is started by the same wrapper
        await hold_invariants(vm)
    with anyio.fail_after(20):  # the wrapper itself ends a moment after its QEMU
        while left(home):
            await anyio.sleep(0.05)


@pytest.mark.parametrize("how", FAILS)
async def test_nothing_runs_after_a_start_that_failed(
    home: Path, wrapper: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "LAUNCH_DEADLINE", 1.5)
    script, said = FAILS[how]
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        wrapper(script)
        with pytest.raises(QemuGone) as failed:
            await vm.start(paused=True)
        assert said in f"{failed.value.message} {failed.value.hint}"
        assert not await vm.is_running()
    assert await nothing_left(home)


async def test_a_qemu_whose_process_cannot_be_seen_is_refused_as_that(
    home: Path, wrapper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        wrapper(WORKS["waits for it"])
        monkeypatch.setattr(session, "_peer", lambda _: 0)  # the kernel's word for one of another PID namespace
        with pytest.raises(HostCannot, match="another PID namespace"):
            await vm.start(paused=True)
    assert await nothing_left(home)


@pytest.mark.parametrize("fault", ["another file", "no record"])
async def test_nothing_runs_after_a_start_that_was_refused_at_its_end(
    home: Path, wrapper: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        wrapper(WORKS["waits for it"])

        def fail(*_: object, **__: object) -> None:
            raise StoreMismatch("it is not to be")

        if fault == "no record":
            monkeypatch.setattr(SqliteStore, "set_process", fail)
        else:
            monkeypatch.setattr(power, "require_opened", fail)
        with pytest.raises(StoreMismatch):
            await vm.start(paused=True)
        monkeypatch.undo()
        assert context_of(vm).process(await vm.record()) is None
    assert await nothing_left(home)


HAS_NO_PID_FILE_YET = """\
for word do
    shift
    case $word in -pidfile | qemu.pid) ;; *) set -- "$@" "$word" ;; esac
done
exec {qemu} "$@"
"""
"""As every QEMU for the first moment."""


@pytest.mark.parametrize("verb", ["commit", "start"])
async def test_a_qemu_whose_starter_died_before_there_was_a_pid_file_is_ended(
    home: Path, wrapper: Any, verb: str
) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        await vm.snapshot("s")
    wrapper(HAS_NO_PID_FILE_YET)
    words = ["commit", "still", "vda", "--consume"] if verb == "commit" else ["start", "still", "--paused"]
    await die_at(Call("qmpsnap.machine.starting.process", "spawn", "after", 1), *words)
    assert len(left(home)) == 1
    wrapper('exec {qemu} "$@"')
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        if verb == "commit":
            await vm.recover()
        else:
            await vm.start(paused=True)
            assert len(left(home)) == 1
            await vm.stop(force=True)
        assert await nothing_left(home)
        await hold_invariants(vm)
