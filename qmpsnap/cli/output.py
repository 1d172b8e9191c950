"""What commands print: JSON, names, tables and trees on stdout, errors on stderr.

No library is needed for any of it, so that ``list`` and ``tree`` answer at once. All of it goes past Python's buffers:
one that could not be emptied would fail again, with nobody to tell, when the process ends. A stderr that cannot be
written stops nothing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

from qmpsnap.errors import HostCannot

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, Literal, TextIO

    from qmpsnap.errors import QmpsnapError

    Format = Literal["table", "json", "name"]

SCHEMA = "qmpsnap/1"
"""Names the shape of every JSON answer; it changes only when a field is taken away or changes its meaning."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEP = 1024
_LONGEST = 4000
"""Characters of an error's message on a terminal."""


def emit(
    form: Format, *, document: dict[str, Any], names: Iterable[str], table: Callable[[], str], done: str = ""
) -> None:
    """Print one answer in the form that was asked for."""
    if form == "json":
        text = _json({"schema": SCHEMA, **document}, sys.stdout, indent=2)
    else:
        text = "\n".join(names) if form == "name" else table()
    if text:
        say(text, done=done)


def say(text: str, *, done: str = "") -> None:
    """Print lines on stdout.

    ``done``: if something has changed, the sentence for stderr in case stdout cannot be written.
    """
    try:
        _pour(sys.stdout, f"{text}\n")
    except OSError as error:
        if done:
            note(f"qmpsnap: {printable(done)}; the answer cannot be written to standard output: {error.strerror}")
            return
        if isinstance(error, BrokenPipeError):
            raise
        raise HostCannot(
            f"the answer cannot be written to standard output: {error.strerror}",
            hint="free some space for the output, or redirect it",
        ) from error


def pass_on(stdout: bytes, stderr: bytes) -> None:
    """Print what another program has said, byte for byte."""
    _pour(sys.stdout, stdout)
    _pour(sys.stderr, stderr)


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
    """A tree drawn with lines below ``root``; ``children`` has of a key (None at first) the keys and texts below it."""
    lines = [root]
    fork, corner, line = ("├── ", "└── ", "│   ") if _takes(sys.stdout, "├└│─") else ("|-- ", "`-- ", "|   ")

    def draw(key: str | None, indent: str) -> None:
        below = children(key)
        for place, (child, text) in enumerate(below, start=1):
            last = place == len(below)
            lines.append(f"{indent}{corner if last else fork}{printable(text)}")
            draw(child, indent + ("    " if last else line))

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
    """The text without anything that could steer a terminal; an image in a cluster by its short name."""
    if text.startswith("json:"):
        from qmpsnap.model.machines.rbd import shown

        text = shown(text)
    return "".join(c if c.isprintable() else "?" for c in text)


def note(text: str) -> None:
    """Say something to the person at the terminal, beside the data; line breaks stay."""
    aside("\n".join(map(printable, text.split("\n"))) + "\n")


def aside(text: str) -> None:
    """Write to stderr as it is; if that fails, there is nobody to tell, and no reason to leave work half done."""
    with contextlib.suppress(OSError):
        _pour(sys.stderr, text)


def warn(sentences: Iterable[str]) -> None:
    """Say what is about to go wrong."""
    for sentence in sentences:
        note(f"warning: {printable(sentence)}")


def hint(text: str) -> None:
    """Say what to type next, if there is anything."""
    if text:
        note(f"hint: {_typed(text)}")


def _typed(text: str) -> str:
    """A hint as a person types it; plain text is that already."""
    if type(text) is str:
        return text
    from qmpsnap.cli.hints import as_typed

    return as_typed(text)


def told(error: QmpsnapError | None) -> int:
    """Say beside the data what is wrong with it; returns the exit code for that, 0 for nothing."""
    if error is None:
        return 0
    note(f"qmpsnap: {error.message}")
    hint(error.hint)
    return error.exit_code


def report(error: QmpsnapError, form: Format) -> None:
    """Print an error on stderr, as an object when JSON was asked for."""
    if form == "json":
        aside(_json({"schema": SCHEMA, **document(error)}, sys.stderr) + "\n")
        return
    # It may quote a word as long as the kernel lets one be, and nobody reads that to find the sentence's end.
    message = error.sentence
    note(f"qmpsnap: {message if len(message) <= _LONGEST else message[:_LONGEST] + ' ...'}")
    if error.effect == "unknown":
        note("qmpsnap: whether it took effect is not known yet")
    hint(error.hint)


def document(error: QmpsnapError) -> dict[str, str | None]:
    """The error as ``-o json`` prints it on stderr."""
    return {**error.as_dict(), "hint": _typed(error.hint)}


def _json(document: dict[str, Any], stream: TextIO, *, indent: int | None = None) -> str:
    """JSON that is as safe to look at as a table: what would steer a terminal is escaped, or what it cannot show."""
    import json

    text = json.dumps(document, indent=indent, ensure_ascii=False)
    text = "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
    return text if _takes(stream, text) else json.dumps(document, indent=indent)


def _encoding(stream: TextIO | None) -> str:
    return getattr(stream, "encoding", None) or "utf-8"


def _takes(stream: TextIO | None, text: str) -> bool:
    """Whether the stream's encoding has all these characters."""
    try:
        text.encode(_encoding(stream))
    except UnicodeEncodeError:
        return False
    return True


def _pour(stream: TextIO | None, said: str | bytes) -> None:
    """Write all of it now. A stream that was closed before we began is as good as ``/dev/null``."""
    if stream is None:
        return
    data = said if isinstance(said, bytes) else said.encode(_encoding(stream), "backslashreplace")
    try:
        stream.flush()
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # it is in memory
        stream.buffer.write(data) if hasattr(stream, "buffer") else stream.write(data.decode(_encoding(stream)))
        return
    except ValueError as error:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from error
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            _wait_for_room(descriptor)


def _wait_for_room(descriptor: int) -> None:
    """A process that shares the descriptor with us has made it non-blocking."""
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
