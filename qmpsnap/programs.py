"""Programs that we run to their end: killed, reaped and let go of, whoever cancels us and how often."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream, Process

from qmpsnap.threads import completed


@asynccontextmanager
async def running(argv: Sequence[str], **how: Any) -> AsyncIterator[Process]:
    """A program for the block; what still runs at its end is killed.

    asyncio leaves a process that nobody waits for where it is cancelled again while it spawns or lets go of one.

    Args:
        argv: the program and its arguments.
        how: as :func:`anyio.open_process` takes it.

    Raises:
        OSError: it cannot be started.
    """
    process = await completed(anyio.open_process(argv, **how))
    try:
        yield process
    finally:
        await completed(_ended(process))


async def finished(argv: Sequence[str], **how: Any) -> tuple[int, bytes, bytes]:
    """Run a program to its end: what it returned, and what it said on stdout and on stderr.

    Raises:
        OSError: it cannot be started.
    """
    said: dict[int, bytes] = {1: b"", 2: b""}

    async def heard(number: int, stream: ByteReceiveStream | None) -> None:
        if stream is not None:
            said[number] = b"".join([chunk async for chunk in stream])

    async with running(argv, **how) as process, anyio.create_task_group() as group:
        group.start_soon(heard, 1, process.stdout)
        group.start_soon(heard, 2, process.stderr)
        code = await process.wait()
    return code, said[1], said[2]


async def _ended(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            process.kill()
    await process.aclose()
