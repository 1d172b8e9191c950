"""QEMU's arguments for a machine: a pure function of its spec, its chains and what the host offers.

QEMU is started with the machine's run folder as its working directory, so the names of sockets are relative: a
socket's path has 107 bytes at most, a run folder's may need more. Whatever holds a path of the user's is JSON, where a
comma is only a comma; but for the console's log, whose option has no such form.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal

from msgspec import Struct

from qmpsnap.machine.starting.root_ports import PORT, SATA_PORTS, cdrom_bus, is_attached, places, root_ports
from qmpsnap.machine.starting.run_files import (
    AGENT_SOCKET,
    CONSOLE_LOG,
    CONSOLE_SOCKET,
    PID_FILE,
    QMP_SOCKET,
    USER_SOCKET,
    VNC_SOCKET,
)
from qmpsnap.model.layers.blockdev import blank_options, chain_options, node_name
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.secret import secret_id
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec, numbered

AGENT_CHARDEV: Final = "agent"
AGENT_PORT: Final = "org.qemu.guest_agent.0"

CDROM: Final = "qs-cdrom"
"""Node and device of the CD-ROM drive."""
SEED: Final = "qs-seed"
"""Node and device of the disk that has what cloud-init is told."""
TSC_KHZ: Final = 2_000_000
"""Assumed where the host's is unknown: a guest whose clock is somewhat off, rather than one that does not boot."""

Device = dict[str, Any]


class Firmware(Struct, frozen=True):
    """UEFI's flash: the code, shared and read-only, and the machine's own copy of the variable store."""

    code: str
    vars: str


class Ram(Struct, frozen=True):
    """A guest's memory in a file that QEMU inherits open, under the name that memory without a file has in a stream.

    ``shared``: what the guest writes goes to the file; else it is QEMU's own. ``read_only``: QEMU opens it for reading,
    which with ``shared`` off it can from 8.2 on; earlier ones ask for more than they use.
    """

    descriptor: int
    shared: bool = False
    read_only: bool = False


def build(  # all that an argument list depends on
    binary: Sequence[str] | str,
    spec: MachineSpec,
    chains: Sequence[Chain],
    *,
    uuid: str,
    accel: Literal["kvm", "tcg"],
    paused: bool = False,
    incoming: bool = False,
    firmware: Firmware | None = None,
    tsc_khz: int = TSC_KHZ,
    secrets: Mapping[str, int] = MappingProxyType({}),
    logs: str = "",
    exact: bool = False,
    ram: Ram | None = None,
    blank: bool = False,
    vmgenid: str = "",
    seed: int | None = None,
    tpm: int | None = None,
) -> list[str]:
    """The whole argument list, the binary (or the words that start it) first; pure.

    By the UUID a running QEMU is known again, and network cards without a MAC get one from it. Only a microvm under TCG
    needs ``tsc_khz``, to keep its clock right. ``secrets``: for each encrypted disk the descriptor, inherited by QEMU,
    from which it reads the key. ``incoming``: it waits for a state to be loaded; ``exact``: for that it refuses to
    start if it lacks a feature of the recorded CPU model. ``blank``: every disk is there, of its size and without
    content or image. ``vmgenid``: the GUID of that device; empty for none. ``seed``: the descriptor, inherited by QEMU,
    of the image for cloud-init; ``tpm``: that of the connection to the TPM's emulator. ``ValueError``: a disk has no
    chain or no key, or UEFI or cloud-init no images.
    """
    return [
        *([binary] if isinstance(binary, str) else binary),
        *("-name", f"guest={spec.name},debug-threads=on", "-uuid", uuid),
        *("-nodefaults", "-no-user-config", "-sandbox", _sandbox(spec)),
        *(["-S"] if paused or incoming else []),
        *(["-incoming", "defer"] if incoming else []),
        *("-pidfile", PID_FILE, "-msg", "timestamp=on", "-rtc", "base=utc"),
        *_board(spec, accel, firmware, exact=exact, ram=ram),
        *_kernel(spec, accel, tsc_khz),
        *_monitors(logs),
        *_display(spec),
        *_agent(spec),
        *_vmgenid(vmgenid),
        *_tpm(spec, tpm),
        *_secrets(spec, secrets),
        *_devices(spec, chains, uuid, blank=blank),
        *_seed(spec, seed),
        *spec.extra,
    ]


