"""``adopt``: a QEMU that somebody else launched, or images that nobody runs, become a machine."""

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from qmpsnap.block.image.header import conversion
from qmpsnap.cli import image_notes, output
from qmpsnap.cli.common import Parsers, add, add_format, controlling, on_machine, operating
from qmpsnap.errors import UsageError
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import check_disk_name, check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpsnap.api.controller import Controller
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.ops.adoption.take import TakePlan
    from qmpsnap.ops.base.context import Context

_IMAGE = re.compile(r"(?P<disk>[^=/]+)=(?P<path>.+?)(?:,format=(?P<format>[a-z0-9_-]+))?", flags=re.DOTALL)
_SOURCES = ("qmp", "image", "take")
_FITTING = {
    "allow": ("image",),
    "allow_extra": ("take",),
    "own": ("qmp", "image"),
    "spec": ("spec", "image"),
}
"""By option what it goes with; ``spec`` alone is of an adopted machine."""
_QEMUS = {"vhd": "vpc"}
"""Formats that QEMU calls otherwise than people do."""


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add(parsers, "adopt", _adopt, help="make a machine of a running QEMU, or of existing images")
    command.add_argument("name", metavar="NAME", help="name of the new machine; with --take, of an adopted one")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--qmp", metavar="SOCKET", help="QMP socket of the running QEMU, without another client")
    source.add_argument(
        "--image",
        metavar="DISK=PATH[,format=raw]",
        action="append",
        help="top image of an existing chain, as a disk of a stopped machine; repeatable",
    )
    source.add_argument(
        "--take", metavar="SPEC.yaml", help="launch an adopted machine by this spec, once its owner's QEMU has ended"
    )
    command.add_argument(
        "--own", action="store_true", help="let qmpsnap write to and remove the images that the guest writes to now"
    )
    command.add_argument("--allow", metavar="DIR", action="append", default=[], help="also allow backing files in DIR")
    command.add_argument(
        "--spec",
        action="store_true",
        help="only print a spec to edit: of the images, or for --take of the QEMU of an adopted machine",
    )
    command.add_argument("--allow-extra", action="store_true", help="with --take: accept its 'extra' QEMU arguments")
    command.add_argument("--dry-run", action="store_true", help="only print what would be adopted or taken")
    add_format(command)


def _adopt(arguments: argparse.Namespace) -> None:
    check_name(arguments.name, "machine")
    given = next((source for source in _SOURCES if getattr(arguments, source)), None)
    source = given or ("spec" if arguments.spec else None)
    for option, sources in _FITTING.items():
        if getattr(arguments, option) and source not in sources:
            named = " or ".join(f"--{each}" for each in sources if each != option)
            raise UsageError(f"--{option.replace('_', '-')} needs {named}")
    if source is None:
        raise UsageError("--qmp, --image, --take or --spec is needed", hint="--qmp SOCKET adopts a running QEMU")
    {"image": _import, "qmp": _running, "spec": _propose, "take": _take}[source](arguments)


