"""The former way to iterate over a job's progress, for one release; :class:`qmpsnap.Job` is the present one."""

import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.jobs import Report

T = TypeVar("T")

_WAITING = 64
"""Reports kept for a slow reader; a newer one tells all that a lost older one did."""


class Following(Generic[T]):
    """Iterate to hear of the job; ``result`` is what the verb returned, once the block has ended."""

    result: T

    def __init__(self, reports: MemoryObjectReceiveStream[JobInfo]) -> None:
        self._reports = reports

    def __aiter__(self) -> AsyncIterator[JobInfo]:
        return aiter(self._reports)


@asynccontextmanager
async def progress(act: Callable[[Report], Awaitable[T]]) -> AsyncIterator[Following[T]]:
    """Run a verb beside the block, which can iterate over its job's progress; the block's end waits for the verb's.

    A block that raises, or is cancelled, cancels the job and leaves the chain as before; its error comes out as it is.

    Args:
        act: calls one verb with the report it is given.

    Raises:
        QmpsnapError: as the verb does.
    """
    warnings.warn("qmpsnap.progress: iterate over progress() of the job instead", DeprecationWarning, stacklevel=3)
    send, receive = anyio.create_memory_object_stream[JobInfo](_WAITING)
    following = Following[T](receive)
    failure: list[Exception] = []
    raised: Exception | None = None

    def report(info: JobInfo) -> None:
        try:
            send.send_nowait(info)
        except (anyio.WouldBlock, anyio.BrokenResourceError):
            return

    async def run() -> None:
        with send:
            try:
                following.result = await act(report)
            except Exception as error:  # noqa: BLE001 - raised again below, without the task group's wrapping
                failure.append(error)

    with receive:
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            try:
                yield following
            except Exception as error:  # noqa: BLE001 - as above
                raised = error
                group.cancel_scope.cancel()
    if raised:
        raise raised
    if failure:
        raise failure[0]
