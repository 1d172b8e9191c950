"""Running qemu-img: bounded, without a shell, its end always known; one that storage does not let end is left."""

import contextlib
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import anyio
from anyio.abc import ByteReceiveStream, Process

from qmpsnap import hung
from qmpsnap.errors import DeadlinePassed, Effect, HostCannot
from qmpsnap.outstanding import LOOK, leave_process, storage_hangs
from qmpsnap.threads import completed

_ENDING: Final = 2.0
"""Seconds from the kill of a program to its end, unless a request of its is still with the storage."""


async def run(
    argv: list[str],
    *,
    deadline: float,
    late: str,
    effect: Effect = "none",
    inherited: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> "subprocess.CompletedProcess[bytes]":
    """Run a program to its end; what it returned is the caller's to judge.

    Args:
        argv: the program and its arguments.
        deadline: seconds after which it is ended.
        late: the message should it not be done by then.
        effect: whether such a program may have changed something.
        inherited: open descriptors that its arguments speak of; it gets them under the same numbers.
        environment: its environment; None is ours.
        limit: bytes that are kept of each of its streams; None keeps all.

    Raises:
        DeadlinePassed: it was not done in time.
        StorageHangs: it waits for a file, and does not get on.
        HostCannot: it cannot be started.
    """
    said = {"out": b"", "err": b""}

    async def read(stream: ByteReceiveStream | None, name: str) -> None:
        assert stream is not None  # a pipe by open_process's default
        async for chunk in stream:
            said[name] = (said[name] + chunk)[:limit]

    try:
        with anyio.fail_after(deadline):
            async with _started(argv, inherited, environment) as process, anyio.create_task_group() as tasks:
                tasks.start_soon(_watch, process, argv[0], effect)
                async with anyio.create_task_group() as reading:
                    reading.start_soon(read, process.stdout, "out")
                    reading.start_soon(read, process.stderr, "err")
                code = await process.wait()
                tasks.cancel_scope.cancel()
    except TimeoutError as error:
        raise DeadlinePassed(late, effect=effect) from error
    except BaseExceptionGroup as group:
        raise _first(group) from group.__cause__
    return subprocess.CompletedProcess(argv, code, said["out"], said["err"])


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def _started(
    argv: list[str], inherited: Sequence[int], environment: Mapping[str, str] | None
) -> AsyncIterator[Process]:
    """The program for the block; what still runs at its end is killed."""
    try:
        # To its end: asyncio, cancelled again and again while it spawns, leaves a process nobody waits for.
        process = await completed(
            anyio.open_process(
                argv,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=inherited,
                start_new_session=True,  # a Ctrl-C is ours to answer, not its own
            )
        )
    except OSError as error:
        raise HostCannot(f"{argv[0]} cannot be run: {error.strerror}", hint="see qmpsnap doctor") from error
    try:
        yield process
    finally:
        await completed(_end(process, argv[0]))


async def _end(process: Process, program: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            process.kill()
    with anyio.move_on_after(_ENDING):
        await process.wait()
        await process.aclose()
        return
    wait = hung.waits_of(process.pid) or hung.Wait("a request", "")
    leave_process(process.pid, storage_hangs(wait, _ENDING, effect="unknown", who=f"{program} (process {process.pid})"))


async def _watch(process: Process, program: str, effect: Effect) -> None:
    watch, seconds = hung.ProcessWatch(process.pid), hung.deadline()
    while True:
        await anyio.sleep(LOOK)
        if wait := watch.hangs(seconds):
            raise storage_hangs(wait, seconds, effect=effect, who=f"{program} (process {process.pid})")
