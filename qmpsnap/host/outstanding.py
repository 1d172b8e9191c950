"""Work that may have to be left to its thread, as storage hangs: what is locked for it stays locked until it is back.

Without asyncio, as ``list`` asks here.
"""

import contextlib
import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Generic, TypeVar

from qmpsnap.effect import Effect
from qmpsnap.errors import StorageHangs
from qmpsnap.host import storage_wait

T = TypeVar("T")
U = TypeVar("U")

LOOK: Final = 0.5
"""Seconds between two looks at a thread."""

_guard = threading.Lock()
_helpers: "set[Work[Any]]" = set()
"""Those that only wait for a helper program to end."""
_left: "set[Work[Any]]" = set()
"""The work of abandoned threads, of all event loops of this process."""


class Cover:
    """The file work that one lock covers: the lock is given back when none of its threads is out any more."""

    def __init__(self) -> None:
        self.hangs: StorageHangs | None = None
        self._out = 0
        self._release: Callable[[], None] | None = None

    def require_back(self) -> None:
        """Refuse further work on files beside a thread that may still change them."""
        if self.hangs:
            raise StorageHangs(self.hangs.message, path=self.hangs.path, hint=self.hangs.hint, effect="unknown")

    def release(self, call: Callable[[], None]) -> None:
        """Give the lock back by this call: now, or once the last thread is back."""
        with _guard:
            if self._out:
                self._release = call
                return
        call()

    def lose(self, error: StorageHangs, *, reads: bool) -> None:
        """A thread was left to itself, one that only reads or not; the guard is held."""
        self.hangs = error
        self._out += not reads

    def regain(self) -> Callable[[], None] | None:
        """A thread is back; the guard is held. Returns what is to be called without it."""
        self._out -= 1
        return None if self._out else self._release


_cover: ContextVar[Cover | None] = ContextVar("qmpsnap-cover", default=None)


def covered() -> Cover | None:
    """What covers the work of this task."""
    return _cover.get()


@contextmanager
def covering() -> Iterator[Cover]:
    """For the block, all that :func:`qmpsnap.host.threads.to_end` runs is the work of one lock."""
    outer = _cover.get()
    cover = Cover()
    _cover.set(cover)
    try:
        yield cover
    finally:
        _cover.set(outer)
        if outer and cover.hangs:
            outer.hangs = cover.hangs


class Work(Generic[T]):
    """A call in a thread, which may be left to itself there."""

    def __init__(self, call: Callable[..., T], *arguments: object, reads: bool) -> None:
        self._call, self._arguments, self._reads = call, arguments, reads
        self._cover = _cover.get()
        self._watch: storage_wait.Watch | None = None
        self._ended = False

    def run(self) -> T:
        """The thread's part."""
        self._watch = storage_wait.Watch(os.getpid(), threading.get_native_id())
        try:
            return self._call(*self._arguments)
        finally:
            with _guard:
                self._ended = True
                changed = self in _left and not self._reads
                told = self._cover.regain() if changed and self._cover else None
                _left.discard(self)
                _helpers.discard(self)
            if told:
                told()

    def hangs(self) -> StorageHangs | None:
        """Whether the thread hangs; it has been left to itself then."""
        seconds = storage_wait.deadline()
        wait = self._watch.hangs(seconds) if self._watch else None
        if wait is None:
            return None
        error = storage_hangs(wait, seconds, effect="none" if self._reads or not self._cover else "unknown")
        return error if self.leave(error) else None

    def leave(self, error: StorageHangs) -> bool:
        """Leave the call to itself; False where it has ended in this very moment."""
        with _guard:
            if self._ended:
                return False
            _left.add(self)
            if self._cover:
                self._cover.lose(error, reads=self._reads)
            return True


def storage_hangs(wait: storage_wait.Wait, seconds: float, *, effect: Effect, who: str = "") -> StorageHangs:
    """The error that tells it."""
    return StorageHangs(
        storage_wait.sentence(wait, seconds, who=who),
        path=wait.path,
        hint=f"check that storage; {storage_wait.DEADLINE} sets a longer wait",
        effect=effect,
    )


def leave_process(pid: int, error: StorageHangs) -> None:
    """Count a process that was killed and has not ended yet as outstanding work."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return

    def wait() -> None:
        select.select([descriptor], [], [])
        os.close(descriptor)

    work = Work(wait, reads=False)
    work.leave(error)
    _helpers.add(work)
    threading.Thread(target=work.run, daemon=True).start()


def briefly(call: Callable[[], T], otherwise: U, *, seconds: float) -> T | U:
    """The answer of a call that only reads, or ``otherwise`` if it takes longer; the caller need not be a task."""
    answer: queue.SimpleQueue[T] = queue.SimpleQueue()

    def ask() -> None:
        with contextlib.suppress(OSError):
            answer.put(call())

    work = Work(ask, reads=True)
    thread = threading.Thread(target=work.run, daemon=True)
    thread.start()
    thread.join(seconds)
    with _guard:
        if thread.is_alive() and not work._ended:  # noqa: SLF001
            _left.add(work)
    return otherwise if answer.empty() else answer.get()


def left() -> bool:
    """Whether a thread was left to itself that is not back: the process cannot end by itself then."""
    with _guard:
        return bool(_left)


def helpers() -> bool:
    """Whether a program that we have started and killed has not ended yet."""
    with _guard:
        return bool(_helpers)
