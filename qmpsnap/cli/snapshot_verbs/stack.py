"""``snapshot push`` and ``snapshot pop``: snapshots as a stack."""

import argparse
from typing import TYPE_CHECKING

from qmpsnap.cli import image_notes, output
from qmpsnap.cli.common import Parsers, add_bandwidth, add_for_vm, add_format, on_machine, tell_remedy
from qmpsnap.cli.plan_output import print_plan
from qmpsnap.cli.progress import add_progress, reporting
from qmpsnap.cli.snapshot_verbs import delete, revert
from qmpsnap.cli.snapshot_verbs.snapshot_json import print_taken

if TYPE_CHECKING:
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.model.layers.snapshot import Snapshot


def register(verbs: Parsers) -> None:
    """Add the verbs."""
    command = add_for_vm(verbs, "push", _push, help="take a snapshot for pop")
    command.add_argument("name", metavar="NAME", nargs="?", help="name of the snapshot (next free snap-N)")
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    command.add_argument("--dry-run", action="store_true", help="only print the files and QMP commands")
    add_format(command)

    command = add_for_vm(verbs, "pop", _pop, help="revert to the snapshot that push took, and delete it")
    command.add_argument("--discard", action="store_true", help="accept losing a snapshot that push did not take")
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_bandwidth(command)
    add_progress(command)
    add_format(command)


def _push(arguments: argparse.Namespace) -> None:
    name, text = arguments.name, arguments.message
    if arguments.dry_run:
        print_plan(arguments.output, on_machine(arguments.machine, lambda vm: vm.plan_push(name, description=text)))
        return

    async def act(vm: "MachineHandle") -> tuple["Snapshot", tuple[str, ...]]:
        return await vm.push(name, description=text), await vm.left_out()

    snapshot, notes = on_machine(arguments.machine, act)
    for note in notes:
        output.note(note)
    print_taken(arguments, snapshot, notes)
    image_notes.tell_owner(arguments.machine)


def _pop(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        _preview_pop(arguments)
        return
    with reporting(arguments) as report:
        done = on_machine(
            arguments.machine,
            lambda vm: vm.pop(discard=arguments.discard, bandwidth=arguments.bandwidth, report=report),
        )
    revert.tell(done)
    name = done.snapshot.name
    where = f"machine {arguments.machine} is back at {name}, {done.state}"
    text = "; ".join(filter(None, (where, revert.clock_of(done), f"{name} is deleted")))
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "snapshot": name,
            "state": done.state,
            "memory": done.memory,
            "notes": list(done.notes),
            "clock_error_ms": done.clock_error_ms,
            "detached": [{"name": one.name, "file": one.file} for one in done.detached],
        },
        names=[name],
        table=lambda: text,
        done=text,
    )
    tell_remedy(done.state, arguments.machine)


def _preview_pop(arguments: argparse.Namespace) -> None:
    found = on_machine(arguments.machine, lambda vm: vm.plan_pop(discard=arguments.discard)).details
    back, gone = revert.document_of(found.revert), delete.document_of(found.delete)
    removed = [path for run in gone["runs"] for path in run["removed"]]
    both = {**back, **gone, "removed": back["removed"] + removed, "bytes": back["bytes"] + gone["bytes"]}
    output.emit(
        arguments.output,
        document=both,
        names=[back["snapshot"]],
        table=lambda: f"{revert.text_of(back)}\nthen {delete.text_of(gone, dry_run=True)}",
    )
