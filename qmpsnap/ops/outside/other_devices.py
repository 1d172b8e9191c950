"""Devices that others have plugged into a running QEMU or unplugged from it; its disks are looked at in the graph."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from qmpsnap.errors import StateError
from qmpsnap.hint import call
from qmpsnap.machine.starting import argv
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.spec import MachineSpec, numbered
from qmpsnap.qmp import devices
from qmpsnap.qmp.session import Monitor

_OURS: Final = "qs-"
"""What the ids of devices begin with that no disk's name can be."""


class Devices(Struct, frozen=True):
    """Where QEMU's devices are not the machine's.

    ``plugged``: ids and drivers of those that somebody has added. ``cards``: numbers of the network cards that QEMU has
    no more.
    """

    plugged: tuple[tuple[str, str], ...] = ()
    cards: tuple[int, ...] = ()


def compared(spec: MachineSpec, there: Mapping[str, str]) -> Devices:
    """The differences to what QEMU has, by id; pure."""
    extra = None if "-readconfig" in spec.extra else {*_ids(spec.extra)}
    names = {disk.name for disk in spec.disks}
    foreign = [
        (name, driver)
        for name, driver in sorted(there.items())
        if extra is not None and not name.startswith(_OURS) and name not in names | extra
    ]
    gone = [number for number, _ in numbered(spec.nics) if argv.card(number) not in there]
    return Devices(tuple(foreign), tuple(gone))


async def look(machine: Machine, qemu: Monitor) -> Devices:
    """How QEMU's devices differ from the machine's; of an adopted one nobody can say (``qom-list``)."""
    return Devices() if machine.adopted else compared(machine.spec, await devices.drivers(qemu))


async def require_same(machine: Machine, qemu: Monitor, *, hint: str, only_cards: bool = False) -> None:
    """Make sure that memory, which presumes the devices that it was saved with, finds them where it is loaded.

    ``only_cards``: what was added does not matter, as this QEMU itself will load it.
    """
    if only_cards and not machine.spec.nics:
        return
    found = await look(machine, qemu)
    if found.cards:
        raise StateError(
            f"{lost(machine, found.cards[0])}, but memory presumes that it is there",
            hint="detach it for good: " + call("detach_nic", machine.name, str(found.cards[0])) + "; or " + hint,
            machine=machine.name,
        )
    if found.plugged and not only_cards:
        name, driver = found.plugged[0]
        raise StateError(
            f"the QEMU of machine {machine.name} has device {name} ({driver}), which somebody has plugged in: one that"
            " loads this memory would lack it",
            hint=f"detach it (device_del {name}); or " + hint,
            machine=machine.name,
        )


def lost(machine: Machine, number: int) -> str:
    """What is said of a network card that QEMU has no more."""
    nic = dict(numbered(machine.spec.nics))[number]
    return f"network card {number} ({argv.mac(nic, machine.uuid, number)}) is not attached to the guest"


def _ids(extra: Sequence[str]) -> Iterator[str]:
    """The ids of the devices among QEMU's arguments."""
    for option, value in itertools.pairwise(extra):
        if option.lstrip("-") != "device":
            continue
        if value.startswith("{"):
            try:
                yield str(json.loads(value).get("id"))
            except ValueError:
                continue
        else:
            yield from (part.removeprefix("id=") for part in value.split(",") if part.startswith("id="))
