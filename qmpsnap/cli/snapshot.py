"""Snapshots: create, list, show, revert, rename, and the tree they form."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import delete, output
from qmpsnap.cli.common import Parsers, add, add_format, add_machine, controlling, reading
from qmpsnap.cli.progress import add_progress, reporting
from qmpsnap.errors import NotFoundError, UsageError
from qmpsnap.model.chain import Layer
from qmpsnap.model.snapshot import Snapshot
from qmpsnap.store.store import Store

if TYPE_CHECKING:
    from qmpsnap.controller import Controller
    from qmpsnap.model.machine import Machine
    from qmpsnap.model.operation import CreatePlan
    from qmpsnap.ops.revert import Preview, Reverted, Run

HERE = "(current, you are here)"


def register(parsers: Parsers) -> None:
    """Add the commands."""
    noun = parsers.add_parser("snapshot", help="take and list snapshots", description="Take and list snapshots.")
    verbs = noun.add_subparsers(title="verbs", metavar="VERB", required=True)

    command = add(verbs, "create", _create, help="take a snapshot of every disk at one instant; the guest runs on")
    add_machine(command)
    command.add_argument("name", metavar="NAME", nargs="?", help="its name; the next free snap-N without it")
    command.add_argument("--kind", choices=("disk",), default="disk", help="what it includes")
    command.add_argument("--disks", metavar="vda,vdb", help="only these disks")
    command.add_argument(
        "--file", metavar="DISK=PATH", action="append", default=[], help="the disk's new layer is made at PATH"
    )
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    command.add_argument("--no-snapshot", action="store_true", help="new layers only: nothing appears in the list")
    command.add_argument("--dry-run", action="store_true", help="print files and QMP commands, change nothing")
    add_format(command)

    command = add(verbs, "push", _create, help="take a snapshot to come back to with pop")
    add_machine(command)
    command.add_argument("name", metavar="NAME", nargs="?", help="its name; the next free snap-N without it")
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    command.set_defaults(disks=None, file=(), no_snapshot=False, dry_run=False)
    add_format(command)

    command = add(verbs, "pop", _pop, help="go back to the current snapshot, and delete it")
    add_machine(command)
    add_progress(command)
    add_format(command)

    command = add(verbs, "list", _list, help="the snapshots of a machine, oldest first")
    add_machine(command)
    add_format(command)

    command = add(verbs, "show", _show, help="one snapshot and where its content lies")
    add_machine(command)
    command.add_argument("name", metavar="NAME", help="the snapshot")
    add_format(command)

    delete.register(verbs)

    command = add(verbs, "revert", _revert, help="go back to a snapshot; what was written since is kept")
    add_machine(command)
    command.add_argument("name", metavar="NAME", help="the snapshot")
    command.add_argument("--discard", action="store_true", help="do not keep what was written since")
    after = command.add_mutually_exclusive_group()
    after.add_argument("--paused", action="store_true", help="leave the machine started, its vCPUs stopped")
    after.add_argument("--running", action="store_true", help="leave the machine running")
    command.add_argument("--dry-run", action="store_true", help="print what would be done, change nothing")
    add_format(command)

    command = add(verbs, "rename", _rename, help="give a snapshot another name")
    add_machine(command)
    command.add_argument("old", metavar="OLD", help="the snapshot")
    command.add_argument("new", metavar="NEW", help="its new name")

    command = add(parsers, "tree", _tree, help="which snapshot grew from which, and where the machine stands")
    add_machine(command)
    add_format(command)


def _create(arguments: argparse.Namespace) -> None:
    disks = None if arguments.disks is None else [part for part in arguments.disks.split(",") if part]
    if arguments.no_snapshot and (arguments.name or arguments.message):
        raise UsageError("--no-snapshot takes neither NAME nor --message: nothing would bear them; nothing was changed")

    files = _files(arguments.file)

    async def preview(controller: "Controller") -> tuple["Machine", "CreatePlan"]:
        vm = await controller.machine(arguments.machine)
        if arguments.no_snapshot:
            return await vm.preview_add_layers(disks=disks, files=files)
        return await vm.preview_snapshot(arguments.name, description=arguments.message, disks=disks, files=files)

    async def act(controller: "Controller") -> Snapshot:
        vm = await controller.machine(arguments.machine)
        return await vm.snapshot(arguments.name, description=arguments.message, disks=disks, files=files)

    if arguments.dry_run:
        _print_plan(arguments.output, *controlling(preview))
        return
    if arguments.no_snapshot:
        _add_layers(arguments, disks, files)
        return
    snapshot = controlling(act)
    with reading() as store:
        document = _document(store, arguments.machine, snapshot)
    took = f", {snapshot.pause_ms:.1f} ms" if snapshot.pause_ms is not None else ""
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "snapshot": document},
        names=[snapshot.name],
        table=lambda: f"snapshot {snapshot.name} of {', '.join(document['disks'])} taken ({snapshot.mode}{took})",
    )


def _files(named: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for text in named:
        disk, equals, path = text.partition("=")
        if not (disk and equals and path):
            raise UsageError(f"--file {text!r} is not DISK=PATH; nothing was changed")
        if disk in files:
            raise UsageError(f"--file names disk {disk} twice; nothing was changed")
        files[disk] = path
    return files


def _add_layers(arguments: argparse.Namespace, disks: list[str] | None, files: dict[str, str]) -> None:
    async def act(controller: "Controller") -> tuple[Layer, ...]:
        vm = await controller.machine(arguments.machine)
        return await vm.add_layers(disks=disks, files=files)

    layers = controlling(act)
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "snapshot": None,
            "layers": [{"layer": layer.id, "path": layer.path} for layer in layers],
        },
        names=[layer.id for layer in layers],
        table=lambda: f"{', '.join(layer.id for layer in layers)} active; no snapshot was listed",
    )


def _print_plan(form: output.Format, machine: "Machine", plan: "CreatePlan") -> None:
    from qmpsnap.ops.create import qmp_commands

    name = plan.change.snapshots[0].name if plan.change.snapshots else None
    what = f"take snapshot {name} of" if name else "add layers to"
    files = [{"create": overlay.layer.path, "backing": overlay.backing.path} for overlay in plan.overlays]
    commands = [
        {"execute": command, "arguments": machine.sent(arguments)} for command, arguments in qmp_commands(plan, machine)
    ]

    def text() -> str:
        lines = [f"would {what} machine {plan.machine}; nothing was changed", "files:"]
        lines += [f"  create {output.printable(f['create'])} on {output.printable(f['backing'])}" for f in files]
        lines += ["QMP commands:" if commands else "no QMP command: the machine is stopped"]
        lines += [f"  {json.dumps(command)}" for command in commands]
        return "\n".join([*lines, "bytes to move: 0"])

    output.emit(
        form,
        document={"machine": plan.machine, "snapshot": name, "files": files, "qmp": commands, "bytes": 0},
        names=[name] if name else [overlay.layer.id for overlay in plan.overlays],
        table=text,
    )


def _list(arguments: argparse.Namespace) -> None:
    with reading() as store:
        snapshots = store.snapshots(arguments.machine)
        documents = [_document(store, arguments.machine, snapshot) for snapshot in snapshots]
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "snapshots": documents},
        names=[snapshot.name for snapshot in snapshots],
        table=lambda: output.table(
            ("", "NAME", "KIND", "STATE", "PARENT", "CREATED", "DISKS", "DESCRIPTION"),
            [
                (
                    "*" if d["current"] else "",
                    d["name"],
                    d["kind"],
                    d["state"],
                    d["parent"] or "-",
                    d["created"],
                    ",".join(d["disks"]),
                    d["description"],
                )
                for d in documents
            ],
        ),
    )


def _show(arguments: argparse.Namespace) -> None:
    with reading() as store:
        found = [s for s in store.snapshots(arguments.machine) if s.name == arguments.name]
        if not found:
            raise NotFoundError(
                f"machine {arguments.machine} has no snapshot {arguments.name!r}",
                hint=f"qmpsnap snapshot list {arguments.machine}",
                machine=arguments.machine,
            )
        document = _document(store, arguments.machine, found[0])

    def text() -> str:
        plain = {key: value for key, value in document.items() if key != "disks"}
        plain["current"] = "yes" if plain["current"] else "no"
        lines = [
            f"{key + ':':14}{'-' if value in (None, '') else output.printable(str(value))}"
            for key, value in plain.items()
        ]
        rows = [(disk, d["layer"], d["tag"] or "-", d["path"]) for disk, d in document["disks"].items()]
        return "\n".join([*lines, "", output.table(("DISK", "LAYER", "TAG", "PATH"), rows)])

    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "snapshot": document},
        names=[arguments.name],
        table=text,
    )


def _revert(arguments: argparse.Namespace) -> None:
    state: Run | None = "paused" if arguments.paused else "running" if arguments.running else None

    async def look(controller: "Controller") -> "Preview":
        vm = await controller.machine(arguments.machine)
        return await vm.preview_revert(arguments.name, discard=arguments.discard, state=state)

    async def act(controller: "Controller") -> "Reverted":
        vm = await controller.machine(arguments.machine)
        return await vm.revert(arguments.name, discard=arguments.discard, state=state)

    if arguments.dry_run:
        _print_revert(arguments.output, controlling(look))
        return
    done = controlling(act)
    kept = f"what was active before is snapshot {done.kept.name}" if done.kept else ""
    gone = f"{', '.join(done.removed)} removed" if done.removed else ""
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "snapshot": done.snapshot.name,
            "kept": done.kept.name if done.kept else None,
            "removed": list(done.removed),
            "state": done.state,
        },
        names=[done.snapshot.name],
        table=lambda: "; ".join(
            filter(None, (f"machine {arguments.machine} is at {done.snapshot.name}, {done.state}", kept, gone))
        ),
    )


def _pop(arguments: argparse.Namespace) -> None:
    with reporting(arguments.progress) as report:

        async def act(controller: "Controller") -> "Reverted":
            vm = await controller.machine(arguments.machine)
            return await vm.pop(report=report)

        done = controlling(act)
    name = done.snapshot.name
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "snapshot": name, "state": done.state},
        names=[name],
        table=lambda: f"machine {arguments.machine} is where it was at {name}, {done.state}; {name} is deleted",
    )


def _print_revert(form: output.Format, found: "Preview") -> None:
    plan = found.plan
    files = [{"create": overlay.layer.path, "backing": overlay.backing.path} for overlay in plan.overlays]
    removed = [layer.path for layer in found.removed]
    commands = [{"execute": "quit"}] if plan.live else []
    start = ("paused" if plan.paused else "running") if plan.restart else None

    def text() -> str:
        lines = [f"would revert machine {plan.machine} to {plan.snapshot}; nothing was changed", "files:"]
        lines += [f"  create {output.printable(f['create'])} on {output.printable(f['backing'])}" for f in files]
        lines += [f"  remove {output.printable(path)}" for path in removed]
        lines += [f"snapshot {found.kept} would keep what is active now"] if found.kept else []
        lines += ["QMP commands:" if commands else "no QMP command: the machine is stopped"]
        lines += [f"  {json.dumps(command)}" for command in commands]
        lines += [f"then QEMU would be started, {start}" if start else "the machine would stay stopped"]
        return "\n".join([*lines, "bytes to move: 0"])

    output.emit(
        form,
        document={
            "machine": plan.machine,
            "snapshot": plan.snapshot,
            "files": files,
            "removed": removed,
            "kept": found.kept,
            "qmp": commands,
            "start": start,
            "bytes": 0,
        },
        names=[plan.snapshot],
        table=text,
    )


def _rename(arguments: argparse.Namespace) -> None:
    async def act(controller: "Controller") -> Snapshot:
        vm = await controller.machine(arguments.machine)
        return await vm.rename_snapshot(arguments.old, arguments.new)

    snapshot = controlling(act)
    output.note(f"snapshot {arguments.old} of machine {arguments.machine} is {snapshot.name} now")


def _tree(arguments: argparse.Namespace) -> None:
    with reading() as store:
        machine = store.machine(arguments.machine)
        snapshots = store.snapshots(arguments.machine)
        documents = [_document(store, arguments.machine, snapshot) for snapshot in snapshots]
    children: dict[str | None, list[tuple[str, str]]] = {}
    for snapshot in snapshots:
        kind = snapshot.kind if snapshot.state == "ok" else f"{snapshot.kind} ({snapshot.state})"
        text = f"{snapshot.name}  {output.moment(snapshot.created)}  {kind}  {snapshot.description}".rstrip()
        children.setdefault(snapshot.parent, []).append((snapshot.name, text))
    # A name cannot hold a parenthesis, so this key is nobody's parent.
    children.setdefault(machine.current, []).append((HERE, HERE))
    output.emit(
        arguments.output,
        document={"machine": machine.name, "current": machine.current, "snapshots": documents},
        names=[snapshot.name for snapshot in snapshots],
        table=lambda: output.tree(machine.name, lambda key: children.get(key, [])),
    )


def _document(store: Store, machine: str, snapshot: Snapshot) -> dict[str, Any]:
    """The JSON of one snapshot, as docs/cli.md describes it."""
    layers = _layers(store, snapshot)
    return {
        "name": snapshot.name,
        "kind": snapshot.kind,
        "state": snapshot.state,
        "parent": snapshot.parent,
        "current": store.machine(machine).current == snapshot.name,
        "created": output.moment(snapshot.created),
        "description": snapshot.description,
        "disks": {
            point.disk: {"layer": point.layer, "path": layers[point.layer].path, "tag": point.tag}
            for point in snapshot.points
        },
        "pause_ms": snapshot.pause_ms,
        "mode": snapshot.mode,
    }


def _layers(store: Store, snapshot: Snapshot) -> dict[str, Layer]:
    return {point.layer: store.layer(point.layer) for point in snapshot.points}
