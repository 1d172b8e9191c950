"""A spec as YAML that people edit: the machine, and in comments what is otherwise than in the original."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from qmpsnap.imports.found import MIB, Imported, Moment
from qmpsnap.model.machines.spec import MachineSpec

_PLAIN: Final = re.compile(r"[A-Za-z/][A-Za-z0-9/._+=-]*|[0-9a-f]{8}-[0-9a-f-]{27}")
"""What YAML takes for a string without quotes, whatever follows; no word for true, false or null is longer."""
_WORDS: Final = frozenset({"true", "false", "null", "yes", "no", "on", "off"})
_KEEPS_UNITS: Final = (("T", 1 << 40), ("G", 1 << 30), ("M", MIB), ("K", 1 << 10))


def render(found: Imported, *, define: str = "") -> str:
    """The spec's text; ``define`` is the command that records the machine."""
    return "".join(f"{line}\n" for line in (*_head(found, define), *_machine(found.spec)))


def of(spec: MachineSpec) -> str:
    """The text of a spec alone."""
    return "".join(f"{line}\n" for line in _machine(spec))


def _head(found: Imported, define: str) -> Iterator[str]:
    yield from _comment(f"{found.origin}, as a machine of qmpsnap.")
    yield from _comment(
        f"The original runs: {found.runs}. Shut it down before this one is started." if found.runs else ""
    )
    for what, sentences in (("Different from the original", found.changed), ("Left out", found.left_out)):
        yield from _comment(f"{what}:" if sentences else "")
        for sentence in sentences:
            yield from _comment(f"  - {sentence}")
    yield from _comment(
        "Snapshots, which no spec has; they are taken over where the machine is defined at once:"
        if found.moments
        else ""
    )
    for moment in found.moments:
        yield from _comment(f"  - {moment.name}{_but(moment)}")
    yield from _comment(f"Define it: {define}" if define else "")


def _but(moment: Moment) -> str:
    called = f", there {moment.original!r}" if moment.original != moment.name else ""
    if moment.why_not:
        return f"{called}: left out, as {moment.why_not}"
    return f"{called}, without its memory" if moment.memory else called


def _comment(text: str) -> Iterator[str]:
    if text:
        yield "# " + "".join(char if char.isprintable() else "?" for char in text)


def _machine(spec: MachineSpec) -> Iterator[str]:
    for key, value in _plain(spec).items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            yield f"{key}:"
            yield from _items(value)
        else:
            yield f"{key}: {_value(key, value)}"


def _items(items: Iterable[dict[str, Any]]) -> Iterator[str]:
    for item in items:
        mark = "- "
        for key, value in item.items():
            yield f"  {mark}{key}: {_value(key, value)}"
            mark = "  "


def _plain(value: MachineSpec) -> dict[str, Any]:
    """The keys that are no defaults, as a spec file has them."""

    def named(found: Any) -> Any:
        if isinstance(found, dict):
            return {key.replace("_", "-"): named(inner) for key, inner in found.items()}
        return [named(inner) for inner in found] if isinstance(found, list | tuple) else found

    plain: dict[str, Any] = named(msgspec.to_builtins(value.unplugged()))
    plain.pop("tcg-cpu", None)
    return plain


def _value(key: str, value: Any) -> str:
    if key in ("memory", "size"):
        return _size(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(name, inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value("", inner) for inner in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _size(value: int) -> str:
    unit, bytes_ = next(((unit, each) for unit, each in _KEEPS_UNITS if value % each == 0), ("B", 1))
    return f"{value // bytes_}{unit}"
