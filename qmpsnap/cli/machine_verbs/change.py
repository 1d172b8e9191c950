"""A machine's spec and name, changed: ``set``, ``define --update`` and ``rename``."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, on_machine
from qmpsnap.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.api.plans import Plan
    from qmpsnap.model.machines.record import Machine
    from qmpsnap.model.machines.spec import MachineSpec
    from qmpsnap.ops.lifecycle.change import Changed
    from qmpsnap.ops.lifecycle.rename import Renamed


def register(parsers: Parsers) -> None:
    """Add the commands."""
    command = add_for_vm(parsers, "set", _set, help="change the spec of a stopped machine, which keeps its snapshots")
    command.add_argument(
        "settings", metavar="KEY=VALUE", nargs="+", help="as memory=4G or vda.cache=none; KEY= restores the default"
    )
    command.add_argument("--allow-extra", action="store_true", help="accept the spec's 'extra' QEMU arguments")
    command.add_argument("--dry-run", action="store_true", help="only print what would change")
    add_format(command)

    command = add_for_vm(parsers, "rename", _rename, help="give a stopped machine another name")
    command.add_argument("new", metavar="NEW", help="its new name")
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)


def _rename(arguments: argparse.Namespace) -> None:
    old, new = arguments.machine, arguments.new

    async def act(vm: "MachineHandle") -> "Plan[Renamed, Machine]":
        plan = await vm.plan_rename(new)
        if not arguments.dry_run:
            await vm.rename(new)
        return plan

    plan = on_machine(old, act)
    rewritten, others = [file.path for file in plan.files], plan.details.plan.others
    does = "would be" if arguments.dry_run else "is"
    lines = [f"machine {old} {does} {new}" + ("; nothing was changed" if arguments.dry_run else " now")]
    lines += [f"  {len(rewritten)} image(s) name their backing files at the new path"] if rewritten else []
    lines += [f"  of these, some are of {', '.join(others)}"] if others else []
    output.emit(
        arguments.output,
        document={
            "machine": new,
            "old": old,
            "dry_run": arguments.dry_run,
            "folder": plan.details.plan.new_folder,
            "rewritten": rewritten,
            "others": list(others),
        },
        names=[new],
        table=lambda: "\n".join(lines),
        done="" if arguments.dry_run else lines[0],
    )


def _set(arguments: argparse.Namespace) -> None:
    settings: dict[str, str] = {}
    for setting in arguments.settings:
        key, sign, value = setting.partition("=")
        if not key or not sign or key in settings:
            raise UsageError(f"{setting[:60]!r} is not KEY=VALUE, with each key once", hint="as in memory=4G")
        settings[key] = value
    change(arguments, settings)


def change(arguments: argparse.Namespace, settings: "Mapping[str, str] | MachineSpec") -> None:
    """Give the machine another spec, or tell what would become of that."""
    dry, allow = arguments.dry_run, arguments.allow_extra
    if dry:
        found = on_machine(arguments.machine, lambda vm: vm.plan_set(settings, allow_extra=allow)).details
        print_change(arguments, found, dry=True)
        return

    async def act(vm: "MachineHandle") -> "tuple[Changed, tuple[str, ...]]":
        return await vm.set(settings, allow_extra=allow), await vm.misfits()

    found, misfits = on_machine(arguments.machine, act)
    print_change(arguments, found, dry=False)
    tell_misfits(misfits)


def tell_misfits(sentences: "Iterable[str]") -> None:
    """Say what a start of the machine would lack on this host."""
    output.warn(f"a start would be refused: {sentence}" for sentence in sentences)


def print_change(arguments: argparse.Namespace, found: "Changed", *, dry: bool) -> None:
    """What has changed, or with ``dry`` would."""
    lines = lines_of(found)
    does = "would change" if dry else "changed"
    first = f"{does} machine {arguments.machine}" + ("; nothing was changed" if dry else "")
    output.emit(
        arguments.output,
        document=describe(found) | {"dry_run": dry},
        names=[arguments.machine],
        table=lambda: "\n".join([first, *lines] if lines else [f"machine {arguments.machine} has this spec already"]),
        done="" if dry else first,
    )


def lines_of(found: "Changed") -> list[str]:
    """The changes for people, and what they mean for snapshots."""
    lines = [f"  {key}: {_shown(before)} -> {_shown(now)}" for key, before, now in found.changes]
    for name, why in found.unloadable:
        lines.append(f"the memory of snapshot {name} does not fit this hardware: {'; '.join(why)}")
    if found.unloadable:
        lines.append(f"to load it: qmpsnap snapshot revert {found.machine.name} NAME --hardware snapshot")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as a spec has it
    return "default" if value is None else output.printable(str(value))


def describe(found: "Changed") -> dict[str, Any]:
    """The JSON of a change, as docs/reference/json.md describes it."""
    return {
        "machine": found.machine.name,
        "changes": [{"key": key, "before": before, "after": now} for key, before, now in found.changes],
        "unloadable": [{"snapshot": name, "why": list(why)} for name, why in found.unloadable],
    }
