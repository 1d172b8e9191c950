"""``fork``: machines that go on from a full snapshot of another one."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, on_machine
from qmpsnap.cli.plan_output import print_forks
from qmpsnap.errors import UsageError

if TYPE_CHECKING:
    from qmpsnap.ops.fork.run import Forked


def register(parsers: Parsers) -> None:
    """Add the commands."""
    command = add(parsers, "fork", _fork, help="make machines that go on from a full snapshot of another one")
    command.add_argument("source", metavar="VM[@SNAP]", help="the parent; without a snapshot, as it runs now")
    command.add_argument("name", metavar="NAME", nargs="?", help="name of the fork (next free VM-fN)")
    command.add_argument("-n", "--count", type=int, default=1, metavar="N", help="number of forks (1)")
    command.add_argument("--ephemeral", action="store_true", help="remove each fork once it has stopped")
    command.add_argument("--paused", action="store_true", help="leave the vCPUs stopped")
    command.add_argument(
        "--identity", choices=("keep", "fresh"), default="keep", help="fresh: the guest agent gives each its own"
    )
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="description of the snapshot taken")
    command.add_argument("--dry-run", action="store_true", help="only print the files and QMP commands")
    add_format(command)


def _fork(arguments: argparse.Namespace) -> None:
    machine, at, snapshot = arguments.source.partition("@")
    if at and not snapshot:
        raise UsageError(f"{arguments.source!r} names no snapshot", hint="write VM@SNAPSHOT, or VM alone")
    options = {
        "count": arguments.count,
        "ephemeral": arguments.ephemeral,
        "paused": arguments.paused,
        "identity": arguments.identity,
        "description": arguments.message,
    }
    if arguments.dry_run:
        found = on_machine(machine, lambda vm: vm.plan_fork(snapshot or None, arguments.name, **options)).details
        print_forks(arguments.output, found)
        return
    forks = on_machine(machine, lambda vm: vm.fork(snapshot or None, arguments.name, **options))
    _notes(forks)
    output.emit(
        arguments.output,
        document={"forks": [_document(fork) for fork in forks]},
        names=[fork.machine.name for fork in forks],
        table=lambda: "\n".join(_sentence(fork) for fork in forks),
        done=", ".join(fork.machine.name for fork in forks) + " was forked",
    )


def _document(fork: "Forked") -> dict[str, Any]:
    origin = fork.machine.origin
    assert origin
    return {
        "machine": fork.machine.name,
        "uuid": fork.machine.uuid,
        "parent": origin.machine,
        "snapshot": origin.snapshot,
        "taken": fork.taken,
        "ephemeral": origin.ephemeral,
        "identity": origin.identity,
        "lacks": list(origin.lacks),
        "background": fork.background or None,
    }


def _sentence(fork: "Forked") -> str:
    origin = fork.machine.origin
    assert origin
    return f"machine {fork.machine.name} goes on from {origin.name} (identity: {origin.identity})"


def _notes(forks: "list[Forked]") -> None:
    origin, spec = forks[0].machine.origin, forks[0].machine.spec
    if forks[0].background:
        output.note(f"full snapshots of these forks pause the guest for the whole save: {forks[0].background}")
    if origin and origin.identity == "twin" and any(nic.kind != "user" for nic in spec.nics):
        output.note("network cards on tap or bridge are unplugged: the guests still have the addresses of their parent")
