"""What the nouns share: options, and the two ways to the data."""

import argparse
import gc
import math
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qmpsnap.cli import output, supervised
from qmpsnap.errors import QmpsnapError, StoreMismatch
from qmpsnap.model.home import Home
from qmpsnap.store import owner, runfolder
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.store import Store

if TYPE_CHECKING:
    from qmpsnap.api.controller import Controller
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.ops.base.context import Context

T = TypeVar("T")
Command = Callable[[argparse.Namespace], int | None]
Parsers = Any  # argparse's own type of what add_subparsers() returns is private


def add(parsers: Parsers, name: str, run: Command, *, help: str) -> argparse.ArgumentParser:  # noqa: A002 - argparse's
    """A subcommand whose help and description are the same sentence."""
    parser: argparse.ArgumentParser = parsers.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def add_for_vm(parsers: Parsers, name: str, run: Command, *, help: str) -> argparse.ArgumentParser:  # noqa: A002
    """As :func:`add`, of a verb whose first argument is a machine's name."""
    parser = add(parsers, name, run, help=help)
    parser.add_argument("machine", metavar="VM", help="name of the machine")
    return parser


def add_format(parser: argparse.ArgumentParser) -> None:
    """``-o``, for every command that answers with data."""
    parser.add_argument("-o", "--output", choices=("table", "json", "name"), default="table", help="output format")


def amount(text: str) -> float:
    """A time that an option gives: a wait without an end, or for no number at all, is a slip of the hand."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not zero or a positive number")
    return value


def bandwidth(text: str) -> int:
    """Bytes per second that an option gives, with or without a unit."""
    from qmpsnap.model.sizes import UNITS, in_bytes

    value = in_bytes(text)
    if value is None or not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number of bytes; {UNITS}")
    return value


def add_bandwidth(parser: argparse.ArgumentParser) -> None:
    """``--bandwidth``, for every command that runs block jobs."""
    parser.add_argument(
        "--bandwidth",
        type=bandwidth,
        default=0,
        metavar="BYTES",
        help="bytes per second that its jobs copy at most, as in 50M (no limit)",
    )


def home() -> Home:
    """The places, by the environment and the store."""
    return runfolder.followed(Home.from_environment(os.environ, uid=os.geteuid()))


@contextmanager
def reading() -> Iterator[SqliteStore]:
    """The store alone: for commands that must answer at once, whatever QEMU does."""
    places = home()
    owner.require(places.run)
    with SqliteStore(places.store, machines=places.machines, make=False) as store:
        yield store


@contextmanager
def answering(done: str = "") -> Iterator[SqliteStore]:
    """The store alone, for the answer of a verb that is done, whatever keeps it from being read.

    ``done``: what the error says of it.
    """
    try:
        with reading() as store:
            yield store
    except QmpsnapError as error:
        error.claim("applied", done)
        raise


def untold(store: Store) -> StoreMismatch | None:
    """What an empty or short list of machines must not hide: there is no home, or its store has lost machines."""
    places = home()
    if lost := store.records.lost(wait=False):
        aside = " --set-aside" if store.machines() else ""
        what = "lacks" if store.is_there else "does not exist; it had"
        return StoreMismatch(
            f"the store {places.store} {what} {', '.join(lost)}, defined before",
            hint=f"put the store back, or rebuild it: qmpsnap check --rebuild{aside}",
        )
    if not store.is_there:
        return StoreMismatch(
            f"there is no home at {places.data}",
            hint="create it with qmpsnap define SPEC.yaml, or set QMPSNAP_HOME to another",
        )
    return None


def controlling(act: Callable[["Controller"], Awaitable[T]], *, make: bool = False) -> T:
    """Run ``act`` with a controller, whose machines know every verb."""
    supervised.split()  # what is loaded from here on, the parent does without
    from qmpsnap.api.controller import Controller

    return operating(lambda context: act(Controller(context)), make=make)


def on_machine(machine: str, act: Callable[["MachineHandle"], Awaitable[T]]) -> T:
    """Run ``act`` with the machine of that name."""

    async def found(controller: "Controller") -> T:
        return await act(await controller.machine(machine))

    return controlling(found)


def tell_remedy(state: str, machine: str) -> None:
    """What lets a guest in this state run on, as a hint; nothing where that is nobody's fault."""
    from qmpsnap.qmp import runstate

    output.hint(runstate.remedy(state, machine))


def operating(act: Callable[["Context"], Awaitable[T]], *, make: bool = False) -> T:
    """Run ``act``, which calls its verb itself, so that no other is loaded; only here asyncio and qemu.qmp are.

    ``make``: it may make the home, as only a new machine does.
    """
    supervised.split()
    import anyio

    from qmpsnap.api import forks
    from qmpsnap.ops.base.context import opened

    async def main() -> T:
        supervised.once()
        gc.freeze()
        gc.enable()  # all is imported, and a job may take hours
        async with opened(make=make) as context:
            await forks.sweep(context)
            return await act(context)

    supervised.by_asyncio()
    return anyio.run(main)
