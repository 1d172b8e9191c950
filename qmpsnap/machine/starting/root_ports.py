"""The PCIe root ports of a machine, into which disks and network cards are plugged while it runs; pure.

Places of disks on controllers, too.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec.structs import replace

from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec

PORT: Final = "qs-port"
"""What the ids of PCIe root ports begin with; their numbers follow."""
_SLOT: Final = 0x1D
"""The slot of the first eight root ports; those after them have the slot below. QEMU itself gives slots from 1 up."""
_FUNCTIONS: Final = 8
SATA_PORTS: Final = 6
"""Ports of one ICH9 AHCI controller."""
IDE_PLACES: Final = 4
"""Disks that the two channels of a pc machine take."""


def root_ports(spec: MachineSpec) -> Iterator[dict[str, Any]]:
    """The devices of a machine's root ports."""
    for number in range(spec.root_ports or 0):
        slot, function = divmod(number, _FUNCTIONS)
        port = {
            "driver": "pcie-root-port",
            "id": f"{PORT}{number}",
            "bus": "pcie.0",
            "addr": f"{_SLOT - slot:x}.{function}",
            "chassis": number + 1,
        }
        yield port | ({} if function else {"multifunction": True})


def free_port(spec: MachineSpec) -> str | None:
    """A root port that has no device; None where there is none."""
    used = {disk.address for disk in spec.disks} | {nic.address for nic in spec.nics}
    return next((port for port in _names(spec) if port not in used), None)


def without_lost(spec: MachineSpec) -> MachineSpec:
    """The spec with disks and network cards behind the others whose root port it has no more."""
    there = _names(spec)

    def lost(device: DiskSpec | NicSpec) -> bool:
        return (device.address or "").startswith(PORT) and device.address not in there

    disks = tuple(replace(disk, address="") if lost(disk) else disk for disk in spec.disks)
    return replace(spec, disks=disks, nics=tuple(replace(nic, address="") if lost(nic) else nic for nic in spec.nics))


def is_attached(disk: DiskSpec) -> bool:
    """Whether a disk came to its machine after that was defined."""
    return disk.address is not None and not disk.address.isdigit()


def places(disks: Sequence[DiskSpec]) -> dict[str, int]:
    """The place of each disk on its bus: by its address, or as the so-manieth of those that have none there."""
    found: dict[str, int] = {}
    used: dict[str, int] = {}
    for disk in disks:
        if disk.address and disk.address.removeprefix("+").isdigit():
            found[disk.name] = int(disk.address)
        else:
            found[disk.name] = used.get(disk.bus, 0)
            used[disk.bus] = found[disk.name] + 1
    return found


def _names(spec: MachineSpec) -> list[str]:
    return [f"{PORT}{number}" for number in range(spec.root_ports or 0)]


def cdrom_bus(machine: str, buses: Sequence[str]) -> tuple[str, int] | None:
    """Where a machine has its CD-ROM drive: the last place of the controller that it brings, where no disk is."""
    if machine == "q35" or machine.startswith("pc-q35-"):
        return (f"ide.{SATA_PORTS - 1}", 0) if buses.count("sata") < SATA_PORTS else None
    if machine == "pc" or machine.startswith("pc-i440fx-"):
        return ("ide.1", 1) if buses.count("ide") < IDE_PLACES else None
    return None
