"""``snapshot push`` and ``snapshot pop``: snapshots as a stack."""

import argparse
from typing import TYPE_CHECKING

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, add_machine, controlling
from qmpsnap.cli.progress import add_progress, reporting
from qmpsnap.cli.snapshot_json import print_taken

if TYPE_CHECKING:
    from qmpsnap.controller import Controller
    from qmpsnap.model.snapshot import Snapshot
    from qmpsnap.ops.revert import Reverted


def register(verbs: Parsers) -> None:
    """Add the verbs."""
    command = add(verbs, "push", _push, help="take a snapshot to come back to with pop")
    add_machine(command)
    command.add_argument("name", metavar="NAME", nargs="?", help="its name; the next free snap-N without it")
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    add_format(command)

    command = add(verbs, "pop", _pop, help="go back to the current snapshot, and delete it")
    add_machine(command)
    add_progress(command)
    add_format(command)


def _push(arguments: argparse.Namespace) -> None:
    async def act(controller: "Controller") -> "Snapshot":
        vm = await controller.machine(arguments.machine)
        return await vm.push(arguments.name, description=arguments.message)

    print_taken(arguments, controlling(act))


def _pop(arguments: argparse.Namespace) -> None:
    with reporting(arguments.progress) as report:

        async def act(controller: "Controller") -> "Reverted":
            vm = await controller.machine(arguments.machine)
            return await vm.pop(report=report)

        done = controlling(act)
    for note in done.notes:
        output.note(note)
    name = done.snapshot.name
    text = f"machine {arguments.machine} is where it was at {name}, {done.state}; {name} is deleted"
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "snapshot": name, "state": done.state},
        names=[name],
        table=lambda: text,
        done=text,
    )
