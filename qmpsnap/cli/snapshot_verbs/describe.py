"""``snapshot describe``, and the tags of other commands."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, on_machine
from qmpsnap.model import tags

if TYPE_CHECKING:
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.model.layers.snapshot import Snapshot


def add_tags(command: argparse.ArgumentParser, *, help: str) -> None:  # noqa: A002 - argparse's
    """``--tag KEY=VALUE``, for every command that gives a snapshot tags."""
    command.add_argument("--tag", metavar="KEY=VALUE", action="append", default=[], help=help)


def add_filter(command: argparse.ArgumentParser) -> None:
    """``--tag KEY[=VALUE]``, for every command that lists snapshots."""
    command.add_argument(
        "--tag",
        metavar="KEY[=VALUE]",
        action="append",
        default=[],
        help="only snapshots with this tag (with all of several)",
    )


def register(verbs: Parsers) -> None:
    """Add the command."""
    command = add_for_vm(verbs, "describe", _describe, help="change a snapshot's description and tags")
    command.add_argument("name", metavar="NAME", help="the snapshot")
    command.add_argument("text", metavar="TEXT", nargs="?", help="the new description (unchanged)")
    add_tags(command, help="add a tag, or replace the value of the one there")
    command.add_argument("--untag", metavar="KEY", action="append", default=[], help="remove a tag")
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)


def _describe(arguments: argparse.Namespace) -> None:
    said: dict[str, Any] = {"tags": tags.parsed(arguments.tag), "untag": arguments.untag}

    async def act(vm: "MachineHandle") -> "Snapshot":
        if arguments.dry_run:
            return (await vm.plan_describe_snapshot(arguments.name, arguments.text, **said)).details
        return await vm.describe_snapshot(arguments.name, arguments.text, **said)

    found = on_machine(arguments.machine, act)
    what = f"snapshot {found.name} of machine {arguments.machine}"
    would = f"{what} would be described as {found.description!r}"
    would += f", with the tags {tags.written(found.tags)}" if found.tags else ", without tags"
    if not arguments.dry_run:
        output.note(f"{what} was described")
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "dry_run": arguments.dry_run,
            "snapshot": found.name,
            "description": found.description,
            "tags": found.tags,
        },
        names=[found.name],
        table=lambda: f"{would}; nothing was changed" if arguments.dry_run else "",
        done="" if arguments.dry_run else "the snapshot was described",
    )
