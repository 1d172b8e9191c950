"""Storage that hangs, played by a FIFO: whoever opens one waits in the kernel until somebody opens its other end."""

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from qmpsnap.block.image.create import ImageTool
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import LockHeld, OperationPending, StorageHangs
from qmpsnap.host import outstanding, storage_wait
from qmpsnap.host.threads import to_end, to_read
from qmpsnap.model.home import Home
from qmpsnap.ops.base.context import Context, locked
from qmpsnap.store.sqlite.backend import SqliteStore

SOON = 0.6
"""Seconds until storage counts as hanging here."""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that nobody can open until somebody lets go of it."""
    monkeypatch.setenv(storage_wait.DEADLINE, str(SOON))
    path = tmp_path / "hangs"
    os.mkfifo(path)
    yield path
    let_go(path)
    for _ in range(500):
        if not outstanding.left():
            break
        threading.Event().wait(0.01)


def let_go(path: Path) -> None:
    """Answer all that wait to open it for reading, now and later."""
    os.open(path, os.O_RDWR | os.O_NONBLOCK)


def read(path: Path) -> str:
    os.close(os.open(path, os.O_RDONLY))
    return "opened"


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    home = Home.from_environment({"QMPSNAP_HOME": str(tmp_path / "home")}, uid=os.geteuid())
    with SqliteStore(home.store, machines=home.machines) as store:
        yield Context(home=home, store=store, qemu="no-qemu", image=ImageTool("no-qemu-img"), host=os.uname().nodename)


async def test_what_hangs_is_named(file: Path) -> None:
    with pytest.raises(StorageHangs) as caught:
        await to_end(read, file)
    assert (caught.value.path, caught.value.effect, caught.value.exit_code) == (str(file), "none", 6)
    assert f"open of {file}" in caught.value.message
    assert outstanding.left()


async def test_what_only_reads_is_left_by_whoever_is_cancelled(file: Path) -> None:
    with anyio.move_on_after(0.05) as scope:
        await to_read(read, file)
    assert scope.cancelled_caught
    reading = asyncio.create_task(to_read(read, file))
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_whoever_is_cancelled_is_so_once_the_thread_is_given_up(file: Path) -> None:
    working = asyncio.create_task(to_end(read, file))
    await asyncio.sleep(0.05)
    working.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await working
    assert isinstance(caught.value.__cause__, StorageHangs)


async def test_a_thread_that_gets_on_does_not_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(storage_wait.DEADLINE, "0.6")

    def slow() -> int:
        data = b"x" * 65536
        done, pause = 0, threading.Event()
        with (tmp_path / "file").open("wb", buffering=0) as out:
            while not pause.wait(0.05) and done < 40:
                out.write(data)
                os.fsync(out.fileno())
                done += 1
        return done

    assert await to_end(slow) == 40


async def test_a_lock_is_kept_until_the_thread_is_back(file: Path, context: Context) -> None:
    with pytest.raises(StorageHangs) as caught:
        async with locked(context, "web", "snapshot create"):
            await to_end(read, file)
    assert (caught.value.effect, caught.value.machine) == ("unknown", "web")
    assert "qmpsnap recover web" in as_typed(caught.value.hint)
    for _ in range(2):
        with pytest.raises(OperationPending, match=r"'snapshot create' .* is stuck: .*hangs") as refused:
            async with locked(context, "web", "start"):
                pytest.fail("nobody works beside it")
        assert (refused.value.exit_code, refused.value.effect) == (8, "none")
    let_go(file)
    with anyio.fail_after(10):
        while outstanding.left():
            await anyio.sleep(0.01)
    async with locked(context, "web", "start"):
        pass


async def test_nobody_works_on_files_beside_such_a_thread(file: Path, context: Context) -> None:
    done: list[str] = []
    with pytest.raises(StorageHangs):  # noqa: PT012
        async with locked(context, "web", "snapshot create"):
            try:
                await to_end(read, file)
            finally:
                await to_end(done.append, "cleaned up")
    assert not done
    await to_end(done.append, "another machine's")
    assert done


async def test_what_only_read_keeps_no_lock(file: Path, context: Context) -> None:
    with pytest.raises(StorageHangs) as caught:
        async with locked(context, "web", "snapshot create"):
            await to_read(read, file)
    assert caught.value.effect == "none"
    async with locked(context, "web", "start"):
        pass


async def test_a_lock_that_is_only_held_is_no_operation_that_hangs(context: Context) -> None:
    async with locked(context, "web", "start"):
        with pytest.raises(LockHeld):
            async with locked(context, "web", "stop"):
                pytest.fail("it is held")


def test_a_brief_question_has_another_answer_in_time(file: Path) -> None:
    assert outstanding.briefly(lambda: read(file), "unknown", seconds=0.05) == "unknown"
    assert outstanding.left()
    let_go(file)
    assert outstanding.briefly(lambda: read(file), "unknown", seconds=10) == "opened"


def test_a_wait_for_a_terminal_or_a_pipe_is_none_for_storage() -> None:
    ours, theirs = os.pipe()
    thread = threading.Thread(target=os.read, args=(ours, 1))
    thread.start()
    try:
        threading.Event().wait(0.1)
        assert thread.native_id is not None
        assert storage_wait.waits(os.getpid(), thread.native_id) is None
    finally:
        os.write(theirs, b"x")
        thread.join()
        os.close(ours)
        os.close(theirs)


def test_a_path_is_followed_to_its_storage(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self")
    assert storage_wait.storage(str(tmp_path / "link" / "status")) == "/proc (proc)"
    assert storage_wait.storage("/").startswith("/ (")


_HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
_NUMBER = re.compile(r"^#define __NR(?:3264)?_(\w+) (\d+)$", re.MULTILINE)


@pytest.mark.parametrize("machine", _HEADERS)
def test_system_calls_have_the_numbers_that_the_kernel_gives_them(machine: str) -> None:
    header = Path("/usr/include", _HEADERS[machine])
    if not header.exists():
        pytest.skip(f"there is no {header}: another architecture's headers are installed")
    names = {int(number): name for name, number in _NUMBER.findall(header.read_text())}
    calls = storage_wait._CALLS[machine]
    for number, word in (calls.by_descriptor | calls.by_path | calls.below_folder).items():
        assert word in names[number], number  # the kernel's say more: `newfstatat`, `openat2`, `pread64`
