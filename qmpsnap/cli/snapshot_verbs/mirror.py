"""``mirror``: a disk is copied; the guest goes on with the copy or with what it has."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output, virsh
from qmpsnap.cli.common import Parsers, add_bandwidth, add_for_vm, add_format, operating
from qmpsnap.cli.progress import add_detach, add_progress, reporting

if TYPE_CHECKING:
    from qmpsnap.model.operations.operation import MirrorPlan


def register(parsers: Parsers) -> None:
    """Add the command and the names virsh has for it."""
    for name in ("mirror", "copy", "blockcopy"):
        help_ = "copy a disk while the guest runs, then switch to the copy or keep it apart"
        command = add_for_vm(parsers, name, _mirror, help=help_ if name == "mirror" else f"the same as mirror: {help_}")
        command.add_argument("disk", metavar="DISK", help="the disk")
        command.add_argument("target", metavar="TARGET", help="path of the copy, or nbd://HOST[:PORT]/EXPORT")
        end = command.add_mutually_exclusive_group(required=True)
        end.add_argument(
            "--pivot", dest="mode", action="store_const", const="pivot", help="switch the disk to the copy"
        )
        end.add_argument("--finish", dest="mode", action="store_const", const="finish", help="keep the disk as it is")
        command.add_argument(
            "--shallow", action="store_true", help="copy only the active layer, with the same backing file"
        )
        command.add_argument("--reuse", action="store_true", help="overwrite the image at TARGET")
        command.add_argument("--format", choices=("qcow2", "raw"), help="format of the copy (qcow2)")
        command.add_argument(
            "--blocking", action="store_true", help="let guest writes wait for the copy (write-blocking)"
        )
        command.add_argument(
            "--by",
            choices=("blockdev-mirror", "drive-mirror"),
            default="blockdev-mirror",
            help="to test QEMU: the QMP command (blockdev-mirror)",
        )
        command.add_argument("--dry-run", action="store_true", help="only print the files, QMP commands and bytes")
        add_bandwidth(command)
        add_progress(command)
        add_detach(command)
        add_format(command)
        virsh.add_harmless(command, name)


def _mirror(arguments: argparse.Namespace) -> None:
    from qmpsnap.model.machines.nbd import is_uri
    from qmpsnap.ops.mirror import mirror

    target = arguments.target if is_uri(arguments.target) else os.path.join(os.getcwd(), arguments.target)  # noqa: PTH109, PTH118 - nothing may be normalised
    request = mirror.MirrorRequest(
        disk=arguments.disk,
        target=target,
        mode=arguments.mode,
        shallow=arguments.shallow,
        reuse=arguments.reuse,
        format=arguments.format,
        write_blocking=arguments.blocking,
        bandwidth=arguments.bandwidth,
        by=arguments.by,
    )

    if arguments.dry_run:
        plan, commands = operating(lambda context: mirror.preview(context, arguments.machine, request))
        told = [{"execute": command, "arguments": given} for command, given in commands]
        document = describe(plan) | {"qmp": told}
        lines = [f"would {text(document)}; nothing was changed", *(f"  {json.dumps(each)}" for each in told)]
    else:
        with reporting(arguments) as report:
            plan = operating(lambda context: mirror.run(context, arguments.machine, request, report=report))
        document = describe(plan)
        lines = [text(document)]
        if plan.mode == "finish":
            lines.append(f"{output.printable(plan.target.path)} is not managed by qmpsnap")
    output.emit(
        arguments.output,
        document=document,
        names=[plan.target.path],
        table=lambda: "\n".join(lines),
        done="" if arguments.dry_run else f"done: {text(document)}",
    )
    if not arguments.dry_run and plan.mode == "pivot":
        from qmpsnap.cli import image_notes

        image_notes.tell_owner(arguments.machine)


def describe(plan: "MirrorPlan") -> dict[str, Any]:
    """The JSON of a mirror, as docs/reference/json.md describes it."""
    return {
        "machine": plan.machine,
        "disk": plan.disk,
        "mode": plan.mode,
        "target": plan.target.path,
        "format": plan.target.format,
        "shallow": plan.shallow,
        "reused": not plan.made,
        "layer": plan.target.id if plan.mode == "pivot" else None,
        "removed": [layer.path for layer in plan.removed if layer.owned],
        "bytes": plan.moves,
        "live": plan.live,
    }


def text(document: dict[str, Any]) -> str:
    """One sentence about a mirror."""
    how = "copy the active layer" if document["shallow"] else "copy all"
    end = f"switch to it as {document['layer']}" if document["layer"] else "leave the chain unchanged"
    return (
        f"{how} of disk {document['disk']} to {output.printable(document['target'])} ({output.size(document['bytes'])}"
        f" at most), {end}"
    )
