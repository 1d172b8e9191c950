"""What the nouns share: options, and the two ways to the data."""

import argparse
import gc
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qmpsnap.model.home import Home
from qmpsnap.store import runfolder
from qmpsnap.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from qmpsnap.controller import Controller
    from qmpsnap.ops.context import Context

T = TypeVar("T")
Command = Callable[[argparse.Namespace], int | None]
Parsers = Any  # argparse's own type of what add_subparsers() returns is private


def add(parsers: Parsers, name: str, run: Command, *, help: str) -> argparse.ArgumentParser:  # noqa: A002 - argparse's
    """A subcommand whose help and description are the same sentence."""
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def add_format(parser: argparse.ArgumentParser) -> None:
    """``-o``, for every command that answers with data."""
    parser.add_argument("-o", "--output", choices=("table", "json", "name"), default="table", help="form of the answer")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The machine's name."""
    parser.add_argument("machine", metavar="VM", help="name of the machine")


def amount(text: str) -> float:
    """A time that an option gives: a wait without an end, or for no number at all, is a slip of the hand."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from zero up")
    return value


def home() -> Home:
    """The places, by the environment and the store."""
    return runfolder.followed(Home.from_environment(os.environ, uid=os.geteuid()))


@contextmanager
def reading() -> Iterator[SqliteStore]:
    """The store alone: for commands that must answer at once, whatever QEMU does."""
    places = home()
    with SqliteStore(places.store, machines=places.machines) as store:
        yield store


def controlling(act: Callable[["Controller"], Awaitable[T]]) -> T:
    """Run ``act`` with a controller, whose machines know every verb."""
    from qmpsnap.controller import Controller

    return operating(lambda context: act(Controller(context)))


def operating(act: Callable[["Context"], Awaitable[T]]) -> T:
    """Run ``act``, which calls its verb itself, so that no other is loaded; only here asyncio and qemu.qmp are."""
    import anyio

    from qmpsnap.ops.context import opened

    async def main() -> T:
        gc.freeze()
        gc.enable()  # all is imported, and a job may take hours
        async with opened() as context:
            return await act(context)

    return anyio.run(main)
