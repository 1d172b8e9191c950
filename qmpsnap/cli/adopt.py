"""``adopt``: a QEMU that somebody else launched, or images that nobody runs, become a machine."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, controlling
from qmpsnap.errors import UsageError
from qmpsnap.model.names import check_disk_name, check_name
from qmpsnap.model.spec import DiskSpec, MachineSpec

if TYPE_CHECKING:
    from qmpsnap.controller import Controller
    from qmpsnap.ops.adopt import Adopted

_IMAGE = re.compile(r"(?P<disk>[^=/]+)=(?P<path>.+?)(?:,format=(?P<format>qcow2|raw))?", flags=re.DOTALL)


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add(parsers, "adopt", _adopt, help="take over a running QEMU by its monitor, or images that nobody runs")
    command.add_argument("name", metavar="NAME", help="what the machine will be called")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--qmp", metavar="SOCKET", help="the running QEMU's monitor; nobody else may hold it")
    source.add_argument(
        "--image",
        metavar="DISK=PATH[,format=raw]",
        action="append",
        help="the top image of an existing chain as a disk of a stopped machine; may be repeated",
    )
    command.add_argument(
        "--allow", metavar="DIR", action="append", default=[], help="backing images may lie in DIR, too"
    )
    add_format(command)


def _adopt(arguments: argparse.Namespace) -> None:
    check_name(arguments.name, "machine")
    if arguments.image:
        _import(arguments)
        return
    if arguments.allow:
        raise UsageError("--allow goes with --image; a running QEMU has its images open already")

    async def act(controller: "Controller") -> "Adopted":
        return await controller.adopt(arguments.name, arguments.qmp)

    done = controlling(act, make=True)
    documents = [
        {
            "disk": disk.name,
            "device": disk.backend,
            "read_only": disk.read_only,
            "filters": list(disk.found.filters),
            "layers": [{"node": layer.node, "path": layer.path, "format": layer.format} for layer in disk.found.layers],
        }
        for disk in done.disks
    ]
    _emit(arguments, documents, done.machine.uuid, done.machine.process.pid if done.machine.process else None)
    for reason in done.left_out:
        output.note(f"left out: {output.printable(reason)}")


def _import(arguments: argparse.Namespace) -> None:
    disks = tuple(map(_disk, arguments.image))
    spec = MachineSpec(name=arguments.name, disks=disks)
    folders = [Path(disk.image).parent for disk in disks if disk.image]

    async def act(controller: "Controller") -> Any:
        vm = await controller.define(spec, folders=[*folders, *map(Path, arguments.allow)])
        return await vm.record(), await vm.chains()

    machine, chains = controlling(act, make=True)
    documents = [
        {
            "disk": chain.disk,
            "device": None,
            "read_only": False,
            "filters": [],
            "layers": [{"node": None, "path": at.layer.path, "format": at.layer.format} for at in chain.layers],
        }
        for chain in chains
    ]
    _emit(arguments, documents, machine.uuid, None)


def _disk(text: str) -> DiskSpec:
    found = _IMAGE.fullmatch(text)
    if not found:
        raise UsageError(
            f"--image {text!r} is not of the form DISK=PATH[,format=raw]", hint="--image vda=/path/to.qcow2"
        )
    path = Path(found["path"])
    # Not resolved: a symlink is refused later, and the string is what the headers have to say.
    image = str(path if path.is_absolute() else Path.cwd() / path)
    return DiskSpec(
        name=check_disk_name(found["disk"]), image=image, format="raw" if found["format"] == "raw" else "qcow2"
    )


def _emit(arguments: argparse.Namespace, disks: list[dict[str, Any]], uuid: str, pid: int | None) -> None:
    rows = [
        (
            disk["disk"],
            output.printable(disk["device"] or "-"),
            ",".join(map(output.printable, disk["filters"])) or "-",
            len(disk["layers"]),
            output.printable(disk["layers"][-1]["path"]),
        )
        for disk in disks
    ]
    output.emit(
        arguments.output,
        document={"machine": arguments.name, "uuid": uuid, "pid": pid, "disks": disks},
        names=[arguments.name],
        table=lambda: output.table(("DISK", "DEVICE", "FILTERS", "LAYERS", "ACTIVE"), rows),
        done=f"machine {arguments.name} is adopted",
    )
