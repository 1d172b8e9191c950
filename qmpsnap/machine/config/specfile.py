"""A machine's spec from YAML: a checked value, or one error that says where it is wrong and what would be right.

What may stand under each key is in :mod:`qmpsnap.machine.config.shapes`; here is what msgspec cannot be told: sizes
with units, words for true and false, paths, the short forms of network cards, and what keys have to do with each other.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Final, Literal

import msgspec
from msgspec import inspect
from msgspec.structs import replace

from qmpsnap.errors import SpecError
from qmpsnap.hint import call
from qmpsnap.machine.config.document import Document, compose, load, of_program, shorten
from qmpsnap.machine.config.shapes import MIB, DiskShape, ForwardShape, MachineShape, NicShape
from qmpsnap.machine.starting.root_ports import IDE_PLACES, cdrom_bus
from qmpsnap.model.machines.spec import MachineSpec, has_pcie
from qmpsnap.model.names import SNAPSHOT_OF
from qmpsnap.model.sizes import UNITS, in_bytes
from qmpsnap.model.text import nearest

GUEST: Final = "@guest/"
"""A path that begins so lies in the small guest's folder."""

_FLAGS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_FORWARD: Final = re.compile(r"(?:([0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?")
_PATHS: Final = (
    "kernel", "initrd", "image", "base", "device", "secret-file", "conf", "uefi-code", "uefi-variables", "cdrom",
    "user-data", "meta-data", "network",
)  # fmt: skip
SEED: Final = "cloud-init"
"""A key whose own keys can be set one by one, as those of a disk."""
_CONTENT: Final = ("size", "image", "base", "device", "rbd")
_HINTS: Final = {
    "name": "as in 'name: web' for a machine, 'name: vda' for a disk",
    "host": "as in '{host: 2222, guest: 22}'",
    "guest": "as in '{host: 2222, guest: 22}'",
    "user-data": "as in 'cloud-init: {user-data: user-data.yaml}'",
    "size": UNITS,
    "memory": UNITS,
    "pool": "as in 'rbd: {pool: rbd, image: web}'",
    "format": "an image of another format: qemu-img convert -O qcow2 IMAGE NEW, then name NEW here",
}
"""What to do where a key is missing, or its value wrong."""


def read(path: Path, *, guest_dir: Path, profile_dir: Path) -> MachineSpec:
    """The machine that the file describes, checked and complete; relative paths in it start from its folder.

    ``guest_dir`` is what ``@guest/`` stands for, ``profile_dir`` has the shipped profiles.
    """
    text = load(path)
    if text.lstrip().startswith("<"):
        raise SpecError(f"{path}:1:1: this is XML, not a spec", hint=call("import_libvirt", "", quote(str(path))))
    try:
        return parse(text, str(path), folder=path.parent, guest_dir=guest_dir, profile_dir=profile_dir)
    except SpecError as error:
        if path.suffix == ".conf":
            error.hint = "of a Proxmox VM: " + call("import_proxmox", "", quote(str(path)))
        raise


def parse(text: str, source: str, *, folder: Path, guest_dir: Path, profile_dir: Path) -> MachineSpec:
    """The machine that the text describes, which errors call ``source``; see :func:`read`."""
    document = _readable(compose(text, source), folder, guest_dir)
    if "profile" in (document.value if isinstance(document.value, dict) else ()):
        chosen = _profile(document, document.value.pop("profile"), profile_dir)
        base = _readable(compose(load(chosen), str(chosen)), profile_dir, guest_dir)
        if "profile" in base.value:
            base.refuse("$", "a profile cannot build on another profile")
        document = document.over(base)
    return _machine(document)


def checked(spec: MachineSpec, *, folder: Path, guest_dir: Path) -> MachineSpec:
    """Hold a machine that a program describes to the rules of a file: its names become paths and arguments."""
    try:
        plain = _plain(spec)
    except TypeError as error:
        raise SpecError(f"the spec has a value of an impossible type: {error}") from error
    return _machine(_readable(of_program(plain, "the spec"), folder, guest_dir))


