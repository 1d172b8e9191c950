"""Programs that are run to their end: killed, reaped and closed however often the caller is cancelled.

A program that hanging storage keeps from ending is left and reported: nobody can end it.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

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
