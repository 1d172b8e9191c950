"""Snapshots: create, list, show, revert, describe, rename, and the tree they form."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import image_notes, output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, amount, on_machine
from qmpsnap.cli.listing import snapshots as listed
from qmpsnap.cli.listing.documents import state_word
from qmpsnap.cli.plan_output import print_internal, print_plan
from qmpsnap.cli.progress import add_progress, reporting
from qmpsnap.cli.snapshot_verbs import describe
from qmpsnap.cli.snapshot_verbs.snapshot_json import print_taken
from qmpsnap.errors import UsageError
from qmpsnap.model import tags
from qmpsnap.model.layers.snapshot import Snapshot

if TYPE_CHECKING:
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.api.plans import Plan
    from qmpsnap.model.operations.operation import CreatePlan

_NESTED = frozenset({"disks", "vmstate", "inside", "pause_ms", "pause_exceeded", "frozen_ms"})
"""Keys of a snapshot's JSON that its table shows otherwise."""


def register(parsers: Parsers, verb: str = "") -> None:
    """Add the commands; where ``verb`` is the one for which a guest may wait, it alone."""
    noun = parsers.add_parser("snapshot", help="take and list snapshots", description="Take and list snapshots.")
    verbs = noun.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_create(verbs)
    if verb != "create":
        _add_others(verbs)
        command = add_for_vm(parsers, "tree", _tree, help="draw the tree of a machine's snapshots")
        describe.add_filter(command)
        add_format(command)


def _add_create(verbs: Parsers) -> None:
    command = add_for_vm(verbs, "create", _create, help="take a snapshot of all disks at one point in time")
    command.add_argument("name", metavar="NAME", nargs="?", help="name of the snapshot (next free snap-N)")
    command.add_argument(
        "--kind",
        choices=("disk", "full", "internal", "volume"),
        default="disk",
        help="overlays of the disks (default), with memory, inside the images, or by their storage",
    )
    command.add_argument("--volume", action="store_true", help="full: the disks' part by their storage")
    command.add_argument("--mixed", action="store_true", help="volume: overlays where the storage has no snapshots")
    command.add_argument(
        "--lvm-size", metavar="SIZE", help="volume: size of thick LVM snapshots, as 500M or 10%% of the disk (20%%)"
    )
    command.add_argument("--disks", metavar="vda,vdb", help="only these disks")
    command.add_argument(
        "--file", metavar="DISK=PATH", action="append", default=[], help="create the overlay of DISK at PATH"
    )
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    describe.add_tags(command, help="give it a tag")
    command.add_argument("--no-snapshot", action="store_true", help="only create overlays, without a snapshot")
    command.add_argument("--max-pause", type=amount, metavar="MS", help="full: refuse a pause above MS milliseconds")
    command.add_argument("--degrade", action="store_true", help="full: keep a disk snapshot if the memory fails")
    add_compress(command)
    command.add_argument("--no-memory", action="store_true", help="internal: without memory")
    command.add_argument(
        "--quiesce",
        choices=("require", "prefer", "skip"),
        default="skip",
        help="freeze the guest's file systems: require it, prefer it, or skip it (default)",
    )
    command.add_argument("--freeze-window", type=float, metavar="S", help="maximum seconds to keep them frozen (5)")
    command.add_argument(
        "--by",
        choices=("blockdev-snapshot", "blockdev-snapshot-sync", "snapshot-save", "savevm"),
        help="to test QEMU: its command (blockdev-snapshot; internal: snapshot-save)",
    )
    command.add_argument("--dry-run", action="store_true", help="only print the files and QMP commands")
    add_progress(command)
    add_format(command)


def _add_others(verbs: Parsers) -> None:
    from qmpsnap.cli.snapshot_verbs import delete, revert, stack

    stack.register(verbs)

    command = add_for_vm(verbs, "list", _list, help="list the snapshots of a machine, oldest first")
    describe.add_filter(command)
    add_format(command)

    command = add_for_vm(verbs, "show", _show, help="show a snapshot and its files")
    command.add_argument("name", metavar="NAME", help="the snapshot")
    add_format(command)

    delete.register(verbs)

    revert.register(verbs)

    describe.register(verbs)

    command = add_for_vm(verbs, "rename", _rename, help="rename a snapshot")
    command.add_argument("old", metavar="OLD", help="the snapshot")
    command.add_argument("new", metavar="NEW", help="its new name")
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)


