"""Disks of a machine: ``disk attach``, ``disk detach``, ``resize`` and ``flatten``."""

import argparse
import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output, virsh
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, amount, on_machine, operating
from qmpsnap.cli.progress import add_progress, reporting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpsnap.model.operations.flatten import Clone
    from qmpsnap.model.operations.operation import ResizePlan
    from qmpsnap.ops.devices.attach import Attached
    from qmpsnap.ops.devices.detach import Detached


def register(parsers: Parsers) -> None:
    """Add the commands, and the name virsh has for one."""
    group = parsers.add_parser("disk", help="attach, detach", description="The disks of a machine.")
    verbs = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    command = add_for_vm(verbs, "attach", _attach, help="give a machine one more disk, also while it runs")
    command.add_argument("file", metavar="FILE", nargs="?", help="an existing image or block device")
    command.add_argument("--size", metavar="SIZE", help="size of a new image, or beside --base of its overlay")
    command.add_argument("--base", action="store_true", help="FILE, or VM@SNAPSHOT, stays read-only under an overlay")
    command.add_argument("--name", help="the disk's name (the next free of vda, vdb ...)")
    command.add_argument("--format", choices=("qcow2", "raw"), help="format of FILE, or of the new image (qcow2)")
    command.add_argument("--bus", choices=("virtio", "scsi", "sata", "nvme", "ide"), help="its bus (virtio)")
    command.add_argument("--read-only", action="store_true", help="the guest cannot write to it")
    command.add_argument("--own", action="store_true", help="FILE is qmpsnap's from now on: merges write to it")
    command.add_argument(
        "--allow", action="append", default=[], metavar="DIR", help="a folder that FILE's backing files may lie in"
    )
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)

    command = add_for_vm(
        verbs, "detach", _detach, help="take a disk from a machine, also while it runs; no file is removed"
    )
    command.add_argument("disk", metavar="DISK", help="the disk")
    command.add_argument(
        "--timeout", type=amount, default=30.0, metavar="SECONDS", help="how long a running guest is waited for (30)"
    )
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)

    for name in ("resize", "blockresize"):
        help_ = "give a disk more bytes, also while the guest runs"
        command = add_for_vm(parsers, name, _resize, help=help_ if name == "resize" else f"the same as resize: {help_}")
        command.add_argument("disk", metavar="DISK", help="the disk")
        command.add_argument("size", metavar="SIZE", help="new size, as 20G, or +5G for so much more")
        command.add_argument("--dry-run", action="store_true", help="only print the QMP command")
        add_format(command)
        virsh.add_harmless(command, name)
    command = add_for_vm(parsers, "flatten", _flatten, help="let a clone in a Ceph cluster have all data of its own")
    command.add_argument("disk", metavar="DISK", help="the disk")
    command.add_argument("--dry-run", action="store_true", help="only print the clone, its snapshot and the bytes")
    add_progress(command)
    add_format(command)


def _attach(arguments: argparse.Namespace) -> None:
    disk = _described(arguments)
    folders = [*map(Path, arguments.allow), *([Path(arguments.file).absolute().parent] if arguments.file else [])]
    if arguments.dry_run:
        plan = on_machine(arguments.machine, lambda vm: vm.plan_attach_disk(disk, folders=folders))
        found = plan.details
    else:
        found = on_machine(arguments.machine, lambda vm: vm.attach_disk(disk, folders=folders))
    does = "would attach" if arguments.dry_run else "attached"
    end = "; nothing was changed" if arguments.dry_run else ""
    first = f"{does} disk {found.disk.name} to machine {arguments.machine}: {output.printable(found.path)}{end}"
    output.emit(
        arguments.output,
        document=describe_attached(arguments.machine, found) | {"dry_run": arguments.dry_run},
        names=[found.disk.name],
        table=lambda: "\n".join([first, *_dry(arguments, found), *_unloadable(arguments.machine, found.unloadable)]),
        done="" if arguments.dry_run else first,
    )


def _described(arguments: argparse.Namespace) -> dict[str, object]:
    """The disk as a spec file would describe it."""
    content = "base" if arguments.base else "device" if _is_device(arguments.file) else "image"
    given = {
        "name": arguments.name,
        content: arguments.file,
        "size": arguments.size,
        "format": arguments.format,
        "bus": arguments.bus,
        "read-only": arguments.read_only or None,
        "own": arguments.own or None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _is_device(file: str | None) -> bool:
    try:
        return file is not None and stat.S_ISBLK(os.stat(file).st_mode)  # noqa: PTH116 - a name with a NUL, too
    except (OSError, ValueError):
        return False


def _detach(arguments: argparse.Namespace) -> None:
    name, disk = arguments.machine, arguments.disk
    if arguments.dry_run:
        found = on_machine(name, lambda vm: vm.plan_detach_disk(disk)).details
    else:
        found = on_machine(name, lambda vm: vm.detach_disk(disk, timeout=arguments.timeout))
    does = "would detach" if arguments.dry_run else "detached"
    end = "; nothing was changed" if arguments.dry_run else ""
    first = f"{does} disk {disk} from machine {name}{end}"
    rest = [f"its layers stay, kept by snapshot {found.kept}"] if found.kept else []
    rest = rest or [f"its image stays: {output.printable(found.path)}"]
    output.emit(
        arguments.output,
        document=describe_detached(name, found) | {"dry_run": arguments.dry_run},
        names=[disk],
        table=lambda: "\n".join([first, *rest, *_dry(arguments, found), *_unloadable(name, found.unloadable)]),
        done="" if arguments.dry_run else first,
    )


def _dry(arguments: argparse.Namespace, found: "Attached | Detached") -> list[str]:
    return [f"  {json.dumps(each)}" for each in _sent(found.commands)] if arguments.dry_run else []


def describe_attached(machine: str, found: "Attached") -> dict[str, Any]:
    """The JSON of an attachment, as docs/reference/json.md describes it."""
    return {
        "machine": machine,
        "disk": found.disk.name,
        "bus": found.disk.bus,
        "path": found.path,
        "created": [layer.path for layer in found.plan.created],
        "live": found.plan.live,
        "qmp": _sent(found.commands),
        "unloadable": _why(found.unloadable),
    }


def describe_detached(machine: str, found: "Detached") -> dict[str, Any]:
    """The JSON of a detachment, as docs/reference/json.md describes it."""
    return {
        "machine": machine,
        "disk": found.disk,
        "path": found.path,
        "kept": found.kept,
        "live": found.plan.live,
        "qmp": _sent(found.commands),
        "unloadable": _why(found.unloadable),
    }


def _sent(commands: "Iterable[tuple[str, dict[str, Any]]]") -> list[dict[str, Any]]:
    return [{"execute": command, "arguments": given} for command, given in commands]


def _why(unloadable: "Iterable[tuple[str, tuple[str, ...]]]") -> list[dict[str, Any]]:
    return [{"snapshot": name, "why": list(why)} for name, why in unloadable]


def _unloadable(machine: str, found: "Iterable[tuple[str, tuple[str, ...]]]") -> list[str]:
    lines = [f"the memory of snapshot {name} does not fit this hardware: {'; '.join(why)}" for name, why in found]
    return [*lines, *([f"to load it: qmpsnap snapshot revert {machine} NAME --hardware snapshot"] if lines else [])]


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
        with reporting(arguments) as report:
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
