"""What commands print: JSON, names, tables and trees on stdout, errors on stderr.

No library is needed for any of it, so that ``list`` and ``tree`` answer at once.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from qmpsnap.errors import QmpsnapError

SCHEMA = "qmpsnap/1"
"""Names the shape of every JSON answer; it changes only when a field is taken away or changes its meaning."""

Format = Literal["table", "json", "name"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEP = 1024
_LONGEST = 4000
"""Characters of an error's message on a terminal."""


def emit(form: Format, *, document: dict[str, Any], names: Iterable[str], table: Callable[[], str]) -> None:
    """Print one answer in the form that was asked for.

    Args:
        form: ``-o``.
        document: the JSON answer, without its schema.
        names: one per line for ``-o name``.
        table: makes the text for people.
    """
    if form == "json":
        print(_json({"schema": SCHEMA, **document}, indent=2))
    elif form == "name":
        for name in names:
            print(name)
    else:
        text = table()
        if text:
            print(text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(line(row) for row in (header, *cells))


def tree(root: str, children: Callable[[str | None], Sequence[tuple[str, str]]]) -> str:
    """A tree drawn with lines.

    Args:
        root: the first line.
        children: for a key (None for the root) the keys and texts of what hangs below it.
    """
    lines = [root]

    def draw(key: str | None, indent: str) -> None:
        below = children(key)
        for place, (child, text) in enumerate(below, start=1):
            last = place == len(below)
            lines.append(f"{indent}{'└── ' if last else '├── '}{printable(text)}")
            draw(child, indent + ("    " if last else "│   "))

    draw(None, "")
    return "\n".join(lines)


def size(number: int | None) -> str:
    """Bytes for people: ``16.2 MiB``."""
    if number is None:
        return "?"
    value = float(number)
    for unit in _UNITS:
        if value < _STEP or unit == _UNITS[-1]:
            break
        value /= _STEP
    return f"{number} B" if unit == "B" else f"{value:.1f} {unit}"


def printable(text: str) -> str:
    """The text without anything that could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def note(text: str) -> None:
    """Say something to the person at the terminal, beside the data; line breaks stay."""
    print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


def warn(sentences: Iterable[str]) -> None:
    """Say what is about to go wrong."""
    for sentence in sentences:
        note(f"warning: {printable(sentence)}")


def told(error: QmpsnapError | None) -> int:
    """Say beside the data what is wrong with it; returns the exit code for that, 0 for nothing."""
    if error is None:
        return 0
    note(f"qmpsnap: {error.message}")
    note(f"hint: {error.hint}")
    return error.exit_code


def report(error: QmpsnapError, form: Format) -> None:
    """Print an error on stderr, as an object when JSON was asked for."""
    if form == "json":
        print(_json({"schema": SCHEMA, **error.as_dict()}), file=sys.stderr)
        return
    # It may quote a word as long as the kernel lets one be, and nobody reads that to find the sentence's end.
    message = error.message
    note(f"qmpsnap: {message if len(message) <= _LONGEST else message[:_LONGEST] + ' ...'}")
    if error.effect == "unknown":
        note("qmpsnap: whether it took effect is not known yet")
    if error.hint:
        note(f"hint: {error.hint}")


def _json(document: dict[str, Any], *, indent: int | None = None) -> str:
    """JSON in UTF-8 that is as safe to look at as a table: what would steer a terminal is escaped."""
    text = json.dumps(document, indent=indent, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
