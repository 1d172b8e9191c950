"""Disks and flash of a QEMU's command line: ``-drive``, ``-hda``, or ``-blockdev``, and the devices that use them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, get_args

from msgspec import Struct

from qmpsnap.imports.argv_words import Given, Parameters, Places
from qmpsnap.imports.found import disk_name
from qmpsnap.machine.starting.root_ports import cdrom_bus
from qmpsnap.model.machines.spec import Bus, Cache, DiskSpec, Format

OPTIONS: Final = frozenset({"blockdev", "cdrom", "drive", "hda", "hdb", "hdc", "hdd", "pflash", "fda", "fdb"})

_HD: Final = ("hda", "hdb", "hdc", "hdd")
_DEVICES: Final[dict[str, Bus]] = {
    **dict.fromkeys(("virtio-blk", "virtio-blk-pci", "virtio-blk-device"), "virtio"),
    **dict.fromkeys(("virtio-blk-pci-non-transitional", "virtio-blk-pci-transitional"), "virtio"),
    **dict.fromkeys(("scsi-hd", "scsi-disk"), "scsi"),
    **dict.fromkeys(("ide-hd", "ide-drive"), "ide"),
    "nvme": "nvme",
}
_CDROMS: Final = frozenset({"ide-cd", "scsi-cd"})
_PROTOCOL: Final = re.compile("([^:/]*):")
_DRIVE: Final = frozenset(
    {"file", "format", "driver", "if", "index", "media", "id", "cache", "discard", "readonly", "read-only", "snapshot"}
    | {"bus", "unit", "node-name", "file.driver", "file.filename", "file.node-name", "cache.direct", "cache.no-flush"}
    | {"file.cache.direct", "file.cache.no-flush", "file.discard", "auto-read-only", "file.auto-read-only", "backing"}
    | {"file.read-only"}
)


class Disks(Struct, frozen=True):
    """The disks, the firmware's two images, and what of them is otherwise."""

    disks: tuple[DiskSpec, ...] = ()
    code: str | None = None
    variables: str | None = None
    cdrom: str | None = None
    changed: tuple[str, ...] = ()


class _Image(Struct, frozen=True, kw_only=True):
    """An image that QEMU was told to open; ``why_not``: why it cannot be a disk's."""

    path: str = ""
    format: Format = "raw"
    guessed: bool = False
    cache: Cache = "writeback"
    discard: bool = False
    read_only: bool = False
    temporary: bool = False
    why_not: str = ""
    left_out: tuple[str, ...] = ()


class _Attached(Struct, frozen=True, kw_only=True):
    name: str
    image: _Image
    bus: Bus
    cdrom: bool = False
    order: int = 1 << 20


def read(given: Sequence[Given], board: Parameters, machine: str, places: Places) -> tuple[Disks, list[str]]:
    """The disks of a machine of that type, and what is left out."""
    nodes = {one.parameters.get("node-name", ""): one.parameters for one in given if one.option == "blockdev"}
    images = {name: _node(name, nodes, places) for name in nodes}
    attached, flash = _drives(given, machine, images, places)
    attached += _devices(given, machine, images)
    disks: list[DiskSpec] = []
    changed: list[str] = []
    left_out: list[str] = []
    cdrom: str | None = None
    has_place = cdrom_bus(machine, [one.bus for one in attached if not one.cdrom])
    for one in sorted(attached, key=lambda one: one.order):
        name, image = disk_name(one.name, taken=[disk.name for disk in disks]), one.image
        what = f"disk {name}"
        if one.name and name != one.name:
            changed.append(f"disk {one.name} is called {name}")
        if one.cdrom and image.path and cdrom is None and has_place:
            cdrom = image.path
        elif one.cdrom:
            left_out.append(f"{what}: a cdrom{' with ' + image.path if image.path else ''}")
        elif image.why_not:
            left_out.append(f"{what}: {image.why_not}")
        else:
            left_out += [f"{what}: {other}" for other in image.left_out]
            changed += [f"{what}: {sentence}" for sentence in _otherwise(image)]
            disks.append(_spec(name, one))
    pflash = [images.get(board.get(f"pflash{number}", "")) or flash.get(number) for number in (0, 1)]
    code, variables = ((image.path or None) if image else None for image in pflash)
    return Disks(tuple(disks), code, variables if code else None, cdrom, tuple(changed)), left_out


def _otherwise(image: _Image) -> Iterator[str]:
    if image.guessed:
        yield f"its format is {image.format} by its name: the command line leaves it to be guessed"
    if image.temporary:
        yield "the guest's writes are kept; with snapshot=on they were temporary"


def _spec(name: str, one: _Attached) -> DiskSpec:
    image = one.image
    return DiskSpec(
        name=name,
        image=image.path,
        format=image.format,
        bus=one.bus,
        cache=image.cache,
        discard=image.discard,
        read_only=image.read_only,
    )


# --- images -----------------------------------------------------------------------------------------------------------