def changed(spec: MachineSpec, settings: Mapping[str, str], *, folder: Path, guest_dir: Path) -> MachineSpec:
    """The machine with other values under some keys, each written as in a file: ``memory``, or ``vda.cache`` of a disk.

    The files of ``cloud-init`` are ``cloud-init.user-data`` and so on.
    An empty value takes the key away, so that its default counts.
    """
    plain = _plain(spec)
    for key, text in settings.items():
        disk, _, own = key.rpartition(".")
        disks = {each["name"]: each for each in plain.get("disks", ())}
        if disk == SEED:
            disks[SEED] = plain.setdefault("cloud_init", {})
        if disk and disk not in disks:
            raise SpecError(f"machine {spec.name} has no disk {shorten(disk)!r}", hint=f"its disks: {', '.join(disks)}")
        where, name = disks[disk] if disk else plain, own.replace("-", "_")
        where.pop(name, None)
        if text:
            where[name] = compose(text, key).value
    found = _machine(_readable(of_program(plain, f"machine {spec.name}"), folder, guest_dir))
    return replace(found, tcg_cpu=spec.tcg_cpu).plugged_as(spec)


def extended(
    spec: MachineSpec, device: Mapping[str, Any], *, of: Literal["disks", "nics"], folder: Path, guest_dir: Path
) -> MachineSpec:
    """The machine with one more disk or network card, which is described as in a file."""
    plain = _plain(spec)
    try:
        new = msgspec.to_builtins(dict(device), enc_hook=os.fspath)
    except TypeError as error:
        raise SpecError(f"an item of {of!r} has a value of an impossible type: {error}") from error
    plain[of] = [*plain.get(of, ()), {key.replace("-", "_"): value for key, value in new.items()}]
    found = _machine(_readable(of_program(plain, f"machine {spec.name}"), folder, guest_dir))
    return replace(found, tcg_cpu=spec.tcg_cpu).plugged_as(spec)


def _plain(spec: MachineSpec) -> dict[str, Any]:
    """What a file would say of it."""
    plain: dict[str, Any] = msgspec.to_builtins(spec, enc_hook=os.fspath)
    for device in (*plain.get("disks", ()), *plain.get("nics", ())):
        device.pop("address", None)
        device.pop("number", None)
    plain.pop("tcg_cpu", None)  # that of the machine whose spec was taken: define records its own
    if type(spec.memory) is int:
        plain["memory"] = f"{spec.memory}B"  # a file's plain number is MiB
    return plain


def _profile(document: Document, name: Any, profile_dir: Path) -> Path:
    """The shipped profile of that name; only names found in the folder are ever opened."""
    known = sorted(path.stem for path in profile_dir.glob("*.yaml"))
    if name not in known:
        found = f"unknown profile {shorten(str(name))!r}{nearest(str(name), known)}"
        document.refuse("$.profile", found, f"profiles: {', '.join(known)}")
    return profile_dir / f"{name}.yaml"


# --- values -----------------------------------------------------------------------------------------------------------


