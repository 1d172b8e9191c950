"""Machines: define, list, show, start, stop, pause, resume, wakeup, undefine, recover."""

import argparse
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import image_notes, output
from qmpsnap.cli.common import (
    Parsers,
    add,
    add_for_vm,
    add_format,
    amount,
    controlling,
    home,
    on_machine,
    reading,
    tell_remedy,
)
from qmpsnap.cli.listing import looks
from qmpsnap.cli.plan_output import print_defined, print_definition
from qmpsnap.errors import DeadlinePassed, QemuGone
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.run_files import CONSOLE_SOCKET, USER_SOCKET
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.state import State
from qmpsnap.model.timestamps import moment

if TYPE_CHECKING:
    from qmpsnap.api.controller import Controller
    from qmpsnap.api.machine_handle import MachineHandle
    from qmpsnap.model.machines.spec import MachineSpec
    from qmpsnap.ops.base.free_space import Shortage
    from qmpsnap.store.sqlite.backend import SqliteStore


def register(parsers: Parsers) -> None:
    """Add the commands."""
    command = add(parsers, "define", _define, help="record a machine from a spec and create its disks")
    command.add_argument("spec", metavar="SPEC.yaml", help="spec of the machine; see launch/profiles for examples")
    command.add_argument("--allow", metavar="DIR", action="append", default=[], help="also allow images in DIR")
    command.add_argument("--allow-extra", action="store_true", help="accept the spec's 'extra' QEMU arguments")
    command.add_argument("--update", action="store_true", help="change the machine of that name to this spec")
    command.add_argument("--dry-run", action="store_true", help="only print the files that would be created")
    add_format(command)

    add_format(add(parsers, "list", _list, help="list the machines and their state"))

    command = add_for_vm(parsers, "show", _show, help="show a machine: state, process, monitor, disks, snapshots")
    add_format(command)

    command = add_for_vm(parsers, "start", _start, help="start a machine and wait for its monitor")
    command.add_argument("--paused", action="store_true", help="leave the vCPUs stopped")
    command.add_argument("--allow-extra", action="store_true", help="accept its present 'extra' QEMU arguments")

    command = add_for_vm(parsers, "stop", _stop, help="press the power button and wait for the guest to power off")
    command.add_argument("--force", action="store_true", help="quit QEMU after --timeout, or at once without it")
    command.add_argument("--timeout", type=amount, metavar="S", help="seconds to wait for the guest (60)")

    add_for_vm(parsers, "pause", _pause, help="stop the vCPUs of a guest")
    add_for_vm(
        parsers, "resume", _resume, help="resume a paused guest, also one that QEMU paused because a disk was full"
    )
    add_for_vm(parsers, "wakeup", _wakeup, help="wake a suspended guest (ACPI S3)")

    command = add_for_vm(parsers, "undefine", _undefine, help="remove a machine and its snapshots from the store")
    fate = command.add_mutually_exclusive_group()
    fate.add_argument("--keep-disks", dest="disks", action="store_const", const="keep", help="keep its images as files")
    fate.add_argument("--remove-disks", dest="disks", action="store_const", const="remove", help="delete its images")
    command.add_argument("--dry-run", action="store_true", help="only print the files that would be kept or removed")
    add_format(command)

    command = add(parsers, "recover", _recover, help="complete or undo interrupted operations")
    command.add_argument("machine", metavar="VM", nargs="?", help="name of the machine (all machines)")


