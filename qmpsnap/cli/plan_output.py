"""Plans of new layers and snapshots, as a dry run prints them."""

import json
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output

if TYPE_CHECKING:
    from qmpsnap.api.plans import Plan, Shape
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.model.operations.copies import VolumeCopy
    from qmpsnap.model.operations.operation import CreatePlan, DefinePlan, InternalPlan
    from qmpsnap.ops.fork.run import Preview


def print_definition(form: "output.Format", plan: "DefinePlan") -> None:
    """The plan of a machine."""
    machine = plan.change.define
    assert machine
    backings = {overlay.layer.id: overlay.backing.path for overlay in plan.overlays}
    files = [
        {"create": made.path, "backing": backings.get(made.id), "size": made.virtual_size} for made in plan.created
    ]
    read = [layer.path for layer in plan.change.layers if not layer.owned]

    def text() -> str:
        lines = [f"would define machine {machine.name} ({machine.spec.machine}); nothing was changed", "files:"]
        for made in files:
            below = f" on {output.printable(str(made['backing']))}" if made["backing"] else ""
            lines.append(f"  create {output.printable(str(made['create']))}{below}")
        lines += [f"  create {output.printable(plan.variables)}"] if plan.variables else []
        return "\n".join([*lines, *(f"  read {output.printable(path)}" for path in read), "bytes to move: 0"])

    output.emit(
        form,
        document={
            "machine": machine.name,
            "dry_run": True,
            "machine_type": machine.spec.machine,
            "files": files,
            "read": read,
            "variables": plan.variables,
            "qmp": [],
            "bytes": 0,
        },
        names=[machine.name],
        table=text,
    )


def print_defined(form: "output.Format", machine: "Machine") -> None:
    """What became of a definition."""
    output.emit(
        form,
        document={"machine": machine.name, "uuid": machine.uuid, "machine_type": machine.spec.machine},
        names=[machine.name],
        table=lambda: "",
        done=f"machine {machine.name} was defined",
    )


def print_forks(form: "output.Format", found: "Preview") -> None:
    """The plans of forks, and of the snapshot that would be taken for them."""
    from qmpsnap.ops.snapshot.plan import qmp_commands

    first = found.plans[0]
    source = f"{first.parent}@{first.snapshot}"
    files = [
        {"machine": plan.machine, "create": one.layer.path, "backing": one.backing.path}
        for plan in found.plans
        for one in plan.overlays
    ]
    commands = []
    if found.taken:
        machine, taken = found.taken
        commands = [{"execute": name, "arguments": machine.sent(sent)} for name, sent in qmp_commands(taken, machine)]

    def text() -> str:
        lines = [f"would fork {source} {len(found.plans)} times; nothing was changed"]
        lines += [f"  take full snapshot {first.snapshot} of machine {first.parent} first"] if found.taken else []
        lines += ["  make a template of its memory first"] if first.bake else []
        lines += [f"  create {output.printable(f['create'])} on {output.printable(f['backing'])}" for f in files]
        lines += [f"  start machine {plan.machine}" for plan in found.plans]
        return "\n".join([*lines, *(f"  {json.dumps(command)}" for command in commands), "bytes to move: 0"])

    output.emit(
        form,
        document={
            "machine": first.parent,
            "snapshot": first.snapshot,
            "taken": found.taken is not None,
            "forks": [plan.machine for plan in found.plans],
            "bake": first.bake,
            "files": files,
            "qmp": commands,
            "bytes": 0,
        },
        names=[plan.machine for plan in found.plans],
        table=text,
    )


def print_plan(form: "output.Format", planned: "Plan[Any, Any] | Shape[Any]") -> None:
    """The plan of new layers, with a snapshot or without one."""
    plan: CreatePlan = planned.details
    name = plan.change.snapshots[0].name if plan.change.snapshots else None
    what = f"take snapshot {name} of" if name else "add layers to"
    files = [{"create": overlay.layer.path, "backing": overlay.backing.path} for overlay in plan.overlays]
    copies = plan.volumes
    volumes = [
        {"disk": copy.disk, "create": copy.layer.path, "of": copy.source.path, "reserve": copy.reserve}
        for copy in copies
    ]
    commands = list(planned.qmp)
    saved = plan.memory
    memory = {"path": saved.path, "mode": saved.mode, "why": saved.why} if saved else None

    def text() -> str:
        lines = [f"would {what} machine {plan.machine}; nothing was changed", "files:"]
        lines += [f"  create {output.printable(f['create'])} on {output.printable(f['backing'])}" for f in files]
        lines += [_snapshot(copy) for copy in copies]
        if memory:
            lines += [f"  create {output.printable(memory['path'])} with the memory ({memory['mode']})"]
            lines += [f"  the guest would be paused for the whole save: {memory['why']}"] if memory["why"] else []
        lines += _freeze(plan)
        lines += ["QMP commands:" if commands else "no QMP command: the machine is stopped"]
        lines += [f"  {json.dumps(command)}" for command in commands]
        lines += ["then the new layers would be committed back"] if volumes and files else []
        return "\n".join([*lines, "bytes to move: 0"])

    output.emit(
        form,
        document={
            "machine": plan.machine,
            "snapshot": name,
            "files": files,
            "volumes": volumes,
            "qmp": commands,
            "memory": memory,
            "quiesce": plan.quiesce,
            "bytes": 0,
        },
        names=[name] if name else [overlay.layer.id for overlay in plan.overlays],
        table=text,
    )


def _snapshot(copy: "VolumeCopy") -> str:
    line = f"  snapshot {output.printable(copy.layer.shown)} of {output.printable(copy.source.shown)}"
    if not copy.reserve:
        return line
    return f"{line}, which takes {copy.reserve} bytes and is lost once the guest has overwritten more than that"


def _freeze(plan: "CreatePlan | InternalPlan") -> list[str]:
    if plan.quiesce == "skip":
        return []
    return [f"  the guest agent would freeze its file systems ({plan.quiesce})"]


def print_internal(form: "output.Format", planned: "Plan[Any, Any] | Shape[Any]") -> None:
    """The plan of a snapshot inside the images."""
    plan: InternalPlan = planned.details
    name = plan.change.snapshots[0].name
    commands = list(planned.qmp)
    tags = [{"layer": layer.id, "tag": plan.tag} for layer in plan.layers.values()]

    def text() -> str:
        lines = [f"would take internal snapshot {name} of machine {plan.machine}; nothing was changed"]
        lines += [f"  tag {tag['tag']} inside {tag['layer']}" for tag in tags]
        lines += _freeze(plan)
        lines += (
            [f"  memory inside {plan.vmstate}; the guest would be paused for the whole save"] if plan.vmstate else []
        )
        return "\n".join([*lines, "QMP commands:", *(f"  {json.dumps(command)}" for command in commands)])

    output.emit(
        form,
        document={
            "machine": plan.machine,
            "snapshot": name,
            "tags": tags,
            "memory": plan.vmstate,
            "qmp": commands,
            "quiesce": plan.quiesce,
        },
        names=[name],
        table=text,
    )
