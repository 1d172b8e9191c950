"""``snapshot delete``: removes names and the layers that nothing needs any more, in the cheaper direction."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_bandwidth, add_for_vm, add_format, operating
from qmpsnap.cli.machine_verbs.disk import clone_text, clones
from qmpsnap.cli.progress import add_detach, add_progress, reporting

if TYPE_CHECKING:
    from qmpsnap.ops.snapshot.delete import DeletePlan


def register(verbs: Parsers) -> None:
    """Add the verb."""
    command = add_for_vm(verbs, "delete", _delete, help="delete snapshots, copying as few bytes as possible")
    command.add_argument("names", metavar="NAME", nargs="+", help="the snapshots")
    command.add_argument("--children", action="store_true", help="also delete their descendants")
    command.add_argument("--metadata", action="store_true", help="delete only the names and keep the layers")
    command.add_argument(
        "--flatten", action="store_true", help="let clones in a Ceph cluster that depend on them have a copy first"
    )
    command.add_argument(
        "--by",
        choices=("blockdev-snapshot-delete-internal-sync", "delvm"),
        default="blockdev-snapshot-delete-internal-sync",
        help="to test QEMU: its command for internal snapshots",
    )
    command.add_argument("--dry-run", action="store_true", help="only print the plan and its bytes")
    add_bandwidth(command)
    add_progress(command)
    add_detach(command)
    add_format(command)


def _delete(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.snapshot import delete

    request = delete.DeleteRequest(
        names=tuple(arguments.names),
        children=arguments.children,
        metadata=arguments.metadata,
        flatten=arguments.flatten,
        bandwidth=arguments.bandwidth,
        by=arguments.by,
    )
    if arguments.dry_run:
        plan, _ = operating(lambda context: delete.preview(context, arguments.machine, request))
    else:
        with reporting(arguments) as report:
            plan = operating(lambda context: delete.run(context, arguments.machine, request, report=report))
    document = document_of(plan)
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "dry_run": arguments.dry_run, **document},
        names=plan.names,
        table=lambda: text_of(document, dry_run=arguments.dry_run),
        done="" if arguments.dry_run else f"deleted {', '.join(plan.names)} of machine {arguments.machine}",
    )
    if not arguments.dry_run:
        from qmpsnap.cli import image_notes

        image_notes.tell_owner(arguments.machine)


def document_of(plan: "DeletePlan") -> dict[str, Any]:
    """The JSON of a plan, as docs/reference/json.md describes it."""
    return {
        "deleted": list(plan.names),
        "runs": [
            {
                "disk": reduction.disk,
                "layers": list(reduction.layers),
                "choices": [{"keeper": c.keeper, "how": c.how, "bytes": c.bytes} for c in reduction.choices],
                "removed": [layer.path for step in reduction.steps for layer in step.removed if layer.owned],
            }
            for reduction in plan.reductions
        ],
        "hidden": [layer.id for layer in plan.kept],
        "flattened": clones(plan.flattened),
        "bytes": plan.bytes,
    }


def text_of(document: dict[str, Any], *, dry_run: bool) -> str:
    """The same for people."""
    verb = "would delete" if dry_run else "deleted"
    lines = [f"{verb} {', '.join(document['deleted'])} ({output.size(document['bytes'])} at most to copy)"]
    for run in document["runs"]:
        for place, choice in enumerate(run["choices"]):
            chosen = "->" if place == 0 else "  "
            lines.append(
                f"  {run['disk']} {chosen} {choice['how']}: all into {choice['keeper']}, {output.size(choice['bytes'])}"
            )
        lines += [f"  {run['disk']}    removes {path}" for path in run["removed"]]
    lines += [f"  flattens {clone_text(clone)}" for clone in document["flattened"]]
    lines += [f"  keeps layer {layer}, which others read" for layer in document["hidden"]]
    return "\n".join(lines)
