"""``commit`` and ``stream``: layers become one, downwards or upwards."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output, virsh
from qmpsnap.cli.common import Parsers, add_bandwidth, add_for_vm, add_format, operating
from qmpsnap.cli.progress import add_detach, add_progress, reporting

if TYPE_CHECKING:
    from qmpsnap.model.operations.operation import Merge, MergePlan
    from qmpsnap.ops.merge.commit import Request


def register(parsers: Parsers) -> None:
    """Add the commands and the names virsh has for them."""
    for name in ("commit", "blockcommit"):
        command = add_for_vm(
            parsers, name, _commit, help=_alias(name, "commit", "merge layers into a layer below them")
        )
        command.add_argument("--base", metavar="L", help="layer or snapshot to merge into (lowest layer)")
        command.add_argument("--top", metavar="L", help="highest layer or snapshot to merge (active layer)")
        command.add_argument("--consume", action="store_true", help="accept that the commit invalidates snapshots")
        _finish(command, name)
    for name in ("stream", "pull", "blockpull"):
        help_ = _alias(name, "stream", "merge the layers below into the active layer, keeping all snapshots")
        command = add_for_vm(parsers, name, _stream, help=help_)
        command.add_argument("--base", metavar="L", help="layer or snapshot to stop above (merge all layers)")
        _finish(command, name)


def _alias(name: str, real: str, help_: str) -> str:
    return help_ if name == real else f"the same as {real}: {help_}"


def _finish(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("disk", metavar="DISK", help="the disk")
    command.add_argument("--dry-run", action="store_true", help="only print the layers, QMP command and bytes")
    add_bandwidth(command)
    add_progress(command)
    add_detach(command)
    add_format(command)
    virsh.add_harmless(command, name)


def _commit(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.merge.commit import CommitRequest

    request = CommitRequest(
        disk=arguments.disk,
        base=arguments.base,
        top=arguments.top,
        consume=arguments.consume or arguments.dry_run,
        bandwidth=arguments.bandwidth,
    )
    _merge(arguments, request)


def _stream(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.merge.commit import StreamRequest

    _merge(arguments, StreamRequest(disk=arguments.disk, base=arguments.base, bandwidth=arguments.bandwidth))


def _merge(arguments: argparse.Namespace, request: "Request") -> None:
    from qmpsnap.ops.merge import commit

    if arguments.dry_run:
        plan, command = operating(lambda context: commit.preview(context, arguments.machine, request))
        document = describe(plan) | {"qmp": [{"execute": command[0], "arguments": command[1]}]}
        lines = [f"would {text(document)}; nothing was changed", f"  {json.dumps(document['qmp'][0])}"]
    else:
        with reporting(arguments) as report:
            plan = operating(lambda context: commit.run(context, arguments.machine, request, report=report))
        document = describe(plan)
        lines = [text(document)]
    output.emit(
        arguments.output,
        document=document,
        names=[str(document["into"])],
        table=lambda: "\n".join(lines),
        done="" if arguments.dry_run else f"done: {text(document)}",
    )
    if not arguments.dry_run:
        from qmpsnap.cli import image_notes

        image_notes.tell_owner(arguments.machine)


def describe(plan: "MergePlan") -> dict[str, Any]:
    """The JSON of a plan with one merge, as docs/reference/json.md describes it."""
    step: Merge = plan.steps[0]  # type: ignore[assignment]
    ids = [layer.id for layer in step.chain]
    if step.kind == "commit":
        merged = ids[ids.index(step.into.id) + 1 : ids.index(step.top.id) + 1]
    else:
        merged = ids[ids.index(step.base.id) + 1 if step.base else 0 : ids.index(step.into.id)]
    return {
        "machine": plan.machine,
        "verb": plan.verb,
        "disk": step.disk,
        "into": step.into.id,
        "merged": merged,
        "removed": [layer.path for layer in step.removed if layer.owned],
        "consumed": [snapshot.name for snapshot in plan.opening.snapshots],
        "bytes": step.moves,
        "live": step.live,
    }


def text(document: dict[str, Any]) -> str:
    """One sentence about a merge."""
    lost = f"; snapshots invalidated: {', '.join(document['consumed'])}" if document["consumed"] else ""
    return (
        f"{document['verb']} {', '.join(document['merged'])} into {document['into']} of disk {document['disk']}"
        f" ({output.size(document['bytes'])} at most){lost}"
    )
