"""``save`` and ``restore``: a machine ends with its memory in a file, and goes on from there."""

import argparse

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, on_machine
from qmpsnap.cli.plan_output import print_plan
from qmpsnap.cli.progress import add_progress, reporting
from qmpsnap.cli.snapshot_verbs.revert import add_after, print_outcome, print_preview
from qmpsnap.cli.snapshot_verbs.snapshot import add_compress
from qmpsnap.cli.snapshot_verbs.snapshot_json import confined, print_snapshot


def register(parsers: Parsers) -> None:
    """Add the commands."""
    command = add_for_vm(parsers, "save", _save, help="save a machine's memory to a file and end QEMU")
    command.add_argument("file", metavar="FILE", nargs="?", help="new state file (beside the machine's images)")
    command.add_argument("--name", metavar="NAME", help="name of the snapshot (next free saved-N)")
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    add_compress(command)
    command.add_argument("--dry-run", action="store_true", help="only print the files and QMP commands")
    add_progress(command)
    add_format(command)

    command = add_for_vm(parsers, "restore", _restore, help="restore a saved machine")
    command.add_argument("file", metavar="FILE", nargs="?", help="state file (latest full snapshot)")
    command.add_argument("--discard", action="store_true", help="do not keep the present state")
    command.add_argument("--paused", action="store_true", help="leave the vCPUs stopped")
    add_after(command)
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)


def _save(arguments: argparse.Namespace) -> None:
    asked = {"name": arguments.name, "description": arguments.message, "compression": arguments.compress}
    if arguments.dry_run:
        plan = on_machine(arguments.machine, lambda vm: vm.plan_save(arguments.file, **asked))
        print_plan(arguments.output, plan)
        return
    with reporting(arguments) as report:
        snapshot = on_machine(arguments.machine, lambda vm: vm.save(arguments.file, **asked, report=report))
    assert snapshot.vmstate
    memory = f"{output.printable(snapshot.vmstate.path)} ({output.size(snapshot.vmstate.bytes)})"
    text = f"machine {arguments.machine} is saved as {snapshot.name} and stopped; its memory is in {memory}"
    print_snapshot(arguments, snapshot, text, notes=confined(snapshot))


def _restore(arguments: argparse.Namespace) -> None:
    asked = {"discard": arguments.discard, "paused": arguments.paused}
    if arguments.dry_run:
        plan = on_machine(arguments.machine, lambda vm: vm.plan_restore(arguments.file, **asked))
        print_preview(arguments.output, plan.details)
        return
    after = not arguments.no_after
    print_outcome(arguments, on_machine(arguments.machine, lambda vm: vm.restore(arguments.file, **asked, after=after)))
