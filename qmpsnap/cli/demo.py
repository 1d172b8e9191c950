"""``demo``: a guest writes, snapshots are taken, and every one of them is shown to hold what it should."""

import argparse

from qmpsnap.cli.common import Parsers, add


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add(parsers, "demo", _demo, help="boot the small guest, take snapshots, prove what they hold")
    command.add_argument("--keep", action="store_true", help="leave the machine and its images to look at")


def _demo(arguments: argparse.Namespace) -> int:
    from qmpsnap.cli.tour import run

    return run(keep=arguments.keep)
