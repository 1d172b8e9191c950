"""Proxmox VE's configuration of a virtual machine (``/etc/pve/qemu-server/100.conf``) as a machine."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Final, get_args
from urllib.parse import unquote

from msgspec.structs import replace

from qmpsnap.errors import UsageError
from qmpsnap.hint import option
from qmpsnap.imports.found import (
    MIB,
    Frozen,
    Imported,
    Moment,
    disk_name,
    machine_name,
    oldest_first,
    plain_name,
    text_of,
)
from qmpsnap.machine.starting.root_ports import cdrom_bus
from qmpsnap.model.machines.spec import Bus, Cache, DiskSpec, MachineSpec, NicModel, NicSpec

Options = dict[str, str]
Section = dict[str, str]

_LINE: Final = re.compile(r"([a-z][a-z_0-9]*):\s*(.*?)\s*")
_DISK: Final = re.compile(r"(scsi|virtio|sata|ide)[0-9]{1,2}")
_PVE: Final = re.compile(r"\+pve[0-9]+$")
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_READ: Final = frozenset(
    {"name", "memory", "cores", "sockets", "cpu", "machine", "bios", "kvm", "agent", "boot", "bootdisk", "smbios1"}
    | {"efidisk0", "parent", "snaptime", "vmstate", "lock", "description", "template", "scsihw"}
)
_QUIET: Final = frozenset({"digest", "meta", "runningcpu", "runningmachine", "vmgenid", "ostype", "numa", "tags"})
"""What a guest does not find: notes of Proxmox' own, and its hints for the choice of other defaults."""
_DISK_OPTIONS: Final = frozenset({"size", "cache", "discard", "ro", "media", "format", "backup", "replicate", "ssd"})
_CARD_OPTIONS: Final = frozenset({"bridge", "macaddr", "model"})
_FLAGS: Final = "+popcnt,+pni,+sse4.1,+sse4.2,+ssse3"
_V3: Final = f"+aes,{_FLAGS},+avx,+avx2,+bmi1,+bmi2,+f16c,+fma,+abm,+movbe,+xsave"
_MODELS: Final = {
    "kvm64": "kvm64,+lahf_lm,+sep",
    "x86-64-v2": f"qemu64,{_FLAGS}",
    "x86-64-v2-AES": f"qemu64,+aes,{_FLAGS}",
    "x86-64-v3": f"qemu64,{_V3}",
    "x86-64-v4": f"qemu64,{_V3},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl",
}
"""What Proxmox' own CPU models are in QEMU's words."""


