"""``demo``: runs ``examples/tour.py``, which the wheel has too."""

import argparse
import runpy

from qmpsnap.cli.common import Parsers, add, home


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add(parsers, "demo", _demo, help="take a tour on a small guest and check what every snapshot holds")
    command.add_argument("--keep", action="store_true", help="keep the machine and its images afterwards")


def _demo(arguments: argparse.Namespace) -> int:
    from qmpsnap.machine.config.launch_dir import build_guest, tour

    guest = home().guest
    build_guest(guest)
    return int(runpy.run_path(str(tour()))["main"](str(guest), *(["--keep"] if arguments.keep else [])))
