"""Something done at the n-th await of whatever is awaited."""

from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any


class Counted:
    """Awaits something, and does something at the n-th time that it lets go of the event loop."""

    def __init__(self, awaited: Awaitable[object], nth: int, act: Callable[[], object]) -> None:
        self._awaited, self._nth, self._act = awaited, nth, act
        self.count = 0

    def __await__(self) -> Generator[Any, Any, object]:
        inner = self._awaited.__await__()
        resume: Callable[[], Any] = partial(next, inner)
        while True:
            try:
                waits_for = resume()
            except StopIteration as end:
                return end.value
            self.count += 1
            if self.count == self._nth:
                self._act()
            try:
                value = yield waits_for
            except BaseException as error:  # noqa: BLE001 - handed on to whoever waits inside
                resume = partial(inner.throw, error)
            else:
                resume = partial(inner.send, value)
