"""The devices of libvirt's domain XML: disks, network cards and the agent's channel; of all others only their names."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, get_args

from msgspec.structs import replace

from qmpsnap.imports.found import disk_name
from qmpsnap.imports.xml_tree import Element
from qmpsnap.machine.starting.root_ports import cdrom_bus
from qmpsnap.model.machines.spec import Bus, Cache, DiskSpec, MachineSpec, NicModel, NicSpec

AGENT: Final = "org.qemu.guest_agent.0"

_TELLING: Final = ("type", "model", "bus", "name", "mode")
"""Attributes that say what a thing is, none of which is ever a secret."""
_DRIVER: Final = frozenset({"name", "type", "cache", "discard"})
_DISK: Final = frozenset(
    {"driver", "source", "target", "readonly", "address", "alias", "backingStore", "boot", "encryption"}
)
_CARD: Final = frozenset({"mac", "source", "model", "address", "alias", "target", "boot"})
_SOURCE: Final = {"file": "file", "block": "dev"}


class Differences:
    """What is gathered while a description is read."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.left_out: list[str] = []


def named(element: Element) -> str:
    """What an element is, without its values."""
    told = [f"{key}={element.get(key)}" for key in _TELLING if element.get(key)]
    kind = element.first("model").get("name") or element.first("model").get("type")
    return " ".join((element.tag, *told, *([f"model={kind}"] if kind and not element.get("model") else [])))


def add(spec: MachineSpec, root: Element, differences: Differences) -> MachineSpec:
    """The machine with its disks and network cards."""
    devices = root.first("devices").children
    disks: list[tuple[int, DiskSpec]] = []
    cards: list[NicSpec] = []
    for device in devices:
        if device.tag == "disk":
            taken = {disk.name for _, disk in disks}
            if disk := _disk(device, spec.machine, differences, taken=frozenset(taken)):
                disks.append((_order(device), disk))
        elif device.tag == "interface":
            cards.append(_card(device, differences))
    disks.sort(key=lambda found: found[0])  # the first is booted
    spec = replace(spec, cdrom=_cdrom(devices, spec.machine, [disk.bus for _, disk in disks], differences))
    agent = any(device.tag == "channel" and device.first("target").get("name") == AGENT for device in devices)
    tpm = spec.firmware == "uefi" and any(map(_is_emulated_tpm, devices))
    if tpm:
        differences.changed.append("the TPM is a new one: the state of libvirt's is left out")
    differences.left_out += _others([device for device in devices if not (tpm and _is_emulated_tpm(device))])
    return replace(spec, disks=tuple(disk for _, disk in disks), nics=tuple(cards), agent=agent, tpm=tpm)


def _is_emulated_tpm(device: Element) -> bool:
    backend = device.first("backend")
    return device.tag == "tpm" and backend.get("type") == "emulator" and backend.get("version") in ("", "2.0")


def _order(device: Element) -> int:
    order = device.first("boot").get("order")
    return int(order) if order.isdecimal() and len(order) < 6 else 1 << 20  # noqa: PLR2004 - no number that a list has


def _disk(device: Element, machine: str, differences: Differences, *, taken: frozenset[str]) -> DiskSpec | None:
    target, driver, source = device.first("target"), device.first("driver"), device.first("source")
    what, kind = f"disk {target.get('dev')}", device.get("device") or "disk"
    path = source.get(_SOURCE.get(device.get("type"), ""))
    form = driver.get("type") or "raw"
    if kind == "cdrom":
        return None
    if kind != "disk":
        differences.left_out.append(f"{what}: a {kind}{' with ' + path if path else ', empty'}")
        return None
    if not path:
        differences.left_out.append(f"{what}: its storage is of type {device.get('type') or 'unknown'}, no file")
        return None
    if form not in ("raw", "qcow2"):
        differences.left_out.append(
            f"{what}: {path} is {form}; convert it: qemu-img convert -f {form} -O qcow2 {path} NEW, and name NEW"
        )
        return None
    left = [f"driver {key}={driver.get(key)}" for key in driver.attributes if key not in _DRIVER]
    left += [child.tag for child in device.children if child.tag not in _DISK]
    differences.left_out += [f"{what}: {one}" for one in left]
    if device.first("encryption"):
        differences.left_out.append(
            f"{what}: the key of its encryption; name its file as 'encryption: {{secret-file: }}'"
        )
    name = disk_name(target.get("dev"), taken=taken)
    if name != target.get("dev"):
        differences.changed.append(f"{what} is called {name}")
    cache = driver.get("cache") or "writeback"
    return DiskSpec(
        name=name,
        image=path,
        format="raw" if form == "raw" else "qcow2",
        bus=_bus(target.get("bus"), machine, what, differences),
        cache=next((one for one in get_args(Cache) if one == cache), "writeback"),
        discard=driver.get("discard") == "unmap",
        read_only=bool(device.first("readonly")),
        snapshot=device.get("snapshot") != "no",
    )


