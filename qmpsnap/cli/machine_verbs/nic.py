"""Network cards of a machine: ``nic attach`` and ``nic detach``."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add_for_vm, add_format, amount, on_machine

if TYPE_CHECKING:
    from qmpsnap.ops.devices.nics import Nic


def register(parsers: Parsers) -> None:
    """Add the commands."""
    group = parsers.add_parser("nic", help="attach, detach", description="The network cards of a machine.")
    verbs = group.add_subparsers(title="verbs", metavar="VERB", required=True)
    command = add_for_vm(verbs, "attach", _attach, help="give a machine one more network card, also while it runs")
    command.add_argument("--kind", choices=("user", "tap", "bridge"), help="kind of its network (user)")
    command.add_argument("--ifname", metavar="NAME", help="interface of a card of kind tap, which this implies")
    command.add_argument("--bridge", metavar="NAME", help="bridge of a card of kind bridge, which this implies")
    command.add_argument(
        "--forward", action="append", default=[], metavar="HOST:GUEST", help="port of the host for a user card's guest"
    )
    command.add_argument("--model", choices=("virtio", "e1000", "e1000e", "rtl8139", "vmxnet3"), help="model (virtio)")
    command.add_argument("--mac", help="its MAC address (made from the machine's UUID)")
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)

    command = add_for_vm(verbs, "detach", _detach, help="take a network card from a machine, also while it runs")
    command.add_argument("nic", metavar="NIC", help="number or MAC address of the card")
    command.add_argument(
        "--timeout", type=amount, default=30.0, metavar="SECONDS", help="how long a running guest is waited for (30)"
    )
    command.add_argument("--dry-run", action="store_true", help="only print what would be done")
    add_format(command)


def _attach(arguments: argparse.Namespace) -> None:
    given = {key: getattr(arguments, key) for key in ("kind", "ifname", "bridge", "model", "mac")}
    nic = {key: value for key, value in given.items() if value is not None}
    if "kind" not in nic and (arguments.ifname or arguments.bridge):
        nic["kind"] = "tap" if arguments.ifname else "bridge"
    if arguments.forward:
        nic["forwards"] = arguments.forward
    if arguments.dry_run:
        found = on_machine(arguments.machine, lambda vm: vm.plan_attach_nic(nic)).details
    else:
        found = on_machine(arguments.machine, lambda vm: vm.attach_nic(nic))
    _tell(arguments, found, "attach", "to")


def _detach(arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        found = on_machine(arguments.machine, lambda vm: vm.plan_detach_nic(arguments.nic)).details
    else:
        found = on_machine(arguments.machine, lambda vm: vm.detach_nic(arguments.nic, timeout=arguments.timeout))
    _tell(arguments, found, "detach", "from")


def _tell(arguments: argparse.Namespace, found: "Nic", doing: str, to: str) -> None:
    name, dry = arguments.machine, arguments.dry_run
    does, end = (f"would {doing}", "; nothing was changed") if dry else (f"{doing}ed", "")
    first = f"{does} network card {found.number} ({found.mac}) {to} machine {name}{end}"
    document = describe(name, found)
    lines = [f"  {json.dumps(each)}" for each in document["qmp"]] if dry else []
    for snapshot in document["unloadable"]:
        why = "; ".join(snapshot["why"])
        lines.append(f"the memory of snapshot {snapshot['snapshot']} does not fit this hardware: {why}")
    if found.unloadable:
        lines.append(f"to load it: qmpsnap snapshot revert {name} NAME --hardware snapshot")
    output.emit(
        arguments.output,
        document=document | {"dry_run": dry},
        names=[str(found.number)],
        table=lambda: "\n".join([first, *lines]),
        done="" if dry else first,
    )


def describe(machine: str, found: "Nic") -> dict[str, Any]:
    """The JSON of a card attached or detached, as docs/reference/json.md describes it."""
    return {
        "machine": machine,
        "nic": found.number,
        "mac": found.mac,
        "kind": found.plan.nic.kind,
        "live": found.plan.live,
        "qmp": [{"execute": command, "arguments": given} for command, given in found.commands],
        "unloadable": [{"snapshot": name, "why": list(why)} for name, why in found.unloadable],
    }
