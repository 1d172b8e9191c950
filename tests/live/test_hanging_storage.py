"""Images on storage that hangs: every command ends and says what hangs, and nothing is lost when it answers again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import LockHeld, OperationPending, StorageHangs
from qmpsnap.host import outstanding, storage_wait
from tests.harness import hanging
from tests.harness.hanging import Storage
from tests.live.machine import ONE_DISK, context_of, fill

COMMAND = str(Path(sys.executable).with_name("qmpsnap"))
WAIT = 60.0
"""Seconds in which a command has to end here; the storage does not answer for longer."""


@pytest.fixture(scope="module")
def mount() -> Iterator[Storage]:
    if reason := hanging.lacking():
        pytest.skip(reason)
    with hanging.mounted() as storage:
        yield storage


@pytest.fixture
async def vm(mount: Storage, home: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[qmpsnap.MachineHandle]:
    """A paused machine whose images, but not whose store, lie on that storage."""
    monkeypatch.setenv(storage_wait.DEADLINE, "2")
    machines = mount.path / home.name
    machines.mkdir()
    (home / "machines").symlink_to(machines)
    async with qmpsnap.open(home) as q:
        vm = await q.define(ONE_DISK)
        await vm.start(paused=True)
        yield vm
        mount.answer()
    for _ in range(500):
        if not outstanding.left():
            break
        await anyio.sleep(0.02)


@pytest.fixture(autouse=True)
def clean(mount: Storage) -> Iterator[None]:
    yield
    for entry in mount.path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def started(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [COMMAND, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


async def ended(command: "subprocess.Popen[str]", *, seconds: float = WAIT) -> str:
    """What a command has said until its end, that of its output as well."""
    try:
        said, _ = await to_thread.run_sync(lambda: command.communicate(timeout=seconds))
    except BaseException:
        command.kill()
        raise
    return said


VERBS = [
    (6, "open read", "check", "still"),
    (6, "getattr", "check", "still"),
    (6, "open read", "snapshot", "create", "still", "one"),
    (6, "create", "snapshot", "create", "still", "one"),
    (6, "fsync", "snapshot", "create", "still", "one"),
    (6, "getattr", "chain", "still"),
    (0, "all", "list"),
    (0, "all", "show", "still"),
    (6, "all", "pause", "still"),
    (0, "all", "snapshot", "list", "still"),
]


@pytest.mark.parametrize(("code", "operations", "words"), [(code, hangs, words) for code, hangs, *words in VERBS])
async def test_every_verb_ends_and_says_what_hangs(
    vm: qmpsnap.MachineHandle, mount: Storage, code: int, operations: str, words: list[str]
) -> None:
    with mount.hang(operations):
        command = started(*words)
        said = await ended(command)
        assert command.returncode == code, said
        assert code == 0 or f"{mount.path} (fuse)" in said, said
    await usable(vm)


async def usable(vm: qmpsnap.MachineHandle) -> None:
    """The machine can be worked on, and nothing is wrong with it."""
    with anyio.fail_after(WAIT):
        while True:
            try:
                await vm.recover()
                break
            except (OperationPending, LockHeld):  # it was held while that process was ending
                await anyio.sleep(0.05)
    await vm.snapshot("afterwards")
    assert not (await vm.check()).findings
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["afterwards"]


@pytest.mark.parametrize("operations", ["", "open read write"])
async def test_stop_force_needs_no_image(vm: qmpsnap.MachineHandle, mount: Storage, operations: str) -> None:
    with mount.hang(operations or "open"):
        command = started("stop", "still", "--force")
        said = await ended(command)
        assert (command.returncode, said) == (0, "machine still is stopped\n")


async def test_a_qemu_that_its_storage_keeps_is_named(vm: qmpsnap.MachineHandle, mount: Storage) -> None:
    with mount.hang("write"):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ignoring, fill(vm, "vda", 0x11))
            process = (await vm.record()).process
            assert process
            pid = process.pid
            with anyio.fail_after(WAIT):
                while not storage_wait.waits_of(pid):
                    await anyio.sleep(0.05)
            command = started("stop", "still", "--force")
            said = await ended(command)
            tasks.cancel_scope.cancel()
        assert command.returncode == 6, said
        assert f"(process {pid}) does not end: " in said, said
        assert "vda-1.qcow2 is not answered" in said, said
        assert await vm.is_running()


async def ignoring(work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(Exception):
        await work


async def test_a_second_ctrl_c_ends_at_once_and_tells_what_is_left(vm: qmpsnap.MachineHandle, mount: Storage) -> None:
    os.environ[storage_wait.DEADLINE] = "3600"
    with mount.hang("fsync"):
        command = started("snapshot", "create", "still", "one")
        await until_stuck(command.pid, call="sync")  # other requests before the operation begins are answered
        command.send_signal(signal.SIGINT)
        await anyio.sleep(1)
        if command.poll() is None:
            command.send_signal(signal.SIGINT)
        said = await ended(command, seconds=20)
    assert command.returncode == 130
    assert "operation 2 (create) is open" in said, said
    await usable(vm)


async def until_stuck(process: int, place: str = "qs-hang", *, call: str = "") -> None:
    """Until a process below this one waits for that storage."""
    with anyio.fail_after(WAIT):
        while True:
            waits = filter(None, map(storage_wait.waits_of, below(process)))
            if any(place in wait.path and call in wait.call for wait in waits):
                return
            await anyio.sleep(0.05)


def below(process: int) -> list[int]:
    found = [process]
    for pid in found:
        for thread in storage_wait.threads(pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


async def test_a_library_call_keeps_the_lock_until_the_thread_is_back(
    vm: qmpsnap.MachineHandle, mount: Storage
) -> None:
    with mount.hang("unlink fsync"):
        with pytest.raises(StorageHangs) as caught:
            await vm.snapshot("one")
        assert (caught.value.exit_code, caught.value.effect) == (6, "unknown")
        with pytest.raises(OperationPending) as refused:
            await vm.snapshot("two")
        assert refused.value.exit_code == 8
        command = started("snapshot", "create", "still", "three")
        assert "is stuck" in await ended(command)
        assert command.returncode == 8
        assert [found.state for found in context_of(vm).store.operations("still")][-1] == "planned"
    await usable(vm)


CREATE = ("snapshot", "create", "still", "one")
AT = {
    "a plan": ("statfs", CREATE),
    "a plan, internal": ("statfs", (*CREATE, "--kind", "internal", "--no-memory")),
    "a plan, revert": ("statfs", ("snapshot", "revert", "still", "before")),
    "the record": ("rename", CREATE),
}


@pytest.mark.parametrize(("operations", "words"), AT.values(), ids=AT)
async def test_another_machine_of_the_store_goes_on_while_one_waits_for_storage(
    home: Path, monkeypatch: pytest.MonkeyPatch, operations: str, words: tuple[str, ...]
) -> None:
    if reason := hanging.lacking():
        pytest.skip(reason)
    monkeypatch.setenv(storage_wait.DEADLINE, "3600")
    with hanging.mounted(home / "machines" / "still") as storage:
        async with qmpsnap.open(home) as q:
            waits, goes_on = await q.define(ONE_DISK), await q.define(replace(ONE_DISK, name="other"))
            await waits.snapshot("before")
            with storage.hang(operations):
                command = started(*words)
                try:
                    await until_stuck(command.pid, str(storage.path))
                    await goes_on.snapshot("meanwhile")
                    assert command.poll() is None
                except BaseException:
                    command.kill()
                    raise
            said = await ended(command)
            assert command.returncode == 0, said
            assert not [finding for vm in (waits, goes_on) for finding in (await vm.check()).findings]
