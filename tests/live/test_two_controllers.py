"""Two controllers at once, and a QEMU that hangs: one works, the other is told; who only looks never waits."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.machine.starting.run_files import QMP_SOCKET
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.operation import Plan
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.live.machine import MIB, context_of, grown, hold_invariants

# One command line that comes to a halt as it makes its first step durable, until its input ends.
HELD = """
import sys
from qmpsnap.store.sqlite.backend import SqliteStore
real = SqliteStore.mark
def held(*a, **k):
    print("held", flush=True)
    sys.stdin.read()
    return real(*a, **k)
SqliteStore.mark = held
from qmpsnap.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

LOOKS = (["list"], ["snapshot", "list", "still"], ["tree", "still"], ["snapshot", "show", "still", "s1"])
"""Commands that read the store alone."""


def run(*words: str, seconds: float = 60) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "qmpsnap", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False)


@contextmanager
def holding(*words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Another controller, in the middle of this command."""
    argv = [sys.executable, "-c", HELD, *words]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            yield other
        finally:
            other.kill()


async def test_one_works_and_the_other_is_told(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    await q.define(MachineSpec(name="other", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),)))
    with holding("snapshot", "create", "still", "mine") as holder:
        for words in (["snapshot", "create", "still"], ["recover", "still"]):
            refused = run(*words)
            assert refused.returncode == 4, refused
            assert f"'snapshot create' (pid {holder.pid} on {os.uname().nodename}) since 20" in refused.stderr
        for words in LOOKS:
            assert run(*words).returncode == 0, words
        assert run("snapshot", "create", "other", "its-own").returncode == 0
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
        # Nobody has to clean up: the lock went with its holder.
        assert run("snapshot", "create", "still", "next").returncode == 0
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["s1", "next"]
    await hold_invariants(vm)


async def test_the_one_that_was_waited_for_comes_to_its_end(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    with holding("snapshot", "create", "still", "mine") as holder:
        assert run("snapshot", "create", "still").returncode == 4
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait(30) == 0
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["s1", "mine"]
    await hold_invariants(vm)


@pytest.mark.parametrize("how", ["stopped by a signal", "accepts and never greets"])
async def test_a_hung_machine_keeps_nobody_waiting(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setattr(
        "qmpsnap.machine.qemu.monitor.__wrapped__.__kwdefaults__", {"socket": QMP_SOCKET, "deadline": 0.5}
    )
    vm = await grown(q, "s1")
    run_dir = context_of(vm).home.run_dir(vm.name)
    process = context_of(vm).process(await vm.record())
    assert process is not None
    with socket.socket(socket.AF_UNIX) as silent:
        if how == "stopped by a signal":
            os.kill(process.pid, signal.SIGSTOP)
        else:
            (run_dir / QMP_SOCKET).rename(run_dir / "away")
            silent.bind(str(run_dir / QMP_SOCKET))
            silent.listen()
        for words in LOOKS:
            done = run(*words, seconds=30)
            assert (done.returncode, done.stderr) == (0, ""), done
        assert json.loads(run("list", "-o", "json").stdout)["machines"][0]["state"] == "running"
        capsys.readouterr()
        assert await to_thread.run_sync(main, ["show", "still", "-o", "json"]) == 0
        shown = capsys.readouterr()
        document = json.loads(shown.out)
        assert (document["state"], document["pid"], document["snapshots"]) == ("unknown", process.pid, ["s1"])
        assert shown.err == "qmpsnap: the monitor of machine still sent no greeting within 0.5 s\n"
        assert await to_thread.run_sync(main, ["snapshot", "create", "still", "-o", "json"]) == 6
        assert json.loads(capsys.readouterr().err)["effect"] == "none"
        if how != "stopped by a signal":
            (run_dir / QMP_SOCKET).unlink()
            (run_dir / "away").rename(run_dir / QMP_SOCKET)
    os.kill(process.pid, signal.SIGCONT)
    await hold_invariants(vm)


async def test_one_program_gives_each_machine_a_number_at_once(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all plan at the same time, with the same number, one is opened and the others plan again, each time."""
    monkeypatch.setattr("qmpsnap.ops.session.session._TURN", 60.0)
    real, opened = SqliteStore.open_operation, []

    def counted(store: SqliteStore, plan: Plan, *arguments: Any, **named: Any) -> Any:
        opened.append(plan.machine)
        return real(store, plan, *arguments, **named)

    names = [f"m{number}" for number in range(6)]
    vms = [
        await q.define(MachineSpec(name=name, memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),)))
        for name in names
    ]
    monkeypatch.setattr(SqliteStore, "open_operation", counted)
    async with anyio.create_task_group() as group:
        for vm in vms:
            group.start_soon(vm.add_layers)
    assert sorted(opened) == names
    for vm in vms:
        await hold_invariants(vm)


async def test_a_plan_that_takes_too_long_holds_no_other_up(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpsnap.ops.session.session._TURN", 0.01)
    vm = await grown(q, "s1")

    async def hang(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with context_of(vm).planning:
            task_status.started()
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        await group.start(hang)
        await vm.snapshot("s2")
        group.cancel_scope.cancel()
    await hold_invariants(vm)
