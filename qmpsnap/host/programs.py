"""Programs that are run to their end: killed, reaped and closed however often the caller is cancelled.

A program that hanging storage keeps from ending is left and reported: nobody can end it.
"""

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import IO, Any, Final

import anyio
from anyio.abc import Process

from qmpsnap.host import storage_wait
from qmpsnap.host.outstanding import leave_process, storage_hangs
from qmpsnap.host.threads import completed

_ENDING: Final = 2.0
"""Seconds from the kill of a program to its end, unless a request of its is still with the storage."""


@asynccontextmanager
async def running(argv: Sequence[str], **how: Any) -> AsyncIterator[Process]:
    """A program for the block; what still runs at its end is killed.

    asyncio leaves a process that nobody waits for where it is cancelled again while it spawns or lets go of one.
    """
    process = await completed(anyio.open_process(argv, **how))
    try:
        yield process
    finally:
        await completed(_ended(process, argv[0]))


async def _ended(process: Process, program: str) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            process.kill()
    with anyio.move_on_after(_ENDING):
        await process.wait()
        await process.aclose()
        return
    wait = storage_wait.waits_of(process.pid) or storage_wait.Wait("a request", "")
    leave_process(process.pid, storage_hangs(wait, _ENDING, effect="unknown", who=f"{program} (process {process.pid})"))


async def uninterrupted(
    argv: Sequence[str], *, seconds: float, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[bytes]":
    """Run a program that does harm if it is killed halfway: a cancelled caller waits for its end as well.

    One that has not ended after so many seconds is left to itself, and what the caller has locked stays locked until it
    ends.

    Raises:
        OSError: it cannot be run.
        StorageHangs: it was left, with the effect ``unknown``.
    """
    return await completed(_uninterrupted(argv, seconds, environment))


async def _uninterrupted(
    argv: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[bytes]":
    # Not by asyncio, which kills what still runs when it lets go of it.
    with _memory("stdout") as out, _memory("stderr") as err:
        process = subprocess.Popen(  # noqa: ASYNC220 - it is not waited for
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        descriptor = os.pidfd_open(process.pid)
        try:
            with anyio.move_on_after(seconds):
                await anyio.wait_readable(descriptor)
                return subprocess.CompletedProcess(argv, process.wait(), _written(out), _written(err))
        finally:
            os.close(descriptor)
    wait = storage_wait.waits_of(process.pid) or storage_wait.Wait("a request", "")
    error = storage_hangs(wait, seconds, effect="unknown", who=f"{argv[0]} (process {process.pid})")
    _spared.append(process)
    leave_process(process.pid, error)
    raise error


_spared: "list[subprocess.Popen[bytes]]" = []
"""Those that were left to themselves: their ends are theirs."""


def _memory(name: str) -> IO[bytes]:
    return os.fdopen(os.memfd_create(name), "w+b")


def _written(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
