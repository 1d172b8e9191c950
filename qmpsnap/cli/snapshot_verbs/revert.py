"""``snapshot revert``: back to a snapshot, and what it prints."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import image_notes, output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, on_machine, tell_remedy

if TYPE_CHECKING:
    from qmpsnap.ops.revert.plan import Run
    from qmpsnap.ops.revert.revert import Preview, Reverted


def register(verbs: Parsers) -> None:
    """Add the verb."""
    command = add_for_vm(
        verbs, "revert", _revert, help="revert to a snapshot; the present state is kept as another one"
    )
    command.add_argument("name", metavar="NAME", help="the snapshot")
    command.add_argument("--discard", action="store_true", help="do not keep the present state")
    after = command.add_mutually_exclusive_group()
    after.add_argument("--paused", action="store_true", help="start the machine with its vCPUs stopped")
    after.add_argument("--running", action="store_true", help="start the machine")
    command.add_argument(
        "--hardware",
        choices=("now", "snapshot"),
        default="now",
        help="start with the present spec (default) or with that of the snapshot",
    )
    add_after(command)
    command.add_argument(
        "--by", choices=("snapshot-load", "loadvm"), help="to test QEMU: its command for internal snapshots"
    )
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)


def add_after(command: argparse.ArgumentParser) -> None:
    """``--no-after``, where a guest goes on with memory."""
    command.add_argument(
        "--no-after", action="store_true", help="with memory: do not set the guest's clock or announce its network"
    )


def _revert(arguments: argparse.Namespace) -> None:
    state: Run | None = "paused" if arguments.paused else "running" if arguments.running else None

    name, discard, after = arguments.name, arguments.discard, not arguments.no_after
    if arguments.dry_run:
        plan = on_machine(
            arguments.machine,
            lambda vm: vm.plan_revert(name, discard=discard, state=state, hardware=arguments.hardware, by=arguments.by),
        )
        print_preview(arguments.output, plan.details)
        return
    done = on_machine(
        arguments.machine,
        lambda vm: vm.revert(
            name, discard=discard, state=state, hardware=arguments.hardware, after=after, by=arguments.by
        ),
    )
    print_outcome(arguments, done)


def print_outcome(arguments: argparse.Namespace, done: "Reverted") -> None:
    """Where the machine stands after a revert or a restore."""
    tell(done)
    goes_on = " with its memory" if done.memory else ""
    kept = f"the former state is snapshot {done.kept.name}" if done.kept else ""
    gone = f"{', '.join(done.removed)} removed" if done.removed else ""
    where = f"machine {arguments.machine} is at {done.snapshot.name}, {done.state}{goes_on}"
    text = "; ".join(filter(None, (where, clock_of(done), kept, gone)))
    output.emit(
        arguments.output,
        document={
            "machine": arguments.machine,
            "snapshot": done.snapshot.name,
            "kept": done.kept.name if done.kept else None,
            "removed": list(done.removed),
            "state": done.state,
            "memory": done.memory,
            "notes": list(done.notes),
            "clock_error_ms": done.clock_error_ms,
            "detached": [{"name": one.name, "file": one.file} for one in done.detached],
        },
        names=[done.snapshot.name],
        table=lambda: text,
        done=text,
    )
    tell_remedy(done.state, arguments.machine)
    image_notes.tell_scope(arguments.machine)


def tell(done: "Reverted") -> None:
    """What else there is to say of it, on stderr."""
    for note in done.notes:
        output.note(note)
    for one in done.detached:
        output.note(f"detached: {output.printable(f'{one.name} ({one.file})')}, which is no disk of the machine")


def clock_of(done: "Reverted") -> str:
    """How far the guest's clock is off, where that is known."""
    return "" if done.clock_error_ms is None else f"the guest's clock is off by {done.clock_error_ms:+.1f} ms"


def print_preview(form: "output.Format", found: "Preview") -> None:
    """The plan of a revert."""
    document = document_of(found)
    output.emit(form, document=document, names=[document["snapshot"]], table=lambda: text_of(document))


def document_of(found: "Preview") -> dict[str, Any]:
    """The JSON of a plan, as docs/reference/json.md describes it."""
    from qmpsnap.model.operations.operation import RevertPlan

    plan = found.plan
    files: list[dict[str, str]] = []
    if isinstance(plan, RevertPlan):
        files += [{"create": overlay.layer.path, "backing": overlay.backing.path} for overlay in plan.overlays]
        files += [{"create": clone.layer.path, "clone": clone.source.path} for clone in plan.clones]
        files += [{"overwrite": merge.layer.path, "merge": merge.snapshot.path} for merge in plan.merges]
        files += [{"create": copy.layer.path, "copy": copy.source.path, "tag": copy.tag} for copy in plan.copies]
    start = ("paused" if plan.paused else "running") if isinstance(plan, RevertPlan) and plan.restart else None
    return {
        "machine": plan.machine,
        "snapshot": plan.snapshot,
        "files": files,
        "removed": [layer.path for layer in found.removed],
        "kept": found.kept,
        "qmp": [{"execute": name, **({"arguments": given} if given else {})} for name, given in found.commands],
        "start": start,
        "memory": plan.vmstate.path if isinstance(plan, RevertPlan) and plan.vmstate else None,
        "in_place": not isinstance(plan, RevertPlan),
        "bytes": found.moves,
    }


def text_of(plan: dict[str, Any]) -> str:
    """The same for people."""
    files, removed, commands, memory = plan["files"], plan["removed"], plan["qmp"], plan["memory"]
    after = "the machine would stay stopped"
    if plan["in_place"]:
        after = "the running QEMU would load the memory inside the images"
    elif plan["start"]:
        after = f"then QEMU would be started, {plan['start']}"
    lines = [f"would revert machine {plan['machine']} to {plan['snapshot']}; nothing was changed"]
    lines += ["files:"] if files or removed else ["no files"]
    lines += [f"  {_file(f)}" for f in files]
    lines += [f"  remove {output.printable(path)}" for path in removed]
    lines += [f"snapshot {plan['kept']} would keep the present state"] if plan["kept"] else []
    lines += ["QMP commands:" if commands else "no QMP command: the machine is stopped"]
    lines += [f"  {json.dumps(command)}" for command in commands]
    lines += [after]
    lines += [f"with the memory in {output.printable(memory)}"] if memory else []
    return "\n".join([*lines, f"bytes to move: {plan['bytes']}"])


def _file(file: dict[str, str]) -> str:
    if "merge" in file:
        return f"merge {output.printable(file['merge'])} into {output.printable(file['overwrite'])}, and take it anew"
    return f"create {output.printable(file['create'])} {_from(file)}"


def _from(file: dict[str, str]) -> str:
    if "clone" in file:
        return f"as a clone of {output.printable(file['clone'])}"
    if "copy" in file:
        return f"as {output.printable(file['copy'])} was at its snapshot {file['tag']}"
    return f"on {output.printable(file['backing'])}"