def _sandbox(spec: MachineSpec) -> str:
    # A bridge card is opened by qemu-bridge-helper, a set-uid program that QEMU has to spawn.
    helper = "allow" if any(nic.kind == "bridge" for nic in spec.nics) else "deny"
    return f"on,obsolete=deny,elevateprivileges={helper},spawn={helper},resourcecontrol=deny"


def _board(spec: MachineSpec, accel: str, firmware: Firmware | None, *, exact: bool, ram: Ram | None) -> Iterator[str]:
    machine = spec.machine
    if spec.firmware == "uefi":
        if firmware is None:
            raise ValueError(f"machine {spec.name} wants UEFI, and no flash images were given")
        yield from _json("-blockdev", _flash("uefi-code", firmware.code, read_only=True))
        yield from _json("-blockdev", _flash("uefi-vars", firmware.vars, read_only=False))
        machine += ",pflash0=uefi-code,pflash1=uefi-vars"
    if ram:
        name = "microvm.ram" if _is_microvm(spec) else "pc.ram"  # what a stream calls it that was saved without a file
        yield from _json("-object", _memory(spec, ram, name))
        machine += f",memory-backend={name}"
    # A core dump lies in the run folder, often in memory: it has what QEMU did, and not what the guest knew.
    yield from ("-machine", f"{machine},dump-guest-core=off")
    yield from ("-accel", "kvm" if accel == "kvm" else "tcg,thread=multi")
    cpu = spec.cpu_under(accel)
    yield from ("-cpu", f"{cpu},enforce=on" if exact and cpu == spec.tcg_cpu else cpu)
    yield from ("-smp", str(spec.cpus), "-m", f"size={spec.memory}B")


def _memory(spec: MachineSpec, ram: Ram, name: str) -> Device:
    memory = {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": spec.memory,
        "mem-path": f"/proc/self/fd/{ram.descriptor}",
        "share": ram.shared,
        "x-use-canonical-path-for-ramblock-id": False,
    }
    return memory | ({"readonly": True, "rom": "off"} if ram.read_only else {})


def _kernel(spec: MachineSpec, accel: str, tsc_khz: int) -> Iterator[str]:
    append = spec.append
    if spec.kernel and _is_microvm(spec) and accel == "tcg" and "tsc_early_khz=" not in append:
        # A microvm's ACPI has no PIT, HPET or PM timer, and TCG none of KVM's clocks: Linux would wait for its first
        # tick for ever. The TSC is the host's under TCG; told its rate, Linux takes every other clock from it.
        append = f"{append} tsc_early_khz={tsc_khz}".lstrip()
    for option, value in (("-kernel", spec.kernel), ("-initrd", spec.initrd), ("-append", append)):
        if value:
            yield from (option, value)


def _flash(node: str, path: str, *, read_only: bool) -> Device:
    file = {"driver": "file", "filename": path, "node-name": f"{node}.file", "read-only": read_only}
    return {"node-name": node, "driver": "raw", "read-only": read_only, "file": file}


def _monitors(logs: str) -> Iterator[str]:
    for name, socket in (("qmp", QMP_SOCKET), ("user", USER_SOCKET)):
        # QEMU's start races with a client that comes in its midst (decision 0009), so it waits for ours first.
        wait = name == "qmp"
        yield from ("-chardev", _socket(name, socket, wait=wait), "-mon", f"chardev={name},mode=control")
    log = f"{logs}/{CONSOLE_LOG}".replace(",", ",,") if logs else CONSOLE_LOG
    yield from ("-chardev", f"{_socket('console', CONSOLE_SOCKET)},logfile={log},logappend=on")
    yield from ("-serial", "chardev:console")


def _socket(name: str, path: str, *, wait: bool = False) -> str:
    return f"socket,id={name},path={path},server=on,wait={'on' if wait else 'off'}"


def _display(spec: MachineSpec) -> Iterator[str]:
    if spec.display == "none":
        yield from ("-display", "none")
    else:
        yield from ("-display", f"vnc=unix:{VNC_SOCKET}")
        yield from _json("-device", {"driver": "VGA", "id": "qs-vga"})


def _agent(spec: MachineSpec) -> Iterator[str]:
    if not spec.agent:
        return
    yield from ("-chardev", _socket(AGENT_CHARDEV, AGENT_SOCKET))
    yield from _json("-device", {"driver": _virtio("serial", spec), "id": "qs-serial"})
    port = {
        "driver": "virtserialport",
        "id": "qs-agent",
        "bus": "qs-serial.0",
        "chardev": AGENT_CHARDEV,
        "name": AGENT_PORT,
    }
    yield from _json("-device", port)