def _running(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.adoption import adopt

    async def act(context: "Context") -> "adopt.Adopted":
        if not arguments.dry_run:
            return await adopt.run(context, arguments.name, Path(arguments.qmp), own=arguments.own)
        found, _ = await adopt.preview(context, arguments.name, Path(arguments.qmp), own=arguments.own)
        return adopt.Adopted(found.machine, found.disks, found.left_out)

    done = operating(act, make=not arguments.dry_run)
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
    for disk in done.disks:
        if disk.untold:
            output.note(f"qmpsnap: disk {disk.name}: {disk.untold}")
    for reason in done.left_out:
        output.note(f"left out: {output.printable(reason)}")
    if arguments.dry_run:
        return
    image_notes.tell_cost(arguments.name)
    image_notes.tell_owner(arguments.name)


def _import(arguments: argparse.Namespace) -> None:
    disks = tuple(replace(_disk(text), own=arguments.own) for text in arguments.image)
    spec = MachineSpec(name=arguments.name, disks=disks)
    folders = [Path(disk.image).parent for disk in disks if disk.image]
    if arguments.spec:
        _print_spec(arguments.output, spec, [*map(str, dict.fromkeys(folders)), *arguments.allow])
        return

    async def act(controller: "Controller") -> "tuple[Machine, list[Chain]]":
        allowed = [*folders, *map(Path, arguments.allow)]
        if arguments.dry_run:
            plan = (await controller.plan_define(spec, folders=allowed)).details
            assert plan.change.define
            forest = controller.context.store.forest().apply(plan.machine, plan.change)
            return plan.change.define, [forest.chain(disk, top) for disk, top in plan.change.active.items()]
        vm = await controller.define(spec, folders=allowed)
        return await vm.record(), [
            Chain(seen.disk, tuple(at.layer for at in seen.layers)) for seen in await vm.chains()
        ]

    machine, chains = controlling(act, make=not arguments.dry_run)
    documents = [
        {
            "disk": chain.disk,
            "device": None,
            "read_only": False,
            "filters": [],
            "layers": [{"node": None, "path": layer.path, "format": layer.format} for layer in chain.layers],
        }
        for chain in chains
    ]
    _emit(arguments, documents, machine.uuid, None)
    machine_type, memory = machine.spec.machine, output.size(machine.spec.memory)
    has = "would have" if arguments.dry_run else "has"
    output.note(
        f"machine {arguments.name} {has} default hardware: {machine_type}, {machine.spec.cpus} CPU, {memory}, BIOS and"
        " no network card"
    )
    given = " ".join(f"--image {shlex.quote(text)}" for text in arguments.image)
    line = f"qmpsnap adopt {arguments.name} {given} --spec > {arguments.name}.yaml"
    output.hint(output.printable(f"for other hardware, edit a spec and define that instead: {line}"))
    if not arguments.dry_run:
        image_notes.tell_cost(arguments.name)


def _propose(arguments: argparse.Namespace) -> None:
    """The command line of an adopted machine's QEMU as a spec, which people read before they agree to it."""
    from qmpsnap.imports import spec_text

    found = on_machine(arguments.name, lambda vm: vm.launched_as())
    command = f"qmpsnap adopt {arguments.name} --take SPEC.yaml"
    text = spec_text.render(found, define=command).replace("# Define it: ", "# Take it: ", 1)
    output.emit(
        arguments.output,
        document={
            "machine": arguments.name,
            "spec": text,
            "changed": list(found.changed),
            "left_out": list(found.left_out),
            "runs": found.runs,
        },
        names=[arguments.name],
        table=text.rstrip,
    )


def _take(arguments: argparse.Namespace) -> None:
    name, allow = arguments.name, arguments.allow_extra

    async def act(controller: "Controller") -> "TakePlan":
        spec, vm = controller.read_spec(arguments.take), await controller.machine(name)
        if arguments.dry_run:
            return (await vm.plan_take(spec, allow_extra=allow)).details
        return await vm.take(spec, allow_extra=allow)

    done = controlling(act)
    does = "would be" if arguments.dry_run else "is"
    after = f" once process {done.waits_for} has ended" if done.waits_for else ""
    line = f"machine {name} {does} launched by qmpsnap{after}"
    output.emit(
        arguments.output,
        document={
            "machine": name,
            "dry_run": arguments.dry_run,
            "waits_for": done.waits_for,
            "machine_type": done.spec.machine,
            "variables": done.variables,
            "disks": [{"disk": disk.name, "bus": disk.bus} for disk in done.spec.disks],
            "extra": list(done.spec.extra),
        },
        names=[name],
        table=lambda: f"{line}; nothing was changed" if arguments.dry_run else "",
        done="" if arguments.dry_run else line,
    )
    if arguments.dry_run:
        return
    output.note(f"{line}; its owner must not launch it any more")
    output.hint(f"qmpsnap stop {name}, then qmpsnap start {name}" if done.waits_for else f"qmpsnap start {name}")


def _print_spec(form: "output.Format", spec: MachineSpec, folders: "Sequence[str]") -> None:
    """The spec of a machine with these images, with the keys that people choose."""
    from qmpsnap.imports import spec_text
    from qmpsnap.imports.found import Imported

    allow = " ".join(f"--allow {shlex.quote(folder)}" for folder in folders)
    text = spec_text.render(
        Imported(origin="Existing images", spec=spec), define=f"qmpsnap define {spec.name}.yaml {allow}"
    )
    choose = "machine: q35\nmemory: 1G\ncpus: 1\nfirmware: bios  # or uefi, if it was installed so\nnics: [user]\n"
    text = text.replace("disks:\n", f"{choose}disks:\n", 1)
    output.emit(form, document={"machine": spec.name, "spec": text}, names=[spec.name], table=text.rstrip)


def _disk(text: str) -> DiskSpec:
    found = _IMAGE.fullmatch(text)
    if not found:
        raise UsageError(f"--image {text!r} is not DISK=PATH[,format=raw]", hint="as in --image vda=/path/to.qcow2")
    path, format_ = Path(found["path"]), found["format"] or "qcow2"
    if format_ not in ("qcow2", "raw"):
        raise UsageError(
            f"an image of format {format_} cannot be adopted: qmpsnap takes snapshots of qcow2 and raw images only",
            hint=conversion(str(path), _QEMUS.get(format_, format_)),
        )
    # Not resolved: a symlink is refused later, and the string is what the headers have to say.
    image = str(path if path.is_absolute() else Path.cwd() / path)
    return DiskSpec(name=check_disk_name(found["disk"]), image=image, format="raw" if format_ == "raw" else "qcow2")


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
    would = f"would adopt machine {arguments.name}; nothing was changed\n" if arguments.dry_run else ""
    output.emit(
        arguments.output,
        document={
            "machine": arguments.name,
            "dry_run": arguments.dry_run,
            "uuid": None if arguments.dry_run and not arguments.qmp else uuid,  # one is made up each time
            "pid": pid,
            "disks": disks,
        },
        names=[arguments.name],
        table=lambda: would + output.table(("DISK", "DEVICE", "FILTERS", "LAYERS", "ACTIVE"), rows),
        done="" if arguments.dry_run else f"machine {arguments.name} is adopted",
    )
