"""Long operations as objects: awaited for what they did, iterated over for their progress, cancelled.

::

    job = vm.commit("vda", top=before)
    async for info in job.progress():
        print(info.status, info.current_progress, info.total_progress)
    done = await job
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Concatenate, Final, Generic, ParamSpec, Protocol, Self, TypeVar

import anyio

from qmpsnap.errors import JobCancelled, QmpsnapError
from qmpsnap.hint import call
from qmpsnap.host.borders import translating
from qmpsnap.host.threads import completed
from qmpsnap.model.operations.operation import OPEN_STATES
from qmpsnap.qmp.jobs import Report, unreported

if TYPE_CHECKING:
    from types import TracebackType

    from anyio.streams.memory import MemoryObjectReceiveStream

    from qmpsnap.ops.base.context import Context
    from qmpsnap.qmp.commands import JobInfo

T = TypeVar("T")
P = ParamSpec("P")

_WAITING: Final = 64
"""Reports kept for a slow reader; a newer one tells all that a lost older one did."""

Running = set["Job[Any]"]
"""The jobs that nobody may have awaited yet; the controller's end cancels them."""


class Handle(Protocol):
    """Whose methods begin jobs."""

    name: str
    _context: Context
    _running: Running


class Job(Generic[T]):
    """A long operation of one machine. ``await job`` runs it to its end and returns what it did.

    It begins when it is first awaited, entered (``async with``) or iterated over (:meth:`progress`), and belongs to the
    event loop it began in. If a task that waits for it is cancelled, the job is cancelled. A job still running at the
    end of the controller's block is cancelled there.
    """

    def __init__(self, handle: Handle, verb: str, act: Callable[[Report], Coroutine[Any, Any, T]]) -> None:
        self.verb = verb
        """Name of the method that made it."""
        self.machine = handle.name
        """Name of the machine."""
        self._handle = handle
        self._work = act(self._tell)
        self._scope: anyio.CancelScope | None = None
        self._task: asyncio.Task[T] | None = None
        self._ended: asyncio.Event | None = None
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._followers: weakref.WeakSet[_Progress] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<Job {self.verb} of {self.machine} {self._word()}>"

    def _word(self) -> str:
        if self._outcome:
            return "done"
        if self._error:
            return "cancelled" if isinstance(self._error, JobCancelled) else "failed"
        return "running" if self._ended else "not begun"

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return bool(self._outcome or self._error)

    def __await__(self) -> Generator[Any, None, T]:
        """Run it to its end; what it did is returned, or its error raised, each time it is awaited."""
        if self._ended is None:  # in the task that awaits, whose cancellation it hears as any call does
            return self._run().__await__()
        return self._wait().__await__()

    async def __aenter__(self) -> Self:
        """Begin it; the end of the block waits for its end, and a block that fails or is cancelled cancels it."""
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self
        else:
            await self.cancel()

    def progress(self) -> AsyncIterator[JobInfo]:
        """Begin it, and iterate over the states of its QEMU jobs until it has ended; an error is left to ``await``.

        The numbers are QEMU's estimates in bytes and can go up and down. A slow reader misses older reports.
        """
        self._begin()
        follower = _Progress(self)
        self._followers.add(follower)
        return follower

    async def cancel(self) -> None:
        """End it, and return once that is done; ``await job`` then raises :class:`~qmpsnap.errors.JobCancelled`.

        Its effect until then is undone, or completed where it cannot be undone: the error's ``effect`` says which.
        A job that has ended already stays as it is.
        """
        if self._ended is None:
            self._work.close()
            self._ended = asyncio.Event()
            self._end(JobCancelled(f"{self.verb} of machine {self.machine} was cancelled before it began"))
        elif not self.done:
            assert self._scope
            self._scope.cancel()
            await completed(self._until_ended())

    def _begin(self) -> None:
        if self._ended is None:
            self._prepare()
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._handle._running.add(self)  # noqa: SLF001 - a part of the handle

    def _prepare(self) -> anyio.CancelScope:
        self._ended, self._scope = asyncio.Event(), anyio.CancelScope()
        return self._scope

    async def _run(self) -> T:
        begun = time.time()
        try:
            with self._scope or self._prepare():
                self._outcome.append(await self._work)
        except asyncio.CancelledError:
            self._end(JobCancelled(f"the task in which {self.verb} of machine {self.machine} ran was cancelled"))
            raise
        except BaseException as error:
            self._end(error)
            raise
        self._end(None if self._outcome else await self._cancelled(begun))
        if self._error:
            raise self._error
        return self._outcome[0]

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self._handle._running.discard(self)  # noqa: SLF001
        assert self._ended
        self._ended.set()
        for follower in self._followers:
            follower.news.set()

    async def _until_ended(self) -> None:
        assert self._ended
        await self._ended.wait()

    async def _wait(self) -> T:
        try:
            await self._until_ended()
        except asyncio.CancelledError:
            await self.cancel()
            raise
        if self._task and self._task.done() and not self._task.cancelled():
            self._task.exception()  # it is raised here
        if self._error:
            raise self._error
        return self._outcome[0]

    async def _cancelled(self, begun: float) -> JobCancelled:
        """The error of a job that was cancelled, with what became of its operation."""
        error = JobCancelled(f"{self.verb} of machine {self.machine} was cancelled", machine=self.machine)
        try:
            found = await self._handle._context.astore.operations(self.machine)  # noqa: SLF001
        except QmpsnapError:
            error.effect = "unknown"
            return error
        ours = [one for one in found if one.pid == os.getpid() and one.started >= begun]
        if not ours:
            return error
        error.operation = str(ours[-1].id)
        error.effect = ours[-1].effect or "none"
        if ours[-1].state in OPEN_STATES:
            error.effect = "unknown"
            error.hint = call("recover", self.machine)
        return error

    def _tell(self, info: JobInfo) -> None:
        for follower in self._followers:
            follower.kept.append(info)
            follower.news.set()


class _Progress(AsyncIterator["JobInfo"]):
    """One reader of a job's reports."""

    def __init__(self, job: Job[Any]) -> None:
        self._job = job
        self.kept: deque[JobInfo] = deque(maxlen=_WAITING)
        self.news = asyncio.Event()

    async def __anext__(self) -> JobInfo:
        while not self.kept:
            if self._job.done:
                raise StopAsyncIteration
            self.news.clear()
            try:
                await self.news.wait()
            except asyncio.CancelledError:
                await self._job.cancel()
                raise
        return self.kept.popleft()


def job(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], Job[T]]:
    """Make a method that takes ``report`` return a :class:`Job`; ``report`` then is the caller's own, besides."""
    act: Callable[..., Coroutine[Any, Any, T]] = translating(method)

    @functools.wraps(method)
    def begin(handle: Handle, *arguments: Any, report: Report = unreported, **named: Any) -> Job[T]:
        def work(tell: Report) -> Coroutine[Any, Any, T]:
            def both(info: JobInfo) -> None:
                tell(info)
                report(info)

            return act(handle, *arguments, report=both, **named)

        return Job(handle, method.__name__.removeprefix("_"), work)

    return begin  # type: ignore[return-value] # its signature is the method's


async def end_all(running: Running) -> None:
    """Cancel the jobs that still run, each to its end."""
    while running:
        await next(iter(running)).cancel()


# --- the former way to iterate, for one release ---------------------------------------------------------------------


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
    send, receive = anyio.create_memory_object_stream["JobInfo"](_WAITING)
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
