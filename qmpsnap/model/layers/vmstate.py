"""A machine's RAM and device state in a file, and what has to be the same again where it is loaded."""

from typing import Literal

from msgspec import Struct

from qmpsnap.model.machines.spec import MachineSpec, numbered
from qmpsnap.model.names import LayerId, OperationId

SaveMode = Literal["background", "stopped"]
"""``background``: RAM is written while the guest runs. ``stopped``: the guest is paused for the whole save."""
Layout = Literal["stream", "mapped-ram"]
"""How QEMU wrote it; mapped-ram has every page at a place of its own."""
Compression = Literal["none", "zstd"]


class Hardware(Struct, frozen=True, kw_only=True):
    """What QEMU's stream presumes and does not check: it loads into other hardware without complaint.

    ``qemu_version`` as ``10.0.13``: a state may be loaded by a later QEMU, never by an earlier one. ``machine_type``:
    versioned, as ``pc-q35-7.2``. ``cpu``: the model as QEMU was told, and for the ones that mean "what this host has"
    the host's model as well. ``devices``: what the guest sees, one line each. ``vmgenid``: the GUID of that device,
    which QEMU does not save; empty without the device.
    """

    uuid: str
    qemu_version: str
    machine_type: str
    accel: str
    cpu: str
    cpus: int
    memory: int
    devices: tuple[str, ...]
    vmgenid: str = ""

    @property
    def is_confined(self) -> bool:
        """Whether only the same QEMU version has that CPU: a model that means "all there is" is another with the next.

        Under KVM it is what the host's processor gives, and that one's name is compared.
        """
        return self.accel == "tcg" and self.cpu.split(",")[0] == "max"


class Stream(Struct, frozen=True, kw_only=True):
    """What QEMU has written of a machine's memory, and how.

    Attributes:
        bytes: of QEMU's stream as it lies in the file, that is before the manifest at its end.
        digest: SHA-256 of those bytes, in hexadecimal.
        frozen: the guest's file systems are frozen in that memory, and have to be thawed once it runs.
        steps_ms: how long each step of the pause took, as qmpsnap measured it.
    """

    bytes: int
    digest: str
    mode: SaveMode
    layout: Layout
    compression: Compression
    hardware: Hardware
    steps_ms: dict[str, float] = {}
    frozen: bool = False


class Vmstate(Stream, frozen=True, kw_only=True):
    """A finished state file at an absolute path; by device, inode and birth another file in its place is noticed."""

    path: str
    device: int
    inode: int
    birth: int = 0

    @property
    def identity(self) -> str:
        """Only what is no file has one."""
        return ""


class Inside(Struct, frozen=True, kw_only=True):
    """Memory inside a qcow2 image, under the tag of its snapshot, where it takes so many bytes."""

    layer: LayerId
    bytes: int
    hardware: Hardware


def hardware_of(
    spec: MachineSpec, *, uuid: str, accel: str, qemu_version: str, host_cpu: str, vmgenid: str = ""
) -> Hardware:
    """The hardware that a spec describes, on this host."""
    cpu = spec.cpu_under(accel)
    disks = (
        f"disk {disk.name} on {disk.bus}{_at(disk.address)}{', read-only' if disk.read_only else ''}"
        + _write_cache(disk.cache)
        for disk in spec.disks
    )
    nics = (
        f"network card {number} {nic.mac or 'of its own MAC'}{_at(nic.address)}"
        + ("" if nic.model == "virtio" else ", " + nic.model)
        for number, nic in numbered(spec.nics)
    )
    return Hardware(
        uuid=uuid,
        qemu_version=qemu_version,
        machine_type=spec.machine,
        accel=accel,
        cpu=f"{cpu} ({host_cpu})" if accel == "kvm" and cpu in ("host", "max") else cpu,
        cpus=spec.cpus,
        memory=spec.memory,
        devices=(
            f"firmware {spec.firmware}",
            *disks,
            *nics,
            *(["TPM"] if spec.tpm else []),
            *(["agent's port"] if spec.agent else []),
            *(["CD-ROM drive"] if spec.cdrom else []),
            *(["disk of cloud-init"] if spec.cloud_init else []),
            *([f"{spec.root_ports} PCIe root ports"] if spec.root_ports else []),
            f"display {spec.display}",
            *(f"extra {argument}" for argument in spec.extra),
        ),
        vmgenid=vmgenid,
    )


def _at(address: str | None) -> str:
    return "" if address is None else f" at {address or 'the end'}"


def _write_cache(cache: str) -> str:
    return ", write-through" if cache in ("writethrough", "directsync") else ""


def differences(saved: Hardware, now: Hardware) -> tuple[str, ...]:
    """Why a state cannot be loaded into the hardware there is now, one phrase each; empty when it can.

    The GUID of a ``vmgenid`` device is meant to be another one.
    """
    found = [
        f"{what} {then}, now {here}"
        for what, then, here in (
            ("machine", saved.uuid, now.uuid),
            ("machine type", saved.machine_type, now.machine_type),
            ("accelerator", saved.accel, now.accel),
            ("CPU", _Words(saved.cpu), _Words(now.cpu)),
            ("vCPUs", saved.cpus, now.cpus),
            ("memory", saved.memory, now.memory),
        )
        if then != here
    ]
    if version_of(now.qemu_version) < version_of(saved.qemu_version):
        found.append(f"QEMU {saved.qemu_version}, now the older {now.qemu_version}")
    elif saved.is_confined and version_of(now.qemu_version)[:2] != version_of(saved.qemu_version)[:2]:
        found.append(f"CPU {saved.cpu} of QEMU {saved.qemu_version}, now of {now.qemu_version}")
    had, has = _devices(saved), _devices(now)
    gone = [f"device {line!r}, now missing" for line in had if line not in has]
    new = [f"no device {line!r}, now present" for line in has if line not in had]
    if not gone and not new and had != has:
        new = ["devices in another order"]
    return (*found, *gone, *new)


def _devices(hardware: Hardware) -> tuple[str, ...]:
    return (*hardware.devices, "vmgenid") if hardware.vmgenid else hardware.devices


_LONG = 80
"""Characters of a CPU model's properties that are not printed any more."""


class _Words(str):
    """A CPU model that is printed in short: a recorded one names each of its features."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        model, _, rest = self.partition(",")
        return f"{model} with {rest.count(',') + 1} properties" if len(rest) > _LONG else str(self)


def version_of(text: str) -> tuple[int, ...]:
    """QEMU's version as numbers that compare: ``10.0.13`` as (10, 0, 13)."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


class Manifest(Stream, frozen=True, kw_only=True):
    """What a state file says of itself; enough to make its row in the store again.

    ``snapshot`` is its name as it was then, ``points`` disk to the layer that it stood at then; merges may have moved
    that content since. ``created``: seconds since the epoch, UTC.
    """

    operation: OperationId
    snapshot: str
    created: float
    points: dict[str, LayerId] = {}