def _vmgenid(guid: str) -> Iterator[str]:
    if guid:
        yield from _json("-device", {"driver": "vmgenid", "id": "qs-vmgenid", "guid": guid})


def _tpm(spec: MachineSpec, descriptor: int | None) -> Iterator[str]:
    if spec.tpm:
        yield from ("-chardev", f"socket,id=qs-tpm,fd={descriptor}", "-tpmdev", "emulator,id=qs-tpm,chardev=qs-tpm")
        yield from _json("-device", {"driver": "tpm-crb", "id": "qs-tpm-crb", "tpmdev": "qs-tpm"})


# --- disks ------------------------------------------------------------------------------------------------------------


def _secrets(spec: MachineSpec, secrets: Mapping[str, int]) -> Iterator[str]:
    for disk in spec.disks:
        if disk.encryption is None:
            continue
        if disk.name not in secrets:
            raise ValueError(f"disk {disk.name} of machine {spec.name} is encrypted and has no key")
        file = f"/proc/self/fd/{secrets[disk.name]}"
        yield from _json("-object", {"qom-type": "secret", "id": secret_id(disk.name), "file": file})


def _devices(spec: MachineSpec, chains: Sequence[Chain], uuid: str, *, blank: bool) -> Iterator[str]:
    """Disks and cards. QEMU gives PCI slots in this order: what was attached later comes last, and moves no other."""
    controllers: set[str] = set()
    for port in root_ports(spec):
        yield from _json("-device", port)
    defined = [disk for disk in spec.disks if not is_attached(disk)]
    yield from _disks(spec, defined, chains, controllers, blank=blank)
    yield from _cdrom(spec)
    yield from _nics(spec, uuid, attached=False)
    yield from _nics(spec, uuid, attached=True)
    yield from _disks(spec, [disk for disk in spec.disks if disk not in defined], chains, controllers, blank=blank)


def _disks(
    spec: MachineSpec, disks: Sequence[DiskSpec], chains: Sequence[Chain], controllers: set[str], *, blank: bool
) -> Iterator[str]:
    by_disk, placed = {chain.disk: chain for chain in chains}, places(spec.disks)
    for disk in disks:
        chain = by_disk.get(disk.name)
        if chain is None:
            raise ValueError(f"disk {disk.name} of machine {spec.name} has no chain")
        for options in [blank_options(chain.active, disk)] if blank else chain_options(chain, disk):
            yield from _json("-blockdev", options)
        controller, device = disk_device(spec, disk, node_name(chain.active), placed[disk.name])
        if controller and controller["id"] not in controllers:
            controllers.add(controller["id"])
            yield from _json("-device", controller)
        yield from _json("-device", device)


def disk_device(spec: MachineSpec, disk: DiskSpec, node: str, place: int) -> tuple[Device | None, Device]:
    """The controller that a disk needs, if any, and the disk's device with the image that is that node."""
    controller, device = _attached(spec, disk, place)
    if disk.address and disk.address.startswith(PORT):
        device["bus"] = disk.address
    device |= {
        "id": disk.name,
        "drive": node,
        "serial": disk.name,  # the guest finds its disks by name under /dev/disk/by-id
        "write-cache": "off" if disk.cache in ("writethrough", "directsync") else "on",
    }
    if disk is spec.disks[0] and spec.kernel is None:
        device["bootindex"] = 1
    return controller, device


def _cdrom(spec: MachineSpec) -> Iterator[str]:
    if not spec.cdrom:
        return
    place = cdrom_bus(spec.machine, [disk.bus for disk in spec.disks])
    if place is None:
        raise ValueError(f"machine {spec.name} has no bus for its CD-ROM drive")
    yield from _json("-blockdev", _flash(CDROM, spec.cdrom, read_only=True))
    device: Device = {"driver": "ide-cd", "id": CDROM, "drive": CDROM, "bus": place[0], "unit": place[1]}
    if spec.kernel is None:
        device["bootindex"] = 2  # an installer, as long as the first disk is empty
    yield from _json("-device", device)


