"""What waits for a disk runs in a thread; nobody leaves while it still does, nor while something is being closed."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
from anyio import lowlevel, to_thread

T = TypeVar("T")


async def to_end(call: Callable[..., T], *arguments: object) -> T:
    """Run a call in a thread and hand on its result, whoever cancels meanwhile; see :func:`completed`."""
    await lowlevel.checkpoint_if_cancelled()
    return await completed(to_thread.run_sync(call, *arguments))


async def completed(work: Coroutine[Any, Any, T]) -> T:
    """Await to the end and hand on the result, whoever cancels meanwhile: that is raised by the next other await.

    So does anyio for its own scopes. But asyncio's ``Task.cancel``, which Ctrl-C and ``asyncio.timeout`` come as, makes
    whoever waits leave at once, also where a scope is shielded: the work would go on beside whatever cleans up, and
    what it has opened would be lost.

    The work is a task of its own, which no deadline of the caller's ends: it has to have one itself.
    """
    task = asyncio.current_task()
    assert task
    working = asyncio.ensure_future(work)
    heard: list[asyncio.CancelledError] = []
    with anyio.CancelScope(shield=True):
        while not working.done():
            try:
                await asyncio.wait([working])
            except asyncio.CancelledError as error:
                heard.append(error)
    if heard and (failed := working.exception()):
        raise heard[0] from failed  # nothing is lost, and whoever cleans up is not cancelled in that
    for _ in heard:
        task.uncancel()
    for one in heard:
        task.cancel(*one.args)
    return working.result()


async def bounded(seconds: float, work: Coroutine[Any, Any, object]) -> None:
    """As :func:`completed`, but given up after so many seconds."""

    async def working() -> None:
        with anyio.move_on_after(seconds):
            await work

    await completed(working())
