"""The command line as argparse knows it: of the nouns' modules only the one that has the command is loaded."""

import argparse
import re
from importlib import import_module
from typing import Any, Final, NoReturn

import qmpsnap
from qmpsnap.cli import output
from qmpsnap.errors import UsageError
from qmpsnap.model.text import nearest

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
    "machine_verbs.fork": ("fork",),
    "machine_verbs.template": ("template",),
    "machine_verbs.import_machine": ("import", "machine"),
    "snapshot_verbs.snapshot": ("snapshot", "tree"),
    "snapshot_verbs.save": ("save", "restore"),
    "machine_verbs.chain": ("chain",),
    "snapshot_verbs.commit_stream": ("commit", "blockcommit", "stream", "pull", "blockpull"),
    "snapshot_verbs.mirror": ("mirror", "copy", "blockcopy"),
    "snapshot_verbs.job": ("job",),
    "machine_verbs.change": ("set", "rename"),
    "machine_verbs.edit": ("edit",),
    "machine_verbs.disk": ("disk", "resize", "blockresize", "flatten"),
    "machine_verbs.nic": ("nic",),
    "machine_verbs.check": ("check",),
    "machine_verbs.relocate": ("relocate",),
    "machine_verbs.log": ("log",),
}
"""The modules beside this one and the commands that each has, in the order of ``--help``."""

EXIT_CODES = """\
exit codes: 0 done, 2 usage or spec, 3 not found, 4 refused in this state, 5 QEMU or its monitor gone,
6 deadline passed, 7 store and disk disagree, 8 operation pending, 9 host cannot, 130 interrupted, 1 anything else"""


_CHOICE: Final = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)", re.DOTALL)
"""What argparse says of a word that is none of those that it knows."""


class _Help(argparse.HelpFormatter):
    """argparse makes one for each argument, only to check that; and the terminal's width is slow to find out."""

    shown = False

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=None if _Help.shown else _WIDTH)


class _TopHelp(_Help, argparse.RawDescriptionHelpFormatter):
    """With the line breaks of the exit codes."""


_WIDTH: Final = 80


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today is another option's name tomorrow.
        super().__init__(**{"formatter_class": _Help, **options}, allow_abbrev=False)

    def format_help(self) -> str:
        _Help.shown = True
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        from qmpsnap.cli import virsh

        if found := _CHOICE.search(message):
            known = re.findall(r"[\w-]+", found[2])
            if said := virsh.answer(found[1], known):
                raise UsageError(f"unknown command {found[1]!r}", hint=said)
            message += nearest(found[1], known)
        raise UsageError(message, hint=virsh.answers(message) or f"see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ARG002 - argparse's own
        # argparse leaves what it prints in a buffer; all that it prints here is an answer: --help, --version.
        output.say(message.rstrip("\n"))


def parser(command: str = "", verb: str = "") -> argparse.ArgumentParser:
    """The whole command line, or where the first words are a command and its verb, as much of it as that needs."""
    top = _Parser(
        prog="qmpsnap",
        description="Snapshots of QEMU machines over QMP, without libvirtd.",
        epilog=EXIT_CODES,
        formatter_class=_TopHelp,
    )
    top.add_argument("--version", action="version", version=f"qmpsnap {qmpsnap.__version__}")
    parsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for noun in [noun for noun, commands in NOUNS.items() if command in commands] or NOUNS:
        register = import_module(f"qmpsnap.cli.{noun}").register
        register(parsers, verb) if command == "snapshot" else register(parsers)
    return top
