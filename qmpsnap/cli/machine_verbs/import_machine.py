"""``import``: a machine of libvirt, of Proxmox or of a command line as a spec, or with ``--define`` as a machine."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_for_vm, add_format, operating
from qmpsnap.cli.plan_output import print_defined, print_definition
from qmpsnap.errors import UsageError
from qmpsnap.imports.found import MAX_BYTES
from qmpsnap.model.names import check_name

if TYPE_CHECKING:
    from qmpsnap.imports.found import Imported


def register(parsers: Parsers) -> None:
    """Add the commands."""
    group = parsers.add_parser("import", help="machines of other managers", description="machines of other managers")
    verbs = group.add_subparsers(title="sources", metavar="SOURCE", required=True)

    command = add(verbs, "libvirt", _libvirt, help="make a spec or a machine of a libvirt domain")
    command.add_argument("file", metavar="FILE.xml", help="what virsh dumpxml prints; - for standard input")
    command.add_argument(
        "--snapshot",
        metavar="FILE",
        action="append",
        default=[],
        help="a snapshot of the domain, as virsh snapshot-dumpxml prints it; repeatable",
    )
    _add_options(command)

    command = add(verbs, "proxmox", _proxmox, help="make a spec or a machine of a Proxmox VM's configuration")
    command.add_argument("file", metavar="NUMBER.conf", help="a file of /etc/pve/qemu-server")
    command.add_argument(
        "--storage",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="folder of a storage of Proxmox', as its path in /etc/pve/storage.cfg; repeatable",
    )
    _add_options(command)

    command = add(verbs, "argv", _argv, help="make a spec or a machine of a QEMU command line")
    command.add_argument("--pid", type=int, metavar="N", help="take the command line of this process")
    _add_options(command)
    command.add_argument("words", nargs="*", metavar="-- QEMU ...", help="the command line, behind --")

    command = add(verbs, "bundle", _bundle, help="define the machine that machine export wrote")
    command.add_argument("file", metavar="FILE", help="the bundle")
    command.add_argument("--name", metavar="NAME", help="name of the machine (that of the original)")
    command.add_argument("--allow-extra", action="store_true", help="accept the machine's 'extra' QEMU arguments")
    command.add_argument("--dry-run", action="store_true", help="only print what the bundle says that it has")
    add_format(command)

    group = parsers.add_parser("machine", help="machines as a whole", description="machines as a whole")
    verbs = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    command = add_for_vm(verbs, "export", _export, help="write a stopped machine with its snapshots into one file")
    command.add_argument("--to", metavar="FILE", required=True, help="the new bundle")
    add_format(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", metavar="NAME", help="name of the machine (that of the original)")
    command.add_argument("--define", action="store_true", help="define the machine, with its snapshots")
    command.add_argument("--allow", metavar="DIR", action="append", default=[], help="also allow images in DIR")
    command.add_argument("--dry-run", action="store_true", help="only print what --define would do")
    add_format(command)


def _libvirt(arguments: argparse.Namespace) -> None:
    from qmpsnap.imports import libvirt

    name = _checked(arguments)
    snapshots = [(path, _read(path)) for path in arguments.snapshot]
    found = libvirt.read(_read(arguments.file), arguments.file, snapshots=snapshots, name=name)
    _finish(arguments, found)


def _proxmox(arguments: argparse.Namespace) -> None:
    from qmpsnap.imports import proxmox

    name = _checked(arguments)
    storage: dict[str, str] = {}
    for word in arguments.storage:
        key, equals, folder = word.partition("=")
        if not key or not equals or not folder:
            raise UsageError(f"--storage {word[:80]!r} is not NAME=DIR", hint="as in --storage local=/var/lib/vz")
        storage[key] = str(Path.cwd() / folder)
    _finish(arguments, proxmox.read(_read(arguments.file), arguments.file, storage=storage, name=name))


def _argv(arguments: argparse.Namespace) -> None:
    from qmpsnap.imports import argv
    from qmpsnap.imports.argv_words import Places

    name = _checked(arguments)
    if (arguments.pid is None) == (not arguments.words):
        raise UsageError("either --pid N or a command line is needed", hint="import argv -- qemu-system-x86_64 ...")
    if arguments.pid is None:
        _finish(arguments, argv.read(arguments.words, places=Places(str(Path.cwd())), name=name))
        return
    from qmpsnap.machine import originals

    words, folder, opened = originals.launched(arguments.pid)
    _finish(
        arguments, argv.read(words, places=Places(folder, opened), name=name, runs=f"it is process {arguments.pid}")
    )


def _bundle(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.lifecycle import bundle

    path = Path(arguments.file)
    if arguments.dry_run:
        told = operating(lambda context: bundle.preview(context, path, name=arguments.name))
        line = (
            f"would define machine {told.name} with {told.files} files; nothing was changed, nor is the bundle verified"
        )
        output.emit(
            arguments.output,
            document={
                "machine": told.name, "dry_run": True, "snapshots": list(told.snapshots), "files": told.files
            },
            names=[told.name],
            table=lambda: "\n".join([line, *(f"  snapshot {output.printable(name)}" for name in told.snapshots)]),
        )  # fmt: skip
        return
    machine = operating(
        lambda context: bundle.unpack(context, path, name=arguments.name, allow_extra=arguments.allow_extra), make=True
    )
    output.note(f"machine {machine.name} defined; start it with qmpsnap start {machine.name}")
    for key in ("kernel", "initrd"):
        if (file := getattr(machine.spec, key)) and not Path(file).exists():
            output.warn([f"its {key} {file} is not on this host; a bundle has disks and memory only"])
    print_defined(arguments.output, machine)


def _export(arguments: argparse.Namespace) -> None:
    from qmpsnap.ops.lifecycle import bundle

    size = operating(lambda context: bundle.export(context, arguments.machine, Path(arguments.to)))
    output.note(f"machine {arguments.machine} is in {arguments.to} ({output.size(size)})")
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "file": arguments.to, "bytes": size},
        names=[arguments.to],
        table=lambda: "",
        done=f"machine {arguments.machine} was exported",
    )


def _checked(arguments: argparse.Namespace) -> str | None:
    if arguments.dry_run and not arguments.define:
        raise UsageError("--dry-run needs --define")
    name: str | None = arguments.name
    return name if name is None else check_name(name, "machine")


def _read(path: str) -> bytes:
    """A description, of which never more is read than one may have."""
    if path == "-":
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a Path would not take every word
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{path}: cannot be read: {said}") from error


def _finish(arguments: argparse.Namespace, found: "Imported") -> None:
    if arguments.define:
        _define(arguments, found)
        return
    from qmpsnap.imports import spec_text

    folders = sorted({os.path.dirname(disk.image) for disk in found.spec.disks if disk.image})  # noqa: PTH120 - text
    allow = [word for folder in folders for word in ("--allow", folder)]
    text = spec_text.render(found, define=shlex.join(("qmpsnap", "define", "SPEC.yaml", *allow)))
    output.emit(
        arguments.output,
        document={
            "machine": found.spec.name,
            "origin": found.origin,
            "spec": text,
            "changed": list(found.changed),
            "left_out": list(found.left_out),
            "snapshots": [moment.name for moment in found.moments],
            "runs": found.runs or None,
        },
        names=[found.spec.name],
        table=text.rstrip,
    )


def _define(arguments: argparse.Namespace, found: "Imported") -> None:
    from qmpsnap.machine.config import specfile
    from qmpsnap.ops.adoption import take_over

    folders = [Path(folder) for folder in arguments.allow]
    from msgspec.structs import replace

    from qmpsnap.cli.common import home

    if (cdrom := found.spec.cdrom) and not Path(cdrom).exists():  # a medium that was forgotten in the drive
        found = replace(found, spec=replace(found.spec, cdrom=None), left_out=(*found.left_out, f"{cdrom} is missing"))
    found = replace(found, spec=specfile.checked(found.spec, folder=Path.cwd(), guest_dir=home().guest))
    act = take_over.preview if arguments.dry_run else take_over.run
    done = operating(lambda context: act(context, found, folders=folders), make=not arguments.dry_run)
    _tell(found, done.taken.left_out)
    if done.plan:
        print_definition(arguments.output, done.plan)
        return
    names = [snapshot.name for snapshot in done.taken.snapshots]
    output.note(
        f"machine {found.spec.name} defined ({done.machine.spec.machine})"
        f"{f' with {len(names)} snapshot(s): ' + ', '.join(names) if names else ''};"
        f" start it with qmpsnap start {found.spec.name}"
    )
    output.emit(
        arguments.output,
        document={
            "machine": done.machine.name,
            "uuid": done.machine.uuid,
            "machine_type": done.machine.spec.machine,
            "snapshots": names,
            "changed": list(found.changed),
            "left_out": [*found.left_out, *done.taken.left_out],
        },
        names=[done.machine.name],
        table=lambda: "",
        done=f"machine {done.machine.name} was defined",
    )


def _tell(found: "Imported", snapshots: tuple[str, ...]) -> None:
    for sentence in found.changed:
        output.note(f"differs: {output.printable(sentence)}")
    for sentence in (*found.left_out, *snapshots):
        output.note(f"left out: {output.printable(sentence)}")