def read(data: bytes, source: str, *, storage: Mapping[str, str], name: str | None = None) -> Imported:
    """The machine that a configuration describes.

    Args:
        data: the file, which errors call ``source``; its name is the machine's number.
        source: see there.
        storage: for each of Proxmox' storages that has a disk, its folder.
        name: of the machine; None for the one it has there.
    """
    main, snapshots, notes = _sections(text_of(data, source), source)
    number = PurePosixPath(source).stem
    original = main.get("name") or f"vm-{number}"
    changed: list[str] = []
    left_out: list[str] = [*notes, *_others(main)]
    kind = _first(main.get("machine", "pc"), "type")
    machine = _PVE.sub("", kind) or "pc"
    if machine != kind:
        changed.append(f"the machine type is {machine}; it was {kind}, which only Proxmox' QEMU has")
    spec = MachineSpec(
        name=machine_name(original, name),
        uuid=_uuid(main, changed),
        machine=machine,
        accel="tcg" if main.get("kvm") == "0" else "kvm",
        cpu=_cpu(main.get("cpu", ""), left_out),
        cpus=_number(main, "cores", 1, source) * _number(main, "sockets", 1, source),
        memory=_number({"memory": _first(main.get("memory", "512"), "current")}, "memory", 512, source) * MIB,
        agent=_first(main.get("agent", "0"), "enabled") == "1",
    )
    places = _Places(storage, source)
    spec = replace(spec, disks=_disks(main, spec, places, changed, left_out), nics=(*_cards(main, changed, left_out),))
    spec = replace(spec, cdrom=_cdrom(main, spec, places, left_out))
    if main.get("bios") == "ovmf":
        volume, _ = _parts(main.get("efidisk0", ""))
        spec = replace(spec, firmware="uefi", uefi_variables=places.path(volume) if volume else None)
        if "tpmstate0" in main:
            spec = replace(spec, tpm=True)
            changed.append("the TPM is a new one: the state of Proxmox' is left out")
    places.require_known()
    if "vmstate" in main:
        left_out.append("vmstate: the memory that the guest was suspended with; it boots")
    return Imported(
        origin=f"Proxmox' VM {number}{f' ({original})' if 'name' in main else ''}",
        spec=spec,
        changed=tuple(changed),
        left_out=tuple(left_out),
        moments=_moments(main, snapshots, spec, source),
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def _sections(text: str, source: str) -> tuple[Section, dict[str, Section], list[str]]:
    """The present configuration, that of each snapshot, and what other sections there are."""
    main: Section = {}
    snapshots: dict[str, Section] = {}
    notes: list[str] = []
    at = main
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#") or not line.strip():
            if line.startswith("#"):
                at["description"] = "\n".join(filter(None, (at.get("description"), unquote(line[1:]))))
        elif line.startswith("[") and line.rstrip().endswith("]"):
            title = line.strip()[1:-1]
            if title == "PENDING" or title.startswith("special:"):
                notes.append(f"section [{title}]")
                at = {}
            else:
                at = snapshots[title] = {}
        elif found := _LINE.fullmatch(line):
            at[found[1]] = found[2]
        else:
            raise UsageError(f"{source}:{number}: this is no 'key: value' of a VM's configuration")
    if not main.keys() & {"memory", "cores", "scsihw", "boot", "smbios1", "ostype", "machine", "cpu", "net0"}:
        raise UsageError(
            f"{source} is no configuration of a Proxmox VM", hint="/etc/pve/qemu-server/NUMBER.conf is one"
        )
    return main, snapshots, notes


def _parts(value: str) -> tuple[str, Options]:
    """The first word of ``word,key=value,...``, and the rest."""
    first, *rest = value.split(",")
    options = dict(part.partition("=")[::2] for part in rest)
    key, given, said = first.partition("=")
    return (said, {key: said, **options}) if given else (first, options)


def _first(value: str, key: str) -> str:
    """What ``value,...`` or ``...,key=value`` says."""
    first, options = _parts(value)
    return options.get(key, first)


def _number(section: Section, key: str, default: int, source: str) -> int:
    value = section.get(key, str(default))
    if not re.fullmatch("[0-9]{1,11}", value):
        raise UsageError(f"{source}: {key} is {value[:40]!r}, not a number")
    return int(value)


def _others(main: Section) -> Iterator[str]:
    """Keys that nobody looks at; their values may be secrets and are not told."""
    for key, value in main.items():
        if key in _READ or key in _QUIET or _DISK.fullmatch(key) or re.fullmatch("net[0-9]+", key):
            continue
        yield f"{key} {value.split(',')[0]}" if key.startswith(("unused", "tpmstate")) else key


def _uuid(main: Section, changed: list[str]) -> str:
    uuid = _parts(main.get("smbios1", ""))[1].get("uuid", "").lower()
    if _UUID.fullmatch(uuid):
        return uuid
    changed.append("the UUID is a new one: smbios1 has none")
    return ""


def _cpu(value: str, left_out: list[str]) -> str:
    model, options = _parts(value or "kvm64")
    model = options.pop("cputype", model)
    flags = [flag for flag in options.pop("flags", "").split(";") if flag]
    left_out += [f"cpu: {key}" for key in options if key != model]
    if model.startswith("custom-"):
        left_out.append(f"cpu: {model}, which Proxmox' cpu-models.conf describes")
        model = "kvm64"
    return ",".join((_MODELS.get(model, model), *flags))


# --- disks and network cards ------------------------------------------------------------------------------------------


class _Places:
    """Where volumes lie; the storages that nobody has told of are gathered."""

    def __init__(self, storage: Mapping[str, str], source: str) -> None:
        self._storage = storage
        self._source = source
        self._unknown: dict[str, None] = {}

    def path(self, volume: str) -> str:
        """The file of a volume: ``local:100/vm-100-disk-0.qcow2``, of a linked clone with its base before it."""
        if volume.startswith("/"):
            return volume
        storage, _, rest = volume.partition(":")
        parts = rest.split("/")
        if not rest or ".." in parts:
            raise UsageError(f"{self._source}: {volume[:80]!r} is not a volume")
        if (folder := self._storage.get(storage)) is None:
            self._unknown[storage] = None
            return volume
        if parts[0] == "iso":
            return str(PurePosixPath(folder, "template", rest))
        return str(PurePosixPath(folder, "images", *parts[-2:]) if len(parts) > 1 else PurePosixPath(folder, rest))

    def require_known(self) -> None:
        """Refuse volumes whose folder is not known."""
        if self._unknown:
            names = ", ".join(self._unknown)
            raise UsageError(
                f"{self._source}: the folder of storage {names} is not known",
                hint=option("storage", f"{next(iter(self._unknown))}=DIR") + " names it, as /etc/pve/storage.cfg does",
            )


def _disks(
    main: Section, spec: MachineSpec, places: _Places, changed: list[str], left_out: list[str]
) -> tuple[DiskSpec, ...]:
    found: list[DiskSpec] = []
    for key in sorted((key for key in main if _DISK.fullmatch(key)), key=_ordered(main)):
        volume, options = _parts(main[key])
        volume = options.get("file", volume)
        if _is_cdrom(volume, options):
            continue
        path = places.path(volume)
        form = options.get("format") or {".qcow2": "qcow2", ".vmdk": "vmdk"}.get(PurePosixPath(path).suffix, "raw")
        if form not in ("raw", "qcow2"):
            left_out.append(
                f"{key}: {path} is {form}; convert it: qemu-img convert -f {form} -O qcow2 {path} NEW, and name NEW"
            )
            continue
        left_out += [f"{key}: {other}" for other in options if other not in _DISK_OPTIONS | {"file"}]
        wanted = re.sub("[0-9]", "", key)
        bus: Bus = next(one for one in get_args(Bus) if one == wanted)
        if bus == "ide" and spec.machine.startswith(("q35", "pc-q35")):
            bus = "sata"
            changed.append(f"{key} is on bus sata: machine {spec.machine} has no ide")
        cache = options.get("cache", "none")
        found.append(
            DiskSpec(
                name=disk_name(key, taken=[disk.name for disk in found]),
                image=path,
                format="raw" if form == "raw" else "qcow2",
                bus=bus,
                cache=next((one for one in get_args(Cache) if one == cache), "none"),
                discard=options.get("discard") == "on",
                read_only=options.get("ro") == "1",
            )
        )
    if found and any(disk.bus == "scsi" for disk in found) and not main.get("scsihw", "lsi").startswith("virtio-scsi"):
        changed.append(f"SCSI disks are on virtio-scsi; it was {main.get('scsihw', 'lsi')}")
    return tuple(found)


def _is_cdrom(volume: str, options: Options) -> bool:
    return options.get("media") == "cdrom" or volume in ("none", "cdrom")


def _cdrom(main: Section, spec: MachineSpec, places: _Places, left_out: list[str]) -> str | None:
    """The first ISO image, where the machine has a place for it; the others, and cloud-init's, are left out."""
    chosen = None
    for key in sorted(key for key in main if _DISK.fullmatch(key)):
        volume, options = _parts(main[key])
        if not _is_cdrom(volume, options):
            continue
        is_iso = volume.startswith("/") or volume.partition(":")[2].startswith("iso/")
        if is_iso and chosen is None and cdrom_bus(spec.machine, [disk.bus for disk in spec.disks]):
            chosen = places.path(volume)
        else:
            left_out.append(f"{key}: a cdrom with {volume}")
    return chosen


def _ordered(main: Section) -> Callable[[str], tuple[int, str, int]]:
    boot = _first(main.get("boot", ""), "order").split(";")
    order = [name for name in boot if name in main] or [main.get("bootdisk", "")]

    def key(name: str) -> tuple[int, str, int]:
        kind = re.sub("[0-9]", "", name)
        return (order.index(name) if name in order else len(order), kind, int(name[len(kind) :]))

    return key


def _cards(main: Section, changed: list[str], left_out: list[str]) -> Iterable[NicSpec]:
    for key in sorted((key for key in main if re.fullmatch("net[0-9]+", key)), key=lambda key: int(key[3:])):
        _, options = _parts(main[key])
        model = next(
            (name for name in options if re.fullmatch("([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", options[name])), ""
        )
        address = options[model].lower() if model else None
        model = options.get("model", "virtio" if model in ("", "macaddr") else model)
        known: NicModel | None = next((one for one in get_args(NicModel) if one == model), None)
        if known is None:
            changed.append(f"{key} is virtio; it was {model}")
        left_out += [f"{key}: {other}" for other in options if other not in _CARD_OPTIONS | {model}]
        card = NicSpec(mac=address, model=known or "virtio")
        yield replace(card, kind="bridge", bridge=options["bridge"]) if options.get("bridge") else card


# --- snapshots --------------------------------------------------------------------------------------------------------


def _moments(main: Section, snapshots: dict[str, Section], spec: MachineSpec, source: str) -> tuple[Moment, ...]:
    names: set[str] = set()
    found: list[Moment] = []
    for title, section in snapshots.items():
        name = plain_name(title, taken=names, fallback="snapshot")
        names.add(name)
        kept = {disk.name: disk for disk in spec.disks if disk.name in section and not disk.read_only}
        same = [disk for disk in kept if _parts(section[disk])[0] == _parts(main[disk])[0]]
        found.append(
            Moment(
                name=name,
                original=title,
                parent=section.get("parent"),
                created=float(_number(section, "snaptime", 0, source)),
                description=section.get("description", ""),
                mode="live" if "vmstate" in section else "stopped",
                current=main.get("parent") == title,
                frozen={disk: Frozen(_chained(title, kept[disk].image or ""), "") for disk in same},
                inside=tuple(same),
                memory="vmstate" in section,
                why_not="" if same and same == [*kept] else "its disks are not the machine's",
            )
        )
    return oldest_first(found)


def _chained(snapshot: str, image: str) -> str:
    """The file of a snapshot where its storage has ``snapshot-as-volume-chain``; else it is a tag inside."""
    return str(PurePosixPath(image).with_name(f"snap-{snapshot}-{PurePosixPath(image).name}"))