def _seed(spec: MachineSpec, descriptor: int | None) -> Iterator[str]:
    """A virtio disk, as kernels for clouds lack the drivers of every other; last, so that no other device moves."""
    if not spec.cloud_init:
        return
    if descriptor is None:
        raise ValueError(f"machine {spec.name} has no image of what cloud-init is told")
    yield from _json("-blockdev", _flash(SEED, f"/proc/self/fd/{descriptor}", read_only=True))
    yield from _json("-device", {"driver": _virtio("blk", spec), "id": SEED, "drive": SEED, "serial": "cidata"})


def _attached(spec: MachineSpec, disk: DiskSpec, place: int) -> tuple[Device | None, Device]:
    """The controller that it needs, if any, and the disk's device as the ``place``-th one of its bus.

    Our own ids have a hyphen, which a disk's name cannot have.
    """
    match disk.bus:
        case "virtio":
            return None, {"driver": _virtio("blk", spec)}
        case "nvme":
            return None, {"driver": "nvme"}
        case "ide":
            channel, unit = divmod(place, 2)
            return None, {"driver": "ide-hd", "bus": f"ide.{channel}", "unit": unit}
        case "scsi":
            controller = {"driver": _virtio("scsi", spec), "id": "qs-scsi"}
            device = {"driver": "scsi-hd", "bus": "qs-scsi.0", "channel": 0, "scsi-id": place, "lun": 0}
            return controller, device
        case "sata":
            number, port = divmod(place, SATA_PORTS)
            # q35 brings the first controller itself.
            if number == 0 and (spec.machine == "q35" or spec.machine.startswith("pc-q35-")):
                return None, {"driver": "ide-hd", "bus": f"ide.{port}", "unit": 0}
            controller = {"driver": "ich9-ahci", "id": f"qs-sata{number}"}
            return controller, {"driver": "ide-hd", "bus": f"qs-sata{number}.{port}", "unit": 0}


# --- network cards ----------------------------------------------------------------------------------------------------


def card(number: int) -> str:
    """The id of a machine's network card in QEMU, counted from 0."""
    return f"qs-nic{number}"


def cable(number: int) -> str:
    """The id of what a network card is connected to."""
    return f"net{number}"


def mac(nic: NicSpec, uuid: str, number: int) -> str:
    """The MAC address that QEMU gives a network card."""
    return nic.mac or _mac(uuid, number)


def _nics(spec: MachineSpec, uuid: str, *, attached: bool) -> Iterator[str]:
    for number, nic in numbered(spec.nics):
        if (nic.address is not None) is attached:
            backend, device = nic_device(spec, nic, number, uuid)
            yield from _json("-netdev", backend)
            yield from _json("-device", device)


def nic_device(spec: MachineSpec, nic: NicSpec, number: int, uuid: str) -> tuple[Device, Device]:
    """What a network card is connected to, and its device."""
    device = {
        "driver": _virtio("net", spec) if nic.model == "virtio" else nic.model,
        "id": card(number),
        "netdev": cable(number),
        "mac": mac(nic, uuid, number),
    }
    if nic.address:
        device["bus"] = nic.address
    if not _is_microvm(spec):
        device["romfile"] = ""  # no network boot, and no ROM package to need
    return {"id": cable(number)} | _backend(nic), device


def _backend(nic: NicSpec) -> Device:
    match nic.kind:
        case "user":
            rules = [f"{rule.protocol}:{rule.address}:{rule.host}-:{rule.guest}" for rule in nic.forwards]
            return {"type": "user"} | ({"hostfwd": [{"str": rule} for rule in rules]} if rules else {})
        case "tap":
            return {"type": "tap", "ifname": nic.ifname, "script": "no", "downscript": "no"}
        case "bridge":
            return {"type": "bridge", "br": nic.bridge}


def _mac(uuid: str, number: int) -> str:
    """An address of QEMU's range; its own default is the same in every machine, which a bridge would not survive."""
    from hashlib import sha256  # loads OpenSSL, and this module is loaded for its constants, too

    return "52:54:00:" + sha256(f"{uuid}/{number}".encode()).digest()[:3].hex(":")


def _virtio(kind: str, spec: MachineSpec) -> str:
    """The virtio device's driver: a microvm has virtio-mmio slots, every other machine PCI."""
    return f"virtio-{kind}-device" if _is_microvm(spec) else f"virtio-{kind}-pci"


def _is_microvm(spec: MachineSpec) -> bool:
    return spec.machine == "microvm"


def _json(option: str, value: Device) -> tuple[str, str]:
    return option, json.dumps(value, separators=(",", ":"))
