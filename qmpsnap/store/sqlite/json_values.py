"""Values that the store keeps as JSON."""

from typing import Any, TypeVar, overload

import msgspec

from qmpsnap.errors import StoreMismatch
from qmpsnap.hint import call

T = TypeVar("T")


@overload
def decoded(text: str | bytes, kind: type[T]) -> T: ...


@overload
def decoded(text: str | bytes, kind: Any = Any) -> Any: ...


def decoded(text: str | bytes, kind: Any = Any) -> Any:
    """A value of the store's."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise StoreMismatch(
            f"the store holds an invalid value: {error}",
            hint="put a copy of it back, or rebuild it: " + call("rebuild"),
        ) from error
