"""Disks of a machine: ``resize`` and ``flatten``."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, operating
from qmpsnap.cli.progress import add_progress, reporting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpsnap.model.operations.flatten import Clone
    from qmpsnap.model.operations.operation import ResizePlan


def register(parsers: Parsers) -> None:
    """Add the commands, and the name virsh has for one."""
    for name in ("resize", "blockresize"):
        help_ = "give a disk more bytes, also while the guest runs"
        command = add_for_vm(parsers, name, _resize, help=help_ if name == "resize" else f"the same as resize: {help_}")
        command.add_argument("disk", metavar="DISK", help="the disk")
        command.add_argument("size", metavar="SIZE", help="new size, as 20G, or +5G for so much more")
        command.add_argument("--dry-run", action="store_true", help="only print the QMP command")
        add_format(command)
    command = add_for_vm(parsers, "flatten", _flatten, help="let a clone in a Ceph cluster have all data of its own")
    command.add_argument("disk", metavar="DISK", help="the disk")
    command.add_argument("--dry-run", action="store_true", help="only print the clone, its snapshot and the bytes")
    add_progress(command)
    add_format(command)


def _resize(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.lifecycle import resize

    request = resize.requested(arguments.disk, arguments.size)
    if arguments.dry_run:
        plan, (command, given) = operating(lambda context: resize.preview(context, arguments.machine, request))
        document = describe(plan) | {"qmp": [{"execute": command, "arguments": given}]}
        lines = [f"would {text(document)}; nothing was changed", *(f"  {json.dumps(each)}" for each in document["qmp"])]
    else:
        plan = operating(lambda context: resize.run(context, arguments.machine, request))
        document = describe(plan)
        lines = [f"resized disk {plan.disk} to {output.size(plan.size)}"]
    output.emit(
        arguments.output,
        document=document,
        names=[plan.layer.id],
        table=lambda: "\n".join(lines),
        done="" if arguments.dry_run else f"done: {text(document)}",
    )


def describe(plan: "ResizePlan") -> dict[str, Any]:
    """The JSON of a resize, as docs/reference/json.md describes it."""
    return {
        "machine": plan.machine,
        "disk": plan.disk,
        "layer": plan.layer.id,
        "path": plan.layer.path,
        "size_before": plan.layer.virtual_size,
        "size": plan.size,
        "live": plan.live,
    }


def text(document: dict[str, Any]) -> str:
    """One sentence about a resize."""
    sizes = f"from {output.size(document['size_before'])} to {output.size(document['size'])}"
    return f"resize disk {document['disk']} {sizes} (layer {document['layer']})"


def _flatten(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.merge import flatten

    machine, disk = arguments.machine, arguments.disk
    if arguments.dry_run:
        plan = operating(lambda context: flatten.preview(context, machine, disk))
    else:
        with reporting(arguments.progress) as report:
            plan = operating(lambda context: flatten.run(context, machine, disk, report=report))
    done = "would flatten" if arguments.dry_run else "flattened"
    lines = [f"{done} {clone_text(clone)}" for clone in clones(plan.clones)]
    if not lines:
        lines = [f"the image of disk {disk} depends on no snapshot: there is nothing to flatten"]
    elif arguments.dry_run:
        lines.append("nothing was changed")
    output.emit(
        arguments.output,
        document={
            "machine": machine,
            "disk": disk,
            "dry_run": arguments.dry_run,
            "flattened": clones(plan.clones),
            "bytes": plan.bytes,
        },
        names=[clone.layer.id for clone in plan.clones],
        table=lambda: "\n".join(lines),
        done="" if arguments.dry_run else f"done: {lines[0]}",
    )


def clones(found: "Iterable[Clone]") -> list[dict[str, Any]]:
    """The JSON of clones that are flattened, as docs/reference/json.md describes it."""
    return [
        {
            "disk": clone.disk,
            "layer": clone.layer.id,
            "image": clone.layer.shown,
            "parent": clone.parent,
            "bytes": clone.moves,
        }
        for clone in found
    ]


def clone_text(clone: dict[str, Any]) -> str:
    """One clone for people."""
    return f"{clone['image']}, a clone of {clone['parent']} ({output.size(clone['bytes'])} at most to copy)"
