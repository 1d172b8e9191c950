"""What waits for a disk runs in a thread; nobody leaves while it still does."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import lowlevel, to_thread

T = TypeVar("T")


async def to_end(call: Callable[..., T], *arguments: object) -> T:
    """Run a call in a thread and wait for its end, whoever cancels: what it does is done before anything else is.

    anyio's own wait is left at once by asyncio's ``Task.cancel``, which is what Ctrl-C and ``asyncio.timeout`` come as;
    the thread would then go on beside whatever cleans up. A cancellation that came meanwhile is raised afterwards.
    """
    await lowlevel.checkpoint()
    working = asyncio.ensure_future(to_thread.run_sync(call, *arguments))
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not working.done():
            try:
                await asyncio.wait([working])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled:
        working.exception()  # looked at; whoever was cancelled finds out what has become of it
        raise cancelled
    return working.result()