def _image(parameters: Parameters, file: str, places: Places, *, format_: str) -> _Image:
    """What ``file`` and the parameters beside it say."""
    protocol = _PROTOCOL.match(file)
    if protocol and protocol[1] != "file":
        return _Image(why_not=f"its image is named by the protocol {protocol[1]!r}, not a file")
    path = places.absolute(file.removeprefix("file:"))
    guessed = not format_
    if guessed:
        format_ = "qcow2" if path.endswith((".qcow2", ".qcow")) else "raw"
    if format_ not in ("raw", "qcow2"):
        return _Image(
            why_not=f"{path} is {format_}; convert it: qemu-img convert -f {format_} -O qcow2 {path} NEW, and name NEW"
        )
    encrypted = any(key.startswith("encrypt.") for key in parameters)
    others = sorted({key.split(".")[0] for key in parameters if key not in _DRIVE and not key.startswith("encrypt.")})
    key = ["the key of its encryption; name its file as 'encryption: {secret-file: }'"] if encrypted else []
    return _Image(
        path=path,
        format="qcow2" if format_ == "qcow2" else "raw",
        guessed=guessed,
        cache=_cache(parameters),
        discard=parameters.get("discard") in ("unmap", "on"),
        read_only=(parameters.get("readonly") or parameters.get("read-only")) in ("on", "true"),
        temporary=parameters.get("snapshot") in ("on", "true"),
        left_out=(*key, *others),
    )


def _cache(parameters: Parameters) -> Cache:
    word = parameters.get("cache", "")
    if known := next((one for one in get_args(Cache) if one == word), None):
        cache: Cache = known
        return cache
    if parameters.get("cache.no-flush") == "on":
        return "unsafe"
    return "none" if parameters.get("cache.direct") == "on" else "writeback"


def _node(name: str, nodes: Mapping[str, Parameters], places: Places) -> _Image:
    """The image below a node of ``-blockdev``, through filters."""
    told: Parameters = {}
    format_ = ""
    for _ in nodes:
        node = nodes.get(name, {})
        driver = node.get("driver", "")
        told = {**node, **told}
        if driver in ("file", "host_device"):
            return _image(told, f"file:{node.get('filename', '')}", places, format_=format_ or "raw")
        format_ = format_ or ("" if driver in ("throttle", "copy-on-read") else driver)
        inner = node.get("file.filename")
        if inner is not None and node.get("file.driver") in ("file", "host_device"):
            return _image(told, f"file:{inner}", places, format_=format_ or "raw")
        if "file.driver" in node:
            return _Image(why_not=f"its image is opened by driver {node['file.driver']}, not a file")
        if "file" not in node:
            return _Image(why_not=f"its image is opened by driver {driver or 'unknown'}, not a file")
        name = node["file"]
    return _Image(why_not="its nodes lead nowhere")


# --- what uses them ---------------------------------------------------------------------------------------------------


def _drives(
    given: Sequence[Given], machine: str, images: dict[str, _Image], places: Places
) -> tuple[list[_Attached], dict[int, _Image]]:
    """What ``-drive`` and its short forms attach, and the flash by its number.

    The drives that devices name are added to ``images``.
    """
    attached: list[_Attached] = []
    flash: dict[int, _Image] = {}
    ide: Bus = "ide" if _has_ide(machine) else "sata"
    for one in given:
        option = one.option
        if option not in OPTIONS or option == "blockdev":
            continue
        parameters = one.parameters if option == "drive" else {"file": one.value}
        if option == "cdrom":
            parameters["media"] = "cdrom"
        where = {"pflash": "pflash", "fda": "floppy", "fdb": "floppy"}.get(option) or parameters.get("if", "ide")
        file = parameters.get("file") or parameters.get("file.filename", "")
        if protocol := parameters.get("file.driver"):
            file = f"{protocol}:{file}"
        image = _image(parameters, file, places, format_=parameters.get("format") or parameters.get("driver", ""))
        name = parameters.get("id") or (option if option in _HD else "")
        if where == "none":
            images[name] = image
        elif where == "pflash":
            number = parameters.get("unit") or parameters.get("index") or str(len(flash))
            flash[int(number) if number in ("0", "1") else len(flash)] = image
        elif where in ("ide", "scsi", "virtio"):
            bus = ide if where == "ide" else "scsi" if where == "scsi" else "virtio"
            attached.append(_Attached(name=name, image=image, bus=bus, cdrom=parameters.get("media") == "cdrom"))
        else:
            image = _Image(why_not=f"it is of kind {where}")
            attached.append(_Attached(name=name, image=image, bus="virtio"))
    return attached, flash


def _devices(given: Sequence[Given], machine: str, images: Mapping[str, _Image]) -> list[_Attached]:
    found: list[_Attached] = []
    for one in given:
        told = one.parameters if one.option == "device" else {}
        drive, driver = told.get("drive", ""), told.get("driver", "")
        if not drive:
            continue
        image = images.get(drive) or _Image(why_not=f"there is no drive {drive}")
        bus: Bus = _DEVICES.get(driver, "scsi")
        if bus == "ide" and not _has_ide(machine):
            bus = "sata"
        order = told.get("bootindex", "")
        found.append(
            _Attached(
                name=told.get("id") or drive,
                image=image,
                bus=bus,
                cdrom=driver in _CDROMS,
                order=int(order) if re.fullmatch("[0-9]{1,5}", order) else 1 << 20,
            )
        )
    return found


def _has_ide(machine: str) -> bool:
    return machine == "pc" or machine.startswith("pc-i440fx-")
