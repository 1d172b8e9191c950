"""Snapshots: create, list, show, and the tree they form."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import delete, output
from qmpsnap.cli.common import Parsers, add, add_format, add_machine, controlling, reading
from qmpsnap.errors import NotFoundError
from qmpsnap.model.chain import Layer
from qmpsnap.model.snapshot import Snapshot
from qmpsnap.store.store import Store

if TYPE_CHECKING:
    from qmpsnap.controller import Controller
    from qmpsnap.model.machine import Machine
    from qmpsnap.model.operation import CreatePlan

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
    command.add_argument("-m", "--message", default="", metavar="TEXT", help="a description")
    command.add_argument("--dry-run", action="store_true", help="print files and QMP commands, change nothing")
    add_format(command)

    command = add(verbs, "list", _list, help="the snapshots of a machine, oldest first")
    add_machine(command)
    add_format(command)

    command = add(verbs, "show", _show, help="one snapshot and where its content lies")
    add_machine(command)
    command.add_argument("name", metavar="NAME", help="the snapshot")
    add_format(command)

    delete.register(verbs)

    command = add(parsers, "tree", _tree, help="which snapshot grew from which, and where the machine stands")
    add_machine(command)
    add_format(command)


def _create(arguments: argparse.Namespace) -> None:
    disks = None if arguments.disks is None else [part for part in arguments.disks.split(",") if part]

    async def preview(controller: "Controller") -> tuple["Machine", "CreatePlan"]:
        vm = await controller.machine(arguments.machine)
        return await vm.preview_snapshot(arguments.name, description=arguments.message, disks=disks)

    async def act(controller: "Controller") -> Snapshot:
        vm = await controller.machine(arguments.machine)
        return await vm.snapshot(arguments.name, description=arguments.message, disks=disks)

    if arguments.dry_run:
        _print_plan(arguments.output, *controlling(preview))
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


def _print_plan(form: output.Format, machine: "Machine", plan: "CreatePlan") -> None:
    from qmpsnap.ops.create import qmp_commands

    name = plan.change.snapshots[0].name
    files = [{"create": overlay.layer.path, "backing": overlay.backing.path} for overlay in plan.overlays]
    commands = [{"execute": command, "arguments": arguments} for command, arguments in qmp_commands(plan, machine)]

    def text() -> str:
        lines = [f"would take snapshot {name} of machine {plan.machine}; nothing was changed", "files:"]
        lines += [f"  create {output.printable(f['create'])} on {output.printable(f['backing'])}" for f in files]
        lines += ["QMP commands:" if commands else "no QMP command: the machine is stopped"]
        lines += [f"  {json.dumps(command)}" for command in commands]
        return "\n".join([*lines, "bytes to move: 0"])

    output.emit(
        form,
        document={"machine": plan.machine, "snapshot": name, "files": files, "qmp": commands, "bytes": 0},
        names=[name],
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


def _tree(arguments: argparse.Namespace) -> None:
    with reading() as store:
        machine = store.machine(arguments.machine)
        snapshots = store.snapshots(arguments.machine)
        documents = [_document(store, arguments.machine, snapshot) for snapshot in snapshots]
    children: dict[str | None, list[tuple[str, str]]] = {}
    for snapshot in snapshots:
        text = f"{snapshot.name}  {output.moment(snapshot.created)}  {snapshot.kind}  {snapshot.description}".rstrip()
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
