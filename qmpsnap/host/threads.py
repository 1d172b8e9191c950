"""Calls that wait for a disk run in a thread; they are awaited to their end, and so is closing something.

Storage that hangs is the exception: a thread without progress is abandoned after
:func:`qmpsnap.host.storage_wait.deadline`. Its lock is kept until it returns, and nobody works on files under that lock
meanwhile.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import anyio
from anyio import lowlevel, to_thread

from qmpsnap.errors import StorageHangs
from qmpsnap.host.outstanding import LOOK, Work, covered

P = ParamSpec("P")
T = TypeVar("T")


async def to_end(call: Callable[..., T], *arguments: object) -> T:
    """Run a call in a thread and return its result even if the caller is cancelled meanwhile; see :func:`completed`.

    Raises ``StorageHangs`` if it, or an earlier call under the same lock, waits for a file and makes no progress.
    """
    await lowlevel.checkpoint_if_cancelled()
    if cover := covered():
        cover.require_back()
    work = Work(call, *arguments, reads=False)
    return await completed(to_thread.run_sync(work.run), hangs=work.hangs)


def runs_to_end(call: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The call as async code awaits it: by :func:`to_end`."""

    @functools.wraps(call)
    async def called(*arguments: P.args, **rest: P.kwargs) -> T:
        return await to_end(functools.partial(call, *arguments, **rest))

    return called


async def to_read(call: Callable[..., T], *arguments: object) -> T:
    """As :func:`to_end`, for a call that only reads: a cancelled caller abandons it at once."""
    if cover := covered():
        cover.require_back()
    work = Work(call, *arguments, reads=True)
    reading = asyncio.ensure_future(to_thread.run_sync(work.run, abandon_on_cancel=True))
    try:
        while not (await asyncio.wait([reading], timeout=LOOK))[0]:
            if hang := work.hangs():
                raise hang
        return reading.result()
    finally:
        if not reading.done():
            reading.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([reading])


async def completed(work: Coroutine[Any, Any, T], *, hangs: Callable[[], StorageHangs | None] | None = None) -> T:
    """Run to completion and return the result; a pending cancellation is delivered by the next other await.

    anyio does this for its own scopes. But asyncio's ``Task.cancel``, which Ctrl-C and ``asyncio.timeout`` use, ends
    the wait at once even in a shielded scope: the work would continue beside the clean-up, and files it has opened
    would be lost.

    The work is a task of its own, which no deadline of the caller's ends: it has to have one itself, or it is left
    once ``hangs`` has an error to raise instead.
    """
    task = asyncio.current_task()
    assert task
    working = asyncio.ensure_future(work)
    heard: list[asyncio.CancelledError] = []
    hang: StorageHangs | None = None
    with anyio.CancelScope(shield=True):
        while not working.done() and hang is None:
            try:
                if not (await asyncio.wait([working], timeout=LOOK if hangs else None))[0] and hangs:
                    hang = hangs()
            except asyncio.CancelledError as error:
                heard.append(error)
    if hang:
        working.add_done_callback(_unheard)
    failed = hang or working.exception()
    if heard and failed:
        raise heard[0] from failed  # nothing is lost, and the clean-up is not cancelled
    if hang:
        raise hang
    for _ in heard:
        task.uncancel()
    for one in heard:
        task.cancel(*one.args)
    return working.result()


def _unheard(working: asyncio.Future[Any]) -> None:
    """Let nobody complain that what was left to itself had a result."""
    if not working.cancelled():
        working.exception()


async def bounded(seconds: float, work: Coroutine[Any, Any, object]) -> None:
    """As :func:`completed`, but given up after so many seconds."""

    async def working() -> None:
        with anyio.move_on_after(seconds):
            await work

    await completed(working())


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group, whose tasks do one thing for their caller."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
