"""An event loop in a thread of its own, and what its callers in other threads hold of it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio
from anyio import lowlevel

from qmpsnap.api.forks import ForkPool as AsyncPool
from qmpsnap.api.machine_handle import MachineHandle as AsyncHandle

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from qmpsnap.api.controller import Controller as AsyncController

T = TypeVar("T")


class _Work(Generic[T]):
    """One call in the loop, which its caller may give up."""

    def __init__(self, act: Callable[[], Awaitable[T]]) -> None:
        self._act = act
        self._scope: anyio.CancelScope | None = None
        self._ended = False

    async def run(self) -> T:
        try:
            with anyio.CancelScope() as self._scope:
                return await self._act()
        finally:
            self._ended = True
        return cast("T", None)  # to nobody: who cancelled it raises

    async def cancel(self) -> None:
        """Cancel it, also if it has not begun."""
        while self._scope is None and not self._ended:
            await lowlevel.checkpoint()
        if self._scope:
            self._scope.cancel()


class Runner:
    """Runs coroutines in the loop behind a portal, one for each call."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal

    def run(self, act: Callable[[], Awaitable[T]]) -> T:
        """What a coroutine returns; Ctrl-C here cancels it there, and is raised once it has ended."""
        work = _Work(act)
        future = self._portal.start_task_soon(work.run)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                self._portal.call(work.cancel)
                concurrent.futures.wait([future])
            raise

    def entered(self, block: AbstractAsyncContextManager[T]) -> AbstractContextManager[T]:
        """An asynchronous block as another one."""
        return self._portal.wrap_async_context_manager(block)


class Held:
    """What belongs to a loop; it hands out handles that do, too."""

    _runner: Runner

    def _call(self, act: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await act

        return self._of(self._runner.run(awaited))

    def _iterate(self, events: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()

        async def following() -> Any:
            return await anext(events, end)

        async def close() -> None:
            await cast("Any", events).aclose()

        try:
            while (event := self._runner.run(following)) is not end:
                yield event
        finally:
            self._runner.run(close)

    def _now(self, value: Any) -> Any:
        return self._of(value)

    @contextmanager
    def _entered(self, block: AbstractAsyncContextManager[Any]) -> Iterator[Any]:
        with self._runner.entered(block) as found:
            yield self._of(found)

    def _of(self, value: Any) -> Any:
        from qmpsnap.sync.machine import MachineHandle
        from qmpsnap.sync.pool import ForkPool

        if isinstance(value, AsyncHandle):
            return MachineHandle(self._runner, value)
        if isinstance(value, AsyncPool):
            return ForkPool(self._runner, value)
        if isinstance(value, tuple) and any(isinstance(one, AsyncHandle) for one in value):
            return tuple(map(self._of, value))
        return value


class Opened(Held):
    """A controller in its loop."""

    def __init__(self, runner: Runner, controller: AsyncController) -> None:
        self._runner = runner
        self._controller = controller


class Delegating(Held):
    """A machine's handle in its controller's loop."""

    def __init__(self, runner: Runner, handle: AsyncHandle) -> None:
        self._runner = runner
        self._handle = handle
        self.name = handle.name

    def __repr__(self) -> str:
        return repr(self._handle)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Delegating) and self._handle == other._handle

    def __hash__(self) -> int:
        return hash(self._handle)
