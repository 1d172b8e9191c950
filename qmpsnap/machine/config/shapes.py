"""The keys of a machine's spec, as a user writes it: what each may be, and how an error describes that.

Not the same as :mod:`qmpsnap.model.machines.spec`, which the store decodes: a spec that was accepted once must stay
readable when a rule is tightened here.
"""

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from qmpsnap.model.machines.spec import Accel, Bus, Cache, Display, Firmware, Format, NicModel
from qmpsnap.model.names import DISK_NAME, NAME

SECTOR: Final = 512
MIB: Final = 1 << 20

_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"


def _text(pattern: str, description: str) -> Meta:
    """Strings that the pattern matches as a whole."""
    return Meta(pattern=rf"^(?:{pattern})\Z", description=description)


MachineName = Annotated[
    str, _text(NAME.pattern, "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit")
]
DiskName = Annotated[
    str, _text(DISK_NAME.pattern, "a lower-case letter and at most 15 more letters or digits, as in 'vda' or 'data1'")
]
FilePath = Annotated[str, _text(r".*[^/]", "a file's path")]
DiskSize = Annotated[
    int,
    Meta(
        ge=SECTOR,
        le=(1 << 63) - SECTOR,
        multiple_of=SECTOR,
        description="a size such as 512M or 1.5G, in multiples of 512B and below 8192P",
    ),
]
Memory = Annotated[
    int,
    Meta(
        ge=MIB, le=16 << 40, multiple_of=MIB, description="a size such as 512M or 1.5G, in multiples of 1M, 16T at most"
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535, description="a whole number from 1 to 65535")]
Mac = Annotated[
    str,
    _text("[0-9a-f][02468ace](:[0-9a-f]{2}){5}", "a unicast MAC address such as 52:54:00:12:34:56"),
]
Uuid = Annotated[
    str,
    _text("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "a UUID such as 8d3f5a52-0b1c-4e2f-9a60-5f1f6c7d8e9f"),
]
RbdName = _text(
    "[A-Za-z0-9_.][A-Za-z0-9_.+=-]{0,95}",
    "a name in Ceph, at most 96 of A-Z, a-z, 0-9, '_', '.', '+', '=' and '-', not beginning with '-'",
)
Interface = _text("[A-Za-z0-9][A-Za-z0-9._-]{0,14}", "an interface's name such as tap0 or br0")


class Shape(Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A mapping in a spec."""


class EncryptionShape(Shape, frozen=True):
    """``encryption`` of a disk."""

    secret_file: FilePath | None = None


class RbdShape(Shape, frozen=True):
    """``rbd`` of a disk."""

    pool: Annotated[str, RbdName]
    image: Annotated[str, RbdName]
    namespace: Annotated[str, RbdName] | None = None
    conf: Annotated[str, _text(r"/[ !#-\[\]-~]*[^/\"\\]", "the path of a Ceph configuration, in ASCII")] | None = None
    user: Annotated[str, RbdName] | None = None


class DiskShape(Shape, frozen=True):
    """One of ``disks``."""

    name: DiskName
    size: DiskSize | None = None
    image: FilePath | None = None
    base: FilePath | None = None
    device: FilePath | None = None
    rbd: RbdShape | None = None
    format: Format = "qcow2"
    bus: Bus = "virtio"
    cache: Cache = "writeback"
    discard: bool = True
    read_only: bool = False
    snapshot: bool = True
    own: bool = False
    encryption: EncryptionShape | None = None


class ForwardShape(Shape, frozen=True):
    """One of a network card's ``forwards``."""

    host: Port
    guest: Port
    protocol: Literal["tcp", "udp"] = "tcp"
    address: Annotated[str, _text(rf"{_OCTET}(\.{_OCTET}){{3}}", "an IPv4 address, as in 127.0.0.1 or 0.0.0.0")] = (
        "127.0.0.1"
    )


class NicShape(Shape, frozen=True):
    """One of ``nics``."""

    kind: Literal["none", "user", "tap", "bridge"] = "user"
    model: NicModel = "virtio"
    mac: Mac | None = None
    forwards: tuple[Annotated[ForwardShape, Meta(description="like '2222:22' (host:guest)")], ...] = ()
    ifname: Annotated[str, Interface] | None = None
    bridge: Annotated[str, Interface] | None = None


class CloudInitShape(Shape, frozen=True):
    """``cloud-init``."""

    user_data: FilePath
    meta_data: FilePath | None = None
    network: FilePath | None = None


class MachineShape(Shape, frozen=True):
    """The whole spec."""

    name: MachineName
    uuid: Uuid = ""
    profile: str = ""
    machine: Annotated[str, _text("[A-Za-z0-9][A-Za-z0-9._-]*", "a machine type's name such as q35")] = "q35"
    accel: Accel = "auto"
    cpu: Annotated[str, _text("[A-Za-z0-9][A-Za-z0-9._+,=:-]*", "a CPU model such as max or Skylake-Client,+aes")] = ""
    cpus: Annotated[int, Meta(ge=1, le=4096, description="a whole number from 1 to 4096")] = 1
    memory: Memory = 1 << 30
    kernel: FilePath | None = None
    initrd: FilePath | None = None
    append: str = ""
    firmware: Firmware = "bios"
    uefi_code: FilePath | None = None
    uefi_variables: FilePath | None = None
    tpm: bool = False
    disks: tuple[DiskShape, ...] = ()
    cdrom: FilePath | None = None
    cloud_init: CloudInitShape | None = None
    nics: tuple[NicShape, ...] = ()
    agent: bool = True
    display: Display = "none"
    extra: tuple[str, ...] = ()
    identity_hook: str = ""
    root_ports: Annotated[int, Meta(ge=0, le=16, description="a whole number from 0 to 16")] | None = None
