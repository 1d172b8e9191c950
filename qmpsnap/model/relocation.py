"""Which home a store belongs to, where that lies, and how it comes to lie elsewhere. Pure."""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.vmstate import Vmstate


class Relocation(Struct, frozen=True, kw_only=True):
    """A home that goes on at another path, or with copies of its files; durable before the first header is rewritten.

    Attributes:
        id: the home's name from now on: a copy beside its original gets one of its own.
        before: every path at which headers and records may have it; the longest first.
        layers: layers whose files are copies, as they are recorded from now on; ``states`` likewise.
        foreign_process: what is recorded of QEMUs that run is another home's.
    """

    id: str
    before: tuple[str, ...]
    now: str
    layers: tuple[Layer, ...] = ()
    states: tuple[Vmstate, ...] = ()
    foreign_process: bool = False


class HomeRecord(Struct, frozen=True):
    """A home's own name, and the path of its folder as it was recorded; ``moving``: a relocation that has not ended."""

    id: str
    path: str
    moving: Relocation | None = None


def carried(text: str, before: Sequence[str], now: str) -> str:
    """A path with the home's folder where it is now; one that lies elsewhere stays as it is."""
    for old in before:
        if text == old or text.startswith(f"{old}/"):
            return now + text[len(old) :]
    return text


def carried_all(value: Any, before: Sequence[str], now: str) -> Any:
    """The same for every text in a decoded JSON value."""
    if isinstance(value, str):
        return carried(value, before, now)
    if isinstance(value, list):
        return [carried_all(each, before, now) for each in value]
    if isinstance(value, dict):
        return {key: carried_all(each, before, now) for key, each in value.items()}
    return value
