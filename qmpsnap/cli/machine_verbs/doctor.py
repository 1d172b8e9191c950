"""``doctor``: one line per ability of this host, with its remedy where it lacks."""

import argparse
from typing import TYPE_CHECKING

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, home
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot, StoreMismatch

if TYPE_CHECKING:
    from qmpsnap.doctor import Ability

_MARKS = {"yes": "green", "limited": "yellow", "no": "red"}


def register(parsers: Parsers) -> None:
    """Add the command."""
    add_format(add(parsers, "doctor", _doctor, help="show what this host supports, with a remedy for the rest"))


def _doctor(arguments: argparse.Namespace) -> int:
    import anyio

    from qmpsnap import doctor

    abilities = anyio.run(doctor.run, home())
    output.emit(
        arguments.output,
        document={
            "abilities": [
                {"name": a.name, "ok": a.ok, "detail": a.detail, "remedy": as_typed(a.remedy)} for a in abilities
            ]
        },
        names=[ability.name for ability in abilities],
        table=lambda: _print(abilities),
    )
    if any(ability.lost for ability in abilities):
        return StoreMismatch.exit_code
    return HostCannot.exit_code if any(ability.ok == "no" for ability in abilities) else 0


def _print(abilities: "list[Ability]") -> str:
    import io
    import sys

    from rich.console import Console
    from rich.text import Text

    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=sys.stdout.isatty() or None, highlight=False, soft_wrap=True)
    width = max(len(ability.name) for ability in abilities)
    for ability in abilities:
        console.print(Text(f"{ability.ok:8}", style=_MARKS[ability.ok]), end="")
        console.print(Text(f"{ability.name:{width}}  {output.printable(ability.detail)}"))
        if ability.remedy:
            console.print(Text(f"{'':8}{'':{width}}  remedy: {output.printable(as_typed(ability.remedy))}"))
    return drawn.getvalue().rstrip("\n")
