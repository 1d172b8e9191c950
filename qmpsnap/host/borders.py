"""What callers see of errors: a class of the API raises our own alone."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from qmpsnap.errors import QmpsnapError
from qmpsnap.host.system_errors import translated

C = TypeVar("C", bound=type)


def border(api: C) -> C:
    """Let the coroutines of a class raise only qmpsnap's errors, except for bugs."""
    for name, method in vars(api).copy().items():
        if inspect.iscoroutinefunction(method) and not name.startswith("_"):
            setattr(api, name, translating(method))
    return api


def translating(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same coroutine function, which raises only qmpsnap's errors, except for bugs."""

    @functools.wraps(method)
    async def inside(*arguments: Any, **named: Any) -> Any:
        try:
            return await method(*arguments, **named)
        except QmpsnapError:
            raise
        except Exception as error:
            if (told := translated(error)) is None:
                raise
            raise told from error

    return inside