def _readable(document: Document, folder: Path, guest_dir: Path) -> Document:
    """The document in the values of the shapes, where people write others."""

    def of(value: Any, path: str) -> Any:
        kind, key = _kind(_shape(path)), path.rpartition(".")[2]
        if value is None:
            raise _wrong(document, path)
        if isinstance(value, str):
            _require_text(document, path, value)
            is_path = key in _PATHS and not path.endswith(".rbd.image")
            value = _file_path(document, path, value, folder, guest_dir) if is_path else _word(value, path, kind)
        if key in ("size", "memory"):
            value = _bytes(value, MIB if key == "memory" else 1)
        if isinstance(value, list) and isinstance(kind, inspect.VarTupleType):
            return [of(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, dict) and isinstance(kind, inspect.StructType):
            _require_known(document, path, value, [field.encode_name for field in kind.fields])
            return {name: of(item, f"{path}.{name}") for name, item in value.items()}
        return value

    return Document(of(document.value, "$"), document.places)


def _require_text(document: Document, path: str, text: str) -> None:
    for char in text:
        # QEMU would end the argument at a NUL; a lone surrogate is no text at all.
        if (char < " " and char != "\t") or char == "\x7f" or "\ud800" <= char <= "\udfff":
            hint = "write it on one line, without control codes"
            document.refuse(path, f"{_called(path)} holds the character U+{ord(char):04X}", hint)


def _require_known(document: Document, path: str, names: Iterable[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            found = f"unknown key {shorten(name)!r}{nearest(name, known)}"
            document.refuse(f"{path}.{name}:", found, f"keys here: {', '.join(known)}")


def _word(text: str, path: str, kind: Any) -> Any:
    """What a string stands for, of a value of that kind."""
    if path.endswith((".mac", ".uuid")):
        return text.lower()
    if path == "$.nics":
        return {"none": [], "user": ["user"]}.get(text, text)
    if isinstance(kind, inspect.BoolType):  # yes, no, on and off are strings in YAML 1.2
        return _FLAGS.get(text.lower(), text)
    of = kind.cls if isinstance(kind, inspect.StructType) else None
    if of is NicShape and text in ("none", "user"):
        return {"kind": text}
    if of is ForwardShape and (found := _FORWARD.fullmatch(text)):
        parts = {"address": found[1], "host": int(found[2]), "guest": int(found[3]), "protocol": found[4]}
        return {key: part for key, part in parts.items() if part is not None}
    return text


def _bytes(value: Any, plain: int) -> Any:
    """A size in bytes; ``plain`` is what a number without a unit counts. What is none stays, to be refused."""
    found = in_bytes(str(value), plain=plain) if type(value) in (int, str) else None
    return value if found is None else found


def _file_path(document: Document, path: str, text: str, folder: Path, guest_dir: Path) -> str:
    """An absolute path; symbolic links stay as they are, for they may be meant to change."""
    if text.startswith("~"):
        document.refuse(path, f"{_called(path)}: '~' is not expanded", "write the whole path")
    if text.startswith("@") and not text.startswith(GUEST):
        found = f"{_called(path)}: only {GUEST} is known among the paths that begin with '@'"
        document.refuse(path, found, f"as in {GUEST}vmlinuz")
    if not text or text.endswith("/") or (path.endswith(".base") and SNAPSHOT_OF.match(text)):
        return text
    whole = guest_dir / text.removeprefix(GUEST) if text.startswith(GUEST) else folder / text
    return os.path.abspath(whole)  # noqa: PTH100 - Path.resolve follows links


# --- what was expected ------------------------------------------------------------------------------------------------


def _shape(path: str) -> Any:
    """What msgspec knows of the type of a value; None where the spec has no such place."""
    if path == "$":
        return inspect.type_info(MachineShape)
    above, key, _ = re.split(r"\.([a-z-]+)$|(?=\[\d+\]$)", path, maxsplit=1)
    kind = _kind(_shape(above))
    fields = {field.encode_name: field.type for field in getattr(kind, "fields", ())}
    found = fields.get(key) if key else getattr(kind, "item_type", None)
    return found.types[0] if isinstance(found, inspect.UnionType) else found


def _kind(shape: Any) -> Any:
    """The type without what is said about it."""
    return shape.type if isinstance(shape, inspect.Metadata) else shape


def _called(path: str) -> str:
    """What errors call a value."""
    key = path.rpartition(".")[2].rstrip("]0123456789[")
    return "the spec" if path == "$" else f"an item of {key!r}" if path.endswith("]") else repr(key)


def _wrong(document: Document, path: str) -> SpecError:
    """What was expected of a value, and what was found."""
    shape, at, near, hint = _shape(path), document.at(path), "", _HINTS.get(path.rpartition(".")[2], "")
    match kind := _kind(shape):
        case inspect.LiteralType():
            words = [str(word) for word in kind.values]
            expected, near = f"one of {', '.join(words)}", nearest(at.text, words)
        case inspect.StrType():
            expected = "a string"
            hint = f"put it in quotes: '{at.text}'" if isinstance(at.value, bool | int | float) else hint
        case inspect.StructType():
            expected = "a mapping of keys to values"
        case _:
            expected = "true or false" if isinstance(kind, inspect.BoolType) else "a list"
    if isinstance(shape, inspect.Metadata) and shape.extra_json_schema:
        expected = shape.extra_json_schema["description"]
    return SpecError(f"{at.where}: expected {_called(path)} to be {expected}, found {at}{near}", hint=hint)


# --- the machine ------------------------------------------------------------------------------------------------------


def _machine(document: Document) -> MachineSpec:
    try:
        found = msgspec.convert(document.value, MachineShape)
    except msgspec.ValidationError as error:
        said, _, path = str(error).rpartition(" - at `")
        said, path = (said, path[:-1]) if said else (path, "$")
        if missing := re.fullmatch("Object missing required field `(.*)`", said):
            document.refuse(path, f"key {missing[1]!r} is missing", _HINTS.get(missing[1], ""))
        raise _wrong(document, path) from error
    _require_agreement(document, found)
    _require_buses(document, found)
    _require_disks(document, found.disks)
    _require_nics(document, found.nics)
    # What is no file has no room for a format's tables beside the guest's data.
    disks = tuple(replace(disk, format="raw") if disk.device or disk.rbd else disk for disk in found.disks)
    found = replace(found, nics=tuple(nic for nic in found.nics if nic.kind != "none"), disks=disks)
    return msgspec.convert(found, MachineSpec, from_attributes=True)


def _require_agreement(document: Document, spec: MachineShape) -> None:
    """Refuse what no key can be blamed for alone."""

    def at(*keys: str) -> str:
        return next((f"$.{key}" for key in keys if key in document.value), "$")

    if spec.kernel is None and (spec.initrd is not None or spec.append):
        document.refuse(at("initrd", "append"), "'initrd' and 'append' need a 'kernel'")
    if spec.accel == "tcg" and spec.cpu.split(",")[0] == "host":
        document.refuse(at("cpu"), "cpu 'host' needs KVM", "leave 'cpu' out, or set 'accel: kvm'")
    bound = {"tpm": spec.tpm, "uefi-code": spec.uefi_code, "uefi-variables": spec.uefi_variables}
    if spec.firmware != "uefi" and (key := next((key for key, value in bound.items() if value), None)):
        document.refuse(at(key), f"{key!r} needs 'firmware: uefi'")
    if spec.machine != "microvm":
        return
    if spec.firmware == "uefi":
        hint = "use 'firmware: bios', or 'machine: q35'"
        document.refuse(at("firmware"), "a microvm has no flash for UEFI", hint)
    if spec.display != "none":
        document.refuse(at("display"), "a microvm has no display", "use 'display: none', or 'machine: q35'")
    for disk in spec.disks:
        if disk.bus in ("sata", "nvme"):
            found = f"disk {disk.name!r}: a microvm has no {disk.bus} bus"
            document.refuse(at("disks"), found, "use 'bus: virtio' or scsi")


def _require_buses(document: Document, spec: MachineShape) -> None:
    if spec.root_ports and not has_pcie(spec.machine):
        document.refuse("$.root-ports", f"machine {spec.machine} has no PCIe root ports", "use 'machine: q35'")
    if spec.cdrom and cdrom_bus(spec.machine, [disk.bus for disk in spec.disks]) is None:
        found = f"machine {spec.machine} has no bus for a CD-ROM drive that its disks leave free"
        document.refuse("$.cdrom", found, "leave 'cdrom' out, or let a disk be on another 'bus'")
    ide = [disk for disk in spec.disks if disk.bus == "ide"]
    if ide and spec.machine != "pc" and not spec.machine.startswith("pc-i440fx-"):
        found = f"disk {ide[0].name!r}: machine {spec.machine} has no ide bus"
        document.refuse("$.disks", found, "use 'bus: sata', or 'machine: pc'")
    if len(ide) > IDE_PLACES:
        document.refuse("$.disks", f"the ide bus takes {IDE_PLACES} disks, not {len(ide)}", "use another 'bus'")


def _require_disks(document: Document, disks: Sequence[DiskShape]) -> None:
    images = [disk.image or disk.base for disk in disks]
    for number, disk in enumerate(disks):
        path, what = f"$.disks[{number}]", f"disk {disk.name!r}"
        content = _require_content(document, document.value["disks"][number], path, what)
        raw = content in ("device", "rbd") or disk.format == "raw"
        if disk.encryption and raw:
            document.refuse(f"{path}.encryption:", f"{what}: only qcow2 images are encrypted", "leave 'format' out")
        if disk.own and content != "image":
            found = f"{what}: 'own' belongs to 'image', not to {content!r}"
            document.refuse(f"{path}.own:", found, "leave 'own' out")
        if disk.read_only and disk.bus in ("sata", "ide"):
            found = f"{what}: QEMU has no read-only {disk.bus.upper()} disks"
            document.refuse(f"{path}.read-only", found, "use another 'bus'")
        if disk.name in [other.name for other in disks[:number]]:
            document.refuse(f"{path}.name", f"two disks have the name {disk.name!r}")
    for disk in disks:  # what two disks read, none of them may write to: a base can be shared, an image cannot
        if disk.image is not None and images.count(disk.image) > 1:
            found = f"disk {disk.name!r}: another disk uses its image {disk.image} too"
            document.refuse("$.disks", found, "use 'base' for both")


def _require_content(document: Document, written: dict[str, Any], path: str, what: str) -> str:
    """The one key that says what a disk is made of."""
    content = [key for key in written if key in _CONTENT]
    if not content:
        document.refuse(path, f"{what} needs one of {', '.join(map(repr, _CONTENT))}", "as in 'size: 10G'")
    if len(content) > 1 and {*content} != {"size", "base"}:  # a clone that is larger than its base
        found = f"{what} has both {content[0]!r} and {content[1]!r}; one is enough"
        document.refuse(f"{path}.{content[1]}:", found)
    if content[0] in ("device", "rbd") and written.get("format", "raw") != "raw":
        document.refuse(f"{path}.format", f"{what}: {content[0]!r} is always raw", "leave 'format' out")
    return content[0]


def _require_nics(document: Document, nics: Sequence[NicShape]) -> None:
    macs: set[str] = set()
    hosts: set[tuple[str, str, int]] = set()
    for number, nic in enumerate(nics):
        path = f"$.nics[{number}]"
        for key, owner in (("forwards", "user"), ("ifname", "tap"), ("bridge", "bridge")):
            given = key in document.value["nics"][number]
            if given and nic.kind != owner:
                found = f"{key!r} belongs to kind '{owner}', this card's kind is '{nic.kind}'"
                document.refuse(f"{path}.{key}:", found)
            if nic.kind == owner and owner != "user" and not given:
                found = f"a network card of kind '{nic.kind}' needs {key!r}"
                document.refuse(path, found, f"as in '{key}: {nic.kind[:3]}0'")
        if nic.mac and nic.mac in macs:
            document.refuse(path, f"two network cards have the MAC address {nic.mac}")
        macs.add(nic.mac or "")
        for forward in nic.forwards:
            host = (forward.protocol, forward.address, forward.host)
            if host in hosts:
                document.refuse(path, f"{forward.protocol} port {forward.host} of {forward.address} is forwarded twice")
            hosts.add(host)
