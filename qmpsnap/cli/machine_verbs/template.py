"""``template``: the memory of snapshots that forks share."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, controlling
from qmpsnap.model.timestamps import moment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpsnap.ops.fork.upkeep import Shelved


def register(parsers: Parsers) -> None:
    """Add the commands."""
    group = parsers.add_parser("template", help="list, prune", description="The memory that forks share.")
    verbs = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_format(add(verbs, "list", _list, help="list the templates of snapshots' memory that forks share"))
    command = add(verbs, "prune", _prune, help="remove the templates that no running fork uses")
    command.add_argument("--all", action="store_true", help="also those in use, which running forks keep")
    command.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    add_format(command)


def _list(arguments: argparse.Namespace) -> None:
    found = controlling(lambda q: q.templates())
    output.emit(
        arguments.output,
        document={"templates": [_document(one) for one in found]},
        names=[one.template.key for one in found],
        table=lambda: _table(found),
    )


def _prune(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        done = controlling(lambda q: q.plan_prune_templates(all=arguments.all)).details
    else:
        done = controlling(lambda q: q.prune_templates(all=arguments.all))
    freed = output.size(sum(one.bytes for one in done.removed if not one.forks))
    what = "would remove" if arguments.dry_run else "removed"
    output.emit(
        arguments.output,
        document={
            "dry_run": arguments.dry_run,
            "removed": [_document(one) for one in done.removed],
            "kept": [_document(one) for one in done.kept],
        },
        names=[one.template.key for one in done.removed],
        table=lambda: f"{what} {len(done.removed)} template(s), {freed}; {len(done.kept)} in use",
    )


def _table(found: "Sequence[Shelved]") -> str:
    rows = [
        (
            one.template.key[:12],
            one.template.source,
            output.size(one.bytes),
            len(one.forks),
            moment(one.used),
            "memory" if one.in_memory else "disk",
        )
        for one in found
    ]
    return output.table(("KEY", "SOURCE", "SIZE", "FORKS", "USED", "IN"), rows)


def _document(one: "Shelved") -> dict[str, Any]:
    return {
        "key": one.template.key,
        "source": one.template.source,
        "folder": one.folder,
        "bytes": one.bytes,
        "memory": one.template.ram.size,
        "sha256": one.template.digest,
        "forks": list(one.forks),
        "created": moment(one.template.created),
        "used": moment(one.used),
        "in_memory": one.in_memory,
    }
