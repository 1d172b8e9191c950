"""The command line's entry: parses, runs one command, turns errors into exit codes.

Starting takes longer than most commands, so only what a command needs is loaded. ``list``, ``snapshot list`` and
``tree`` do without argparse and msgspec (``qmpsnap/cli/listing``); a command that is parsed loads no other noun's
module, and only inside itself what is slow (asyncio, qemu.qmp, yaml, rich). ``tests/cost`` holds how many modules each
loads.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys

from qmpsnap.cli import output
from qmpsnap.cli.listing import lines
from qmpsnap.errors import HostCannot, QmpsnapError, UsageError
from qmpsnap.host import descriptors, system_errors

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def main(argv: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """Run one command line; returns its exit code.

    Args:
        argv: its words; those of this process unless given.
        alone: this process is for nothing else, so that a child of it may do the work.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    form: output.Format = "json" if _asks_for_json(words) else "table"
    machine: str | None = None
    try:
        _require_text(words)
        if plain := lines.plain(words):
            machine = plain.machine or None
            return plain.run()
        from qmpsnap.cli import supervised
        from qmpsnap.cli.command_line import parser

        if alone:
            supervised.want()
        arguments = parser(*words[:2]).parse_args(words)
        machine = getattr(arguments, "machine", None)
        supervised.about(machine, form)
        return int(arguments.run(arguments) or 0)
    except QmpsnapError as error:
        return _told(error, form)
    except KeyboardInterrupt:
        from qmpsnap.cli.interrupted import interrupted

        return _told(interrupted(machine), form)
    except BrokenPipeError:
        from signal import SIGPIPE

        return 128 + SIGPIPE  # the reader of our output has closed the pipe
    except Exception as error:
        if (what := system_errors.refused(error)) is None:
            raise
        return _told(_left(machine, what), form)


def _told(error: QmpsnapError, form: output.Format) -> int:
    """Report an error, unless the process that watches this one has reported the end already; returns the exit code."""
    supervised = sys.modules.get("qmpsnap.cli.supervised")
    if supervised is None or supervised.may_report():
        output.report(error, form)
    return error.exit_code


def _left(machine: str | None, what: str) -> HostCannot:
    try:
        from qmpsnap.cli.interrupted import limited

        return limited(machine, what)
    except Exception:  # noqa: BLE001 - no file can be opened, not even that one
        return HostCannot(what, hint="ulimit -a", effect="unknown", machine=machine)


def run() -> NoReturn:
    """The console script."""
    descriptors.fill()
    descriptors.open_streams()
    _speak_utf8()
    gc.disable()  # what is imported stays: looking through it again and again would take longer than most commands
    code = main(alone=True)
    if supervised := sys.modules.get("qmpsnap.cli.supervised"):
        supervised.end(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # nobody need take apart what ends with the process


def _speak_utf8() -> None:
    """Begin again where the locale has made Python take names for another encoding: store, QEMU and specs have UTF-8.

    What is printed stays in the encoding that the terminal was said to have.
    """
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    told = {"PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or f"{sys.stdout.encoding}:backslashreplace"}
    os.execve(  # noqa: S606 - no shell wanted
        sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], {**os.environ, **told}
    )


def _require_text(words: Sequence[str]) -> None:
    # Python hands over bytes that are no UTF-8 as lone surrogates, which neither store nor QEMU could keep; a NUL
    # ends what the system takes for a path.
    if all(word.isascii() and word.isprintable() for word in words):
        return
    from qmpsnap.model.text import is_text

    for word in words:
        if "\0" in word or not is_text(word):
            raise UsageError(f"{word!r} is not UTF-8 text", hint="use UTF-8")


def _asks_for_json(words: Sequence[str]) -> bool:
    # Asked of the raw words, as an error of the parser itself must come out in that form, too. What a command in the
    # guest is given is its own, with or without `--` before it.
    if words[:1] == ["exec"]:
        return False
    joined = " ".join(words[: words.index("--")] if "--" in words else words)
    return any(asked in f"{joined} " for asked in ("-o json ", "-ojson ", "--output json ", "--output=json "))