def _define(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    folders = [Path(folder) for folder in arguments.allow]

    if arguments.update:
        from qmpsnap.cli.machine_verbs.change import change

        spec = controlling(lambda q: _read(q, arguments.spec))
        arguments.machine = spec.name
        change(arguments, spec)
        return
    if arguments.dry_run:
        plan = controlling(lambda q: q.plan_define(arguments.spec, folders=folders, allow_extra=arguments.allow_extra))
        print_definition(arguments.output, plan.details)
        return

    async def act(controller: "Controller") -> tuple[Machine, tuple[str, ...]]:
        vm = await controller.define(arguments.spec, folders=folders, allow_extra=arguments.allow_extra)
        return await vm.record(), await vm.misfits()

    from qmpsnap.cli.machine_verbs.change import tell_misfits

    machine, misfits = controlling(act, make=True)
    output.note(f"machine {machine.name} defined ({machine.spec.machine}); start it with qmpsnap start {machine.name}")
    print_defined(arguments.output, machine)
    tell_misfits(misfits)
    if any(disk.image for disk in machine.spec.disks):
        image_notes.tell_cost(machine.name)


async def _read(controller: "Controller", spec: str) -> "MachineSpec":
    return controller.read_spec(spec)


def _list(arguments: argparse.Namespace) -> int:
    from qmpsnap.cli.listing import machines

    return machines.show(arguments.output)


def _process(machine: Machine, store: "SqliteStore") -> Any:
    record = store.home.record()
    copied = record.path if record and record.path != str(home().data) else None
    return processes.find(machine, home().run_dir(machine.name), not_of=copied)


def _show(arguments: argparse.Namespace) -> None:
    async def found(vm: "MachineHandle") -> "tuple[Machine, State, tuple[Shortage, ...]]":
        try:
            state = await vm.state()
        except (DeadlinePassed, QemuGone) as error:
            # A hung QEMU hides its state and nothing else.
            output.note(f"qmpsnap: {error.message}")
            state = State.UNKNOWN
        return await vm.record(), state, await vm.shortage()

    machine, state, shortage = on_machine(arguments.machine, found)
    with reading() as store:
        chains = store.chains(machine.name)
        snapshots = store.snapshots(machine.name)
        process = _process(machine, store)
        pids = {machine.name: process.pid} if process else {}
        look = looks.images(store.images, [machine], pids).get(machine.name)
    document = {
        **_of_machine(machine, state if looks.is_here(machine) else "unknown", process),
        "disks": [
            {
                "disk": chain.disk,
                "layer": chain.active.id,
                "path": chain.active.path,
                "format": chain.active.format,
                "virtual_size": chain.active.virtual_size,
                "depth": len(chain.layers),
            }
            for chain in chains
        ],
        "snapshots": [snapshot.name for snapshot in snapshots],
        "images": look.word if look else "not asked",
        "nics": _nics(machine),
        "origin": _origin(machine),
    }
    output.emit(arguments.output, document=document, names=[machine.name], table=lambda: _show_text(document))
    output.warn(map(str, shortage))
    if look:
        looks.tell(machine.name, look)
    tell_remedy(state, machine.name)


def _of_machine(machine: Machine, state: str, process: Process | None) -> dict[str, Any]:
    """What `show` says of the machine itself and its QEMU."""
    from qmpsnap.machine.starting import scope
    from qmpsnap.ops.base import admission

    run_dir = home().run_dir(machine.name)
    user, lacks = admission.shown(machine, process)
    return {
        "name": machine.name,
        "uuid": machine.uuid,
        "state": state,
        "pid": process.pid if process else None,
        "accel": process.accel if process else None,
        "qemu": process.qemu_version if process else None,
        "qemu_user": user,
        "qemu_lacks": lacks,
        "qmp": machine.adopted.socket if machine.adopted else str(run_dir / USER_SOCKET),
        "console": None if machine.adopted else str(run_dir / CONSOLE_SOCKET),
        "run_dir": str(run_dir),
        "cgroup": scope.group(process) or None if process else None,
        "logs": None if machine.adopted else str(home().log_dir(machine.name)),
        "host": machine.host,
        "machine_type": machine.spec.machine,
        "memory": machine.spec.memory,
        "cpus": machine.spec.cpus,
        "vmgenid": machine.guid or None,
        "created": moment(machine.created),
        "current": machine.current,
    }


def _nics(machine: Machine) -> list[dict[str, Any]]:
    """The network cards, with the numbers by which they are detached."""
    if not machine.spec.nics:
        return []
    from qmpsnap.machine.starting import argv
    from qmpsnap.model.machines.spec import numbered

    return [
        {"nic": number, "mac": argv.mac(nic, machine.uuid, number), "kind": nic.kind, "model": nic.model}
        for number, nic in numbered(machine.spec.nics)
    ]


def _origin(machine: Machine) -> dict[str, Any] | None:
    """What a fork went on from, and what its guest takes for its own until it boots again."""
    if (origin := machine.origin) is None:
        return None
    return {
        "machine": origin.machine,
        "snapshot": origin.snapshot,
        "identity": origin.identity,
        "lacks": list(origin.lacks),
        "ephemeral": origin.ephemeral,
        "guest_uuid": origin.uuid,
        "macs": [nic["mac"] for nic in _nics(machine)],
    }


def _show_text(document: dict[str, Any]) -> str:
    apart = ("disks", "snapshots", "memory", "nics", "origin")
    plain = {key: value for key, value in document.items() if key not in apart}
    plain["memory"] = output.size(document["memory"])
    plain["snapshots"] = ", ".join(document["snapshots"]) or "none"
    if document["nics"]:
        plain["nics"] = ", ".join(f"{nic['nic']} ({nic['kind']}, {nic['mac']})" for nic in document["nics"])
    if origin := document["origin"]:
        plain["fork of"] = f"{origin['machine']}@{origin['snapshot']}{' (ephemeral)' if origin['ephemeral'] else ''}"
        plain["identity"] = "; ".join([origin["identity"], *origin["lacks"]])
        plain["guest's UUID"] = f"{origin['guest_uuid']} until it boots"
        plain["MACs"] = ", ".join(origin["macs"]) or "-"
    plain["qemu_lacks"] = "; ".join(document["qemu_lacks"]) or "-"
    lines = [f"{key + ':':14}{'-' if value is None else output.printable(str(value))}" for key, value in plain.items()]
    rows = [
        (d["disk"], d["layer"], d["format"], output.size(d["virtual_size"]), d["depth"], d["path"])
        for d in document["disks"]
    ]
    return "\n".join([*lines, "", output.table(("DISK", "ACTIVE", "FORMAT", "SIZE", "DEPTH", "PATH"), rows)])


def _start(arguments: argparse.Namespace) -> None:
    process = on_machine(
        arguments.machine, lambda vm: vm.start(paused=arguments.paused, allow_extra=arguments.allow_extra)
    )
    output.note(f"machine {arguments.machine} runs (pid {process.pid}, QEMU {process.qemu_version}, {process.accel})")
    image_notes.tell_scope(arguments.machine)


def _stop(arguments: argparse.Namespace) -> None:
    on_machine(arguments.machine, lambda vm: vm.stop(force=arguments.force, timeout=arguments.timeout))
    output.note(f"machine {arguments.machine} is stopped")
    image_notes.tell_owner(arguments.machine)


def _pause(arguments: argparse.Namespace) -> None:
    on_machine(arguments.machine, lambda vm: vm.pause())
    output.note(f"machine {arguments.machine} is paused; resume it with qmpsnap resume {arguments.machine}")


def _resume(arguments: argparse.Namespace) -> None:
    state = on_machine(arguments.machine, lambda vm: vm.resume())
    output.note(f"machine {arguments.machine} is {state}")
    tell_remedy(state, arguments.machine)


def _wakeup(arguments: argparse.Namespace) -> None:
    on_machine(arguments.machine, lambda vm: vm.wakeup())
    output.note(f"machine {arguments.machine} is awake")


def _undefine(arguments: argparse.Namespace) -> None:
    done = "removed" if arguments.disks == "remove" else "kept"
    if arguments.dry_run:
        found = on_machine(arguments.machine, lambda vm: vm.plan_undefine(disks=arguments.disks)).details
        images = [*found.kept, *found.removed]
        lines = [f"would undefine machine {arguments.machine}; nothing was changed"]
    else:
        images = on_machine(
            arguments.machine,
            lambda vm: vm.undefine(disks=arguments.disks, told=lambda sentence: output.warn([sentence])),
        )
        lines = []
        output.note(f"machine {arguments.machine} is undefined")
        for image in images:
            output.note(f"{done}: {image}")
    lines += [f"  {done}: {output.printable(image)}" for image in images] if arguments.dry_run else []
    output.emit(
        arguments.output,
        document={"machine": arguments.machine, "dry_run": arguments.dry_run, "kept": [], "removed": [], done: images},
        names=[arguments.machine],
        table=lambda: "\n".join(lines),
        done="" if arguments.dry_run else f"machine {arguments.machine} was undefined",
    )


def _recover(arguments: argparse.Namespace) -> None:
    async def act(controller: "Controller") -> dict[str, list[Any]]:
        if arguments.machine is not None:
            return {arguments.machine: await controller.recover(arguments.machine)}
        names = [vm.name for vm in await controller.machines()]
        with reading() as store:
            names += store.unborn()
        return {name: await controller.recover(name) for name in names}

    ended = controlling(act)
    with reading() as store:
        notes = {now.id: now.error for name in ended for now in store.operations(name) if now.state == "settled"}
    for name, operations in ended.items():
        for operation in operations:
            note = f": {output.printable(text)}" if (text := notes.get(operation.id)) else ""
            output.note(
                f"{name}: operation {operation.id} ({operation.verb}) was {operation.state} and is recovered{note}"
            )
        if not operations:
            output.note(f"{name}: no operation was open")
