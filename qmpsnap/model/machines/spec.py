"""A machine's spec as a frozen value: what a user wrote, checked and with defaults filled in.

:mod:`qmpsnap.machine.config.specfile` makes it from YAML; :mod:`qmpsnap.machine.starting.argv` makes QEMU's arguments
from it.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal, Self

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.model.machines.rbd import RbdImage

Accel = Literal["auto", "kvm", "tcg"]
Firmware = Literal["bios", "uefi"]
Format = Literal["qcow2", "raw"]
Storage = Literal["file", "host_device", "rbd"]
"""QEMU's protocol driver for what an image lies in."""
Bus = Literal["virtio", "scsi", "sata", "nvme", "ide"]
Cache = Literal["writeback", "none", "writethrough", "directsync", "unsafe"]
NicKind = Literal["user", "tap", "bridge"]
NicModel = Literal["virtio", "e1000", "e1000e", "rtl8139", "vmxnet3"]
Display = Literal["none", "vnc"]

_PC = re.compile(r"pc-(q35|i440fx)-(?:(\d+)\.(\d+))?")
_VMGENID_SINCE = (2, 9)


class Encryption(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """That every layer of a disk is encrypted (LUKS inside qcow2), all of them with one key.

    Attributes:
        secret_file: absolute path of the file with the key, read when it is needed and never recorded; None: the
            program that works with the machine gives it.
    """

    secret_file: str | None = None


class Opened(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the owner of an adopted QEMU has a disk opened, in QAPI's words: every new layer is opened so, too.

    ``format`` is of the node of the active layer (``detect-zeroes``, ``l2-cache-size`` ...), ``file`` of the node below
    (``aio``, ``locking`` ...).
    """

    format: dict[str, Any] = {}
    file: dict[str, Any] = {}


class DiskSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One disk: one of ``size`` (a new image), ``image``, ``device``, ``rbd`` or ``base`` (a linked clone).

    ``size`` beside ``base`` makes the clone larger.

    Attributes:
        name: the disk's name, also its device id in QEMU.
        size: virtual size in bytes of the image to create; with ``base`` that of the overlay, never less than its.
        image: absolute path of an existing image; the guest writes to it until the first snapshot.
        device: absolute path of a block device, as ``image`` of format raw.
        rbd: an image of a Ceph cluster, as ``image`` of format raw.
        base: absolute path of an existing image that stays read-only under a new overlay.
        format: format of ``image`` or ``base``, or of the new image; never probed.
        snapshot: whether snapshots include this disk.
        encryption: its images are encrypted; None for plain ones.
        own: ``image`` is qmpsnap's from now on: written to by merges, and removed when nothing reads it any more.
        opened: how an adopted QEMU has it open; no spec file has this.
        address: where it is, if that is not by its position among the disks: a number on its controller, or for a PCI
            device its bus, empty for a place after all others. No spec file has this.
    """

    name: str
    size: int | None = None
    image: str | None = None
    base: str | None = None
    device: str | None = None
    rbd: RbdImage | None = None
    format: Format = "qcow2"
    bus: Bus = "virtio"
    cache: Cache = "writeback"
    discard: bool = True
    read_only: bool = False
    snapshot: bool = True
    own: bool = False
    encryption: Encryption | None = None
    opened: Opened | None = None
    address: str | None = None

    @property
    def existing(self) -> str | None:
        """What the guest writes to until the first snapshot, by the string that QEMU is given; None if that is new."""
        return self.rbd.filename if self.rbd else self.image or self.device

    @property
    def storage(self) -> Storage:
        """What ``existing`` or ``base`` lies in."""
        return "rbd" if self.rbd else "host_device" if self.device else "file"


class Forward(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A port of the host (on ``address``, by default the loopback) that leads to a port of the guest."""

    host: int
    guest: int
    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = "127.0.0.1"


class NicSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One network card. ``user`` needs no rights; ``tap`` wants ``ifname``, ``bridge`` wants ``bridge``.

    No spec file has ``number``, by which QEMU knows it and from which its own MAC is made (None: its position among the
    cards), and ``address``, as a disk has it.
    """

    kind: NicKind = "user"
    model: NicModel = "virtio"
    mac: str | None = None
    forwards: tuple[Forward, ...] = ()
    ifname: str | None = None
    bridge: str | None = None
    number: int | None = None
    address: str | None = None


def numbered(nics: Iterable[NicSpec]) -> tuple[tuple[int, NicSpec], ...]:
    """Network cards with their numbers."""
    return tuple((at if nic.number is None else nic.number, nic) for at, nic in enumerate(nics))


def _unplugged(nic: NicSpec) -> NicSpec:
    return replace(nic, number=None, address=None)


def _as_before(nics: tuple[NicSpec, ...], old: tuple[NicSpec, ...]) -> tuple[NicSpec, ...]:
    """Network cards with the numbers and places that they have in another spec of the machine.

    As many as before are the same, one after the other; otherwise those are that are described as before. As long as
    no card was attached or detached, their numbers are their positions.
    """
    if len(nics) == len(old):
        return tuple(replace(nic, number=was.number, address=was.address) for nic, was in zip(nics, old, strict=True))
    if all(was.number is None for was in old):
        return nics
    left = [replace(was, number=number) for number, was in numbered(old)]
    free = 1 + max(was.number or 0 for was in left)
    found = []
    for nic in nics:
        was = next((was for was in left if _unplugged(was) == nic), None)
        if was:
            left.remove(was)
        else:
            was, free = replace(nic, number=free), free + 1
        found.append(was)
    return tuple(found)


class CloudInit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Absolute paths of what cloud-init in the guest is told (its data source NoCloud), read anew at each start.

    Without ``meta_data`` the machine's UUID is the instance's id, and the machine's name the host's.
    """

    user_data: str
    meta_data: str | None = None
    network: str | None = None


def has_pcie(machine: str) -> bool:
    """Whether a machine type has PCIe, whose root complex takes no device while QEMU runs: root ports do."""
    return machine == "q35" or machine.startswith("pc-q35-")


class MachineSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole machine. Sizes are bytes; paths are absolute.

    Attributes:
        machine: QEMU machine type; ``define`` replaces an alias such as ``q35`` by its versioned name.
        cpu: QEMU CPU model; empty lets the accelerator choose (``host`` under KVM, ``tcg_cpu`` under TCG).
        tcg_cpu: what ``define`` records: CPU ``max`` under TCG, in words that later QEMUs understand.
        agent: give the guest a virtio-serial port for the QEMU guest agent.
        identity_hook: shell command that the guest agent runs in a fork that gets an identity of its own.
        extra: further QEMU arguments, refused unless ``define --allow-extra``.
        uuid: of the machine to be; the recorded machine has it beside its spec, which says nothing of it.
        cdrom: absolute path of an ISO image in a CD-ROM drive; no snapshot includes it.
        cloud_init: what cloud-init in the guest is told, on a read-only disk that no snapshot includes.
        uefi_code: absolute path of the firmware; None: this host's.
        uefi_variables: absolute path of the variable store that ``define`` copies; None: the firmware's template.
        tpm: give the guest a TPM 2.0, whose state goes along with the UEFI variables: with snapshots and reverts.
        root_ports: how many PCIe root ports it has for disks and network cards that are attached while it runs; None:
            ``define`` chooses, and a machine that an earlier release has defined has none.
    """

    name: str
    uuid: str = ""
    machine: str = "q35"
    accel: Accel = "auto"
    cpu: str = ""
    cpus: int = 1
    memory: int = 1 << 30
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    firmware: Firmware = "bios"
    uefi_code: str | None = None
    uefi_variables: str | None = None
    tpm: bool = False
    disks: tuple[DiskSpec, ...] = ()
    cdrom: str | None = None
    cloud_init: CloudInit | None = None
    nics: tuple[NicSpec, ...] = ()
    agent: bool = True
    display: Display = "none"
    extra: tuple[str, ...] = ()
    tcg_cpu: str = ""
    identity_hook: str = ""
    root_ports: int | None = None

    @property
    def recorded(self) -> Self:
        """As a machine has it: without what only ``define`` goes by."""
        return replace(self, uuid="", uefi_variables=None)

    @property
    def takes_vmgenid(self) -> bool:
        """Whether a guest of this machine type can find a ``vmgenid`` device, which ``extra`` may have added already.

        A microvm has no ACPI table to announce it, and an old PC no way to tell QEMU where the guest keeps the GUID.
        """
        if any("vmgenid" in argument for argument in self.extra):
            return False
        if self.machine in ("q35", "pc"):
            return True
        if not (found := _PC.match(self.machine)):
            return False
        board, major, minor = found.groups()
        return board == "q35" if major is None else (int(major), int(minor)) >= _VMGENID_SINCE

    def cpu_under(self, accel: str) -> str:
        """The CPU model with that accelerator, as QEMU is told it."""
        return self.cpu or ("host" if accel == "kvm" else self.tcg_cpu or "max")

    def unplugged(self) -> Self:
        """Without what no spec file has: where disks and network cards are."""
        disks = tuple(replace(disk, address=None) for disk in self.disks)
        return replace(self, disks=disks, nics=tuple(_unplugged(nic) for nic in self.nics))

    def plugged_as(self, old: Self) -> Self:
        """With disks and network cards where they are in another spec of the machine, and as many ports by default."""
        places = {disk.name: (disk.bus, disk.address) for disk in old.disks}

        def placed(disk: DiskSpec) -> DiskSpec:
            bus, address = places.get(disk.name, ("", None))
            return replace(disk, address=address) if bus == disk.bus else disk

        nics = _as_before(self.nics, old.nics)
        ports = old.root_ports if self.root_ports is None else self.root_ports
        return replace(self, disks=tuple(placed(disk) for disk in self.disks), nics=nics, root_ports=ports)

    def disk(self, name: str) -> DiskSpec | None:
        """The disk of that name, or None."""
        return next((disk for disk in self.disks if disk.name == name), None)