def add_compress(command: argparse.ArgumentParser) -> None:
    """``--compress``, for every command that saves memory."""
    command.add_argument(
        "--compress", choices=("none", "zstd"), default="none", help="compress the state file after it is written"
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that say nothing of what is asked for."""
    if arguments.no_snapshot and (arguments.name or arguments.message or arguments.tag):
        raise UsageError("--no-snapshot takes neither NAME, --message nor --tag")
    if arguments.no_snapshot and arguments.kind != "disk":
        raise UsageError(f"--no-snapshot and --kind {arguments.kind} exclude each other")
    if arguments.no_snapshot and (arguments.max_pause is not None or arguments.degrade or arguments.compress != "none"):
        raise UsageError("--no-snapshot takes neither --max-pause, --degrade nor --compress")
    if arguments.no_snapshot and (arguments.volume or arguments.mixed or arguments.lvm_size):
        raise UsageError("--no-snapshot takes neither --volume, --mixed nor --lvm-size")
    if arguments.no_snapshot and arguments.by:
        raise UsageError("--no-snapshot and --by exclude each other")
    if arguments.quiesce == "skip" and arguments.freeze_window is not None:
        raise UsageError("--freeze-window needs --quiesce require or prefer")
    if arguments.quiesce != "skip" and arguments.no_snapshot:
        raise UsageError("--no-snapshot and --quiesce exclude each other")


def _create(arguments: argparse.Namespace) -> None:
    _check(arguments)
    disks, files = _disks(arguments.disks), _files(arguments.file)
    if arguments.no_snapshot:
        (_preview_layers if arguments.dry_run else _add_layers)(arguments, disks, files)
        return
    options: dict[str, Any] = {  # which go with this kind, and which do not, the verb says
        "description": arguments.message,
        "tags": tags.parsed(arguments.tag),
        "disks": disks,
        "files": files,
        "max_pause_ms": arguments.max_pause,
        "compression": arguments.compress,
        "degrade": arguments.degrade,
        "memory": False if arguments.no_memory else None,
        "quiesce": arguments.quiesce,
        "volume": arguments.volume,
        "mixed": arguments.mixed,
        "by": arguments.by,
        "lvm_size": arguments.lvm_size,
    }
    if arguments.freeze_window is not None:
        options["freeze_window"] = arguments.freeze_window

    if arguments.dry_run:
        _preview(arguments, options)
        return
    with reporting(arguments) as report:

        async def act(vm: "MachineHandle") -> tuple[Snapshot, tuple[str, ...]]:
            taken = await vm.snapshot(arguments.name, kind=arguments.kind, report=report, **options)
            return taken, await vm.left_out()

        snapshot, notes = on_machine(arguments.machine, act)
    for note in notes:
        output.note(note)
    if snapshot.kind != arguments.kind:
        output.note(f"the memory was not saved: this is a {snapshot.kind} snapshot")
    if snapshot.pause_exceeded:
        output.note(
            f"the guest was paused for {snapshot.pause_ms:.0f} ms, above the {snapshot.max_pause_ms:g} ms of"
            " --max-pause; the snapshot is kept"
        )
    if snapshot.unquiesced:
        output.note(f"the guest's file systems were not frozen: {output.printable(snapshot.unquiesced)}")
    print_taken(arguments, snapshot, notes)
    if snapshot.kind != "internal":
        image_notes.tell_cost(arguments.machine, snapshot=snapshot.name)
    image_notes.tell_owner(arguments.machine)


def _disks(named: str | None) -> list[str] | None:
    if named is None:
        return None
    disks = [part for part in named.split(",") if part]
    if twice := next((disk for disk in disks if disks.count(disk) > 1), None):
        raise UsageError(f"--disks names disk {twice} twice")
    return disks


def _files(named: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for text in named:
        disk, equals, path = text.partition("=")
        if not (disk and equals and path):
            raise UsageError(f"--file {text!r} is not DISK=PATH")
        if disk in files:
            raise UsageError(f"--file names disk {disk} twice")
        files[disk] = path
    return files


def _add_layers(arguments: argparse.Namespace, disks: list[str] | None, files: dict[str, str]) -> None:
    layers = on_machine(arguments.machine, lambda vm: vm.add_layers(disks=disks, files=files))
    text = f"{', '.join(layer.id for layer in layers)} active; no snapshot was taken"
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "snapshot": None,
            "layers": [{"layer": layer.id, "path": layer.path} for layer in layers],
        },
        names=[layer.id for layer in layers],
        table=lambda: text,
        done=text,
    )
    image_notes.tell_owner(arguments.machine)


def _preview_layers(arguments: argparse.Namespace, disks: list[str] | None, files: dict[str, str]) -> None:
    plan = on_machine(arguments.machine, lambda vm: vm.plan_add_layers(disks=disks, files=files))
    print_plan(arguments.output, plan)


def _preview(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from qmpsnap.model.operations.operation import InternalPlan

    plan: Plan[CreatePlan | InternalPlan, Snapshot] = on_machine(
        arguments.machine, lambda vm: vm.plan_snapshot(arguments.name, kind=arguments.kind, **options)
    )
    if isinstance(plan.details, InternalPlan):
        print_internal(arguments.output, plan)
    else:
        print_plan(arguments.output, plan)


def _list(arguments: argparse.Namespace) -> None:
    listed.show(arguments.machine, arguments.output, tags.parsed_wanted(arguments.tag))


def _show(arguments: argparse.Namespace) -> None:
    found, document = listed.one(arguments.machine, arguments.name)

    def text() -> str:
        plain = {key: value for key, value in document.items() if key not in _NESTED}
        plain["state"] = state_word(plain["state"])
        plain["tags"] = tags.written(plain["tags"])
        for seldom in ("tags", "unquiesced", "variables"):
            if not plain[seldom]:
                del plain[seldom]
        longer = f", above the limit of {found.max_pause_ms:g} ms" if found.pause_exceeded else ""
        plain["pause"] = None if found.pause_ms is None else f"{found.pause_ms:.1f} ms{longer}"
        if found.frozen_ms is not None:
            plain["frozen"] = f"{found.frozen_ms:.1f} ms"
        if state := document["vmstate"]:
            plain["memory"] = f"{state['path']} ({output.size(state['bytes'])}, {state['mode']}, {state['layout']})"
        if inside := document["inside"]:
            plain["memory"] = f"inside {inside['layer']} ({output.size(inside['bytes'])})"
        plain["current"] = "yes" if plain["current"] else "no"
        lines = [
            f"{key + ':':14}{'-' if value in (None, '') else output.printable(str(value))}"
            for key, value in plain.items()
        ]
        rows = [(disk, d["layer"], d["tag"] or "-", d["path"] or "-") for disk, d in document["disks"].items()]
        return "\n".join([*lines, "", output.table(("DISK", "LAYER", "TAG", "PATH"), rows)])

    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "snapshot": document},
        names=[arguments.name],
        table=text,
    )


def _rename(arguments: argparse.Namespace) -> None:
    async def act(vm: "MachineHandle") -> None:
        rename = vm.plan_rename_snapshot if arguments.dry_run else vm.rename_snapshot
        await rename(arguments.old, arguments.new)

    on_machine(arguments.machine, act)
    what = f"snapshot {arguments.old} of machine {arguments.machine}"
    text = f"{what} would be {arguments.new}; nothing was changed" if arguments.dry_run else ""
    document = {"machine": arguments.machine, "dry_run": arguments.dry_run, "old": arguments.old}
    if not arguments.dry_run:
        output.note(f"{what} is {arguments.new} now")
    output.emit(
        arguments.output,
        document={**document, "snapshot": arguments.new},
        names=[arguments.new],
        table=lambda: text,
        done="" if arguments.dry_run else "the snapshot was renamed",
    )


def _tree(arguments: argparse.Namespace) -> None:
    listed.draw(arguments.machine, arguments.output, tags.parsed_wanted(arguments.tag))