def _cdrom(devices: Sequence[Element], machine: str, buses: Sequence[Bus], differences: Differences) -> str | None:
    """The image in the first drive that has one, where the machine has a place for it; the others are left out."""
    chosen = None
    for device in devices:
        if device.tag != "disk" or device.get("device") != "cdrom":
            continue
        path = device.first("source").get("file") if device.get("type") == "file" else ""
        if path and chosen is None and cdrom_bus(machine, buses):
            chosen = path
        else:
            name = device.first("target").get("dev")
            differences.left_out.append(f"disk {name}: a cdrom{' with ' + path if path else ', empty'}")
    return chosen


def _bus(bus: str, machine: str, what: str, differences: Differences) -> Bus:
    wanted = bus or "virtio"
    if wanted == "ide" and not machine.startswith(("pc-i440fx", "pc-1", "pc-0")) and machine != "pc":
        wanted = "sata"
    found: Bus | None = next((one for one in get_args(Bus) if one == wanted), None)
    if found:
        if found != (bus or found):
            differences.changed.append(f"{what} is on bus {found}; it was {bus}")
        return found
    differences.changed.append(f"{what} is on bus scsi; it was {bus}")
    return "scsi"


def _card(device: Element, differences: Differences) -> NicSpec:
    address = device.first("mac").get("address").lower() or None
    source, what = device.first("source"), f"network card {address or 'without a MAC'}"
    model = device.first("model").get("type") or "rtl8139"
    known: NicModel | None = next((one for one in get_args(NicModel) if one == model), None)
    if known is None:
        differences.changed.append(f"{what} is virtio; it was {model}")
    card = NicSpec(mac=address, model=known or "virtio")
    differences.left_out += [f"{what}: {child.tag}" for child in device.children if child.tag not in _CARD]
    bridge, tap = source.get("bridge"), device.first("target").get("dev")
    match device.get("type"):
        case "user":
            return card
        case "bridge" | "network" if bridge:
            return replace(card, kind="bridge", bridge=bridge)
        case "ethernet" if tap:
            return replace(card, kind="tap", ifname=tap)
        case "network":
            network = source.get("network")
            differences.changed.append(
                f"{what} is on a user network; it was on libvirt's network {network}, whose bridge"
                f" 'virsh net-info {network}' names: kind: bridge, bridge: NAME"
            )
            return card
        case kind:
            differences.changed.append(f"{what} is on a user network; it was of type {kind}")
            return card


def _others(devices: list[Element]) -> Iterator[str]:
    """Everything else, the same things counted."""
    counted: Counter[str] = Counter()
    for device in devices:
        is_agent = device.tag == "channel" and device.first("target").get("name") == AGENT
        if device.tag in ("disk", "interface") or is_agent:
            continue
        if device.tag in ("serial", "console") and device.get("type") == "pty":
            continue  # a serial console every machine has
        if device.tag == "emulator":
            counted[f"emulator {device.text}"] += 1
            continue
        label = f"tpm {device.first('backend').get('type')}" if device.tag == "tpm" else named(device)
        target = device.first("target").get("name")
        counted[f"{label} {target}" if target and device.tag == "channel" else label] += 1
    yield from (f"{label} ({count} times)" if count > 1 else label for label, count in counted.items())
