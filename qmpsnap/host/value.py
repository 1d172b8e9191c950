"""Frozen values for what a reading verb loads: msgspec's are as good to use, and cost more to load than such a verb.

A value of these is never stored: what is stored is a ``msgspec.Struct``, which checks what it is read from.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from typing import Any, TypeVar, dataclass_transform

    V = TypeVar("V", bound="Value")
else:

    def dataclass_transform(**_: object) -> object:
        """Nothing, where no type checker looks."""
        return lambda kind: kind


@dataclass_transform(frozen_default=True)
class Value:
    """The base of a class with annotated fields, some of which have a default; compared by what they hold."""

    _fields: tuple[str, ...] = ()
    _defaults: dict[str, Any] = {}  # noqa: RUF012 - of each class, made once

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__dict__.get("__annotations__", ()))  # noqa: RUF063 - which is slow to load
        cls._defaults = {name: cls.__dict__[name] for name in cls._fields if name in cls.__dict__}

    def __init__(self, *values: Any, **named: Any) -> None:
        fields = self._fields
        held = dict(zip(fields, values), **named)  # noqa: B905 - the rest is named, or has a default
        if len(held) != len(fields):
            held = {**self._defaults, **held}
        if len(values) > len(fields) or held.keys() != {*fields}:
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(fields)}, not {', '.join(held)}")
        self.__dict__.update(held)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *map(self.__dict__.__getitem__, self._fields)))

    def __repr__(self) -> str:
        held = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._fields)
        return f"{type(self).__name__}({held})"


def replaced(value: V, **changes: Any) -> V:
    """The value with some fields of another content."""
    return type(value)(**{**value.__dict__, **changes})
