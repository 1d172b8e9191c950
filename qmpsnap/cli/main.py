"""The command line's entry: parses, runs one command, turns errors into exit codes.

Starting takes longer than most commands, so only what a command needs is loaded: of the nouns' modules the one that
has it, and inside the command what is slow (asyncio, qemu.qmp, yaml, rich), so that ``list``, ``snapshot list`` and
``tree`` load none of it; ``tests/cli/test_lazy.py`` holds that.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

import qmpsnap
from qmpsnap.cli import output, supervised
from qmpsnap.errors import HostCannot, QmpsnapError, UsageError
from qmpsnap.host import descriptors, system_errors
from qmpsnap.model.names import is_text

NOUNS: Final = {
    "machine_verbs.doctor": ("doctor",),
    "demo": ("demo",),
    "machine_verbs.machine": (
        "define",
        "list",
        "show",
        "start",
        "stop",
        "pause",
        "resume",
        "wakeup",
        "undefine",
        "recover",
    ),
    "machine_verbs.guest": ("console", "exec", "fstrim"),
    "machine_verbs.adopt": ("adopt",),
    "snapshot_verbs.snapshot": ("snapshot", "tree"),
    "snapshot_verbs.save": ("save", "restore"),
    "machine_verbs.chain": ("chain",),
    "snapshot_verbs.commit_stream": ("commit", "blockcommit", "stream", "pull", "blockpull"),
    "snapshot_verbs.mirror": ("mirror", "copy", "blockcopy"),
    "snapshot_verbs.job": ("job",),
    "machine_verbs.check": ("check",),
    "machine_verbs.relocate": ("relocate",),
    "machine_verbs.log": ("log",),
}
"""The modules beside this one and the commands that each has, in the order of ``--help``."""

EXIT_CODES = """\
exit codes: 0 done, 2 usage or spec, 3 not found, 4 refused in this state, 5 QEMU or its monitor gone,
6 deadline passed, 7 store and disk disagree, 8 operation pending, 9 host cannot, 130 interrupted, 1 anything else"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today is another option's name tomorrow.
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}", hint=f"see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ARG002 - argparse's own
        # argparse leaves what it prints in a buffer; all that it prints here is an answer: --help, --version.
        output.say(message.rstrip("\n"))


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The whole command line, or where the first word is a command, as much of it as that needs."""
    top = _Parser(
        prog="qmpsnap",
        description="Snapshots of QEMU machines over QMP, without libvirtd.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"qmpsnap {qmpsnap.__version__}")
    parsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for noun in [noun for noun, commands in NOUNS.items() if command in commands] or NOUNS:
        import_module(f"qmpsnap.cli.{noun}").register(parsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    form: output.Format = "json" if _asks_for_json(words) else "table"
    arguments = None
    try:
        _require_text(words)
        arguments = parser(words[0] if words else None).parse_args(words)
        supervised.about(getattr(arguments, "machine", None), form)
        return arguments.run(arguments) or 0
    except QmpsnapError as error:
        output.report(error, form)
        return error.exit_code
    except KeyboardInterrupt:
        from qmpsnap.cli.interrupted import interrupted

        left = interrupted(getattr(arguments, "machine", None))
        output.report(left, form)
        return left.exit_code
    except BrokenPipeError:
        return 128 + signal.SIGPIPE  # the reader of our output has closed the pipe
    except Exception as error:
        if (what := system_errors.refused(error)) is None:
            raise
        told = _left(getattr(arguments, "machine", None), what)
        output.report(told, form)
        return told.exit_code


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
    supervised.want()
    code = main()
    supervised.end(code)
    gc.freeze()  # and nobody need take it apart at the end
    sys.exit(code)


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
    for word in words:
        if "\0" in word or not is_text(word):
            raise UsageError(f"{word!r} is not UTF-8 text", hint="use UTF-8")


def _asks_for_json(words: Sequence[str]) -> bool:
    # Asked of the raw words, as an error of the parser itself must come out in that form, too. What a command in the
    # guest is given is its own.
    ours = words[: words.index("--")] if "--" in words else words
    joined = " ".join(ours)
    return any(asked in f"{joined} " for asked in ("-o json ", "-ojson ", "--output json ", "--output=json "))
