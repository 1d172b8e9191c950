"""A machine's spec from YAML: a checked value, or one error that says where it is wrong and what would be right."""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.errors import SpecError
from qmpsnap.machine.config.specvalues import (
    Reader,
    disk_name,
    disk_size,
    file_path,
    flag,
    items,
    machine_name,
    matching,
    memory,
    nearest,
    one_of,
    string,
    strings,
    whole,
)
from qmpsnap.machine.config.yamltree import Entry, Tree, compose, load, shorten, tree_of
from qmpsnap.model.machines.spec import (
    Accel,
    Bus,
    Cache,
    DiskSpec,
    Display,
    Encryption,
    Firmware,
    Format,
    Forward,
    MachineSpec,
    NicSpec,
)

MAX_CPUS = 4096
MAX_PORT = 65535

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_FORWARD = re.compile(r"(?:([0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})(?:/(tcp|udp))?")
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+,=:-]*")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")


def read(path: Path, *, guest_dir: Path, profile_dir: Path) -> MachineSpec:
    """The machine that the file describes, checked and complete.

    Args:
        path: the YAML file; relative paths in it start from its folder.
        guest_dir: the small guest's folder, what ``@guest/`` stands for.
        profile_dir: the folder of the shipped profiles.

    Raises:
        SpecError: the file cannot be read or describes no machine; nothing was created.
    """
    return parse(load(path), str(path), folder=path.parent, guest_dir=guest_dir, profile_dir=profile_dir)


def parse(text: str, source: str, *, folder: Path, guest_dir: Path, profile_dir: Path) -> MachineSpec:
    """The machine that the text describes; see :func:`read`.

    Args:
        text: one YAML document.
        source: what errors call it, usually the file's name.
        folder: where relative paths start.
        guest_dir: the small guest's folder.
        profile_dir: the folder of the shipped profiles.

    Raises:
        SpecError: the text describes no machine; nothing was created.
    """
    return _machine(compose(text, source), folder=folder, guest_dir=guest_dir, profile_dir=profile_dir)


def checked(spec: MachineSpec, *, folder: Path, guest_dir: Path) -> MachineSpec:
    """The machine that a program describes, held to the same rules as a file's: its names become paths and arguments.

    Args:
        spec: the spec; its paths may be path-like objects, too.
        folder: where relative paths start.
        guest_dir: the small guest's folder.

    Raises:
        SpecError: it describes no machine; nothing was created.
    """
    try:
        plain = msgspec.to_builtins(spec, enc_hook=os.fspath)
    except TypeError as error:
        raise SpecError(f"the spec holds what no spec can: {error}") from error
    plain.pop("tcg_cpu", None)  # that of the machine whose spec was taken: define records its own
    if type(spec.memory) is int:
        plain["memory"] = f"{spec.memory}B"  # a file's plain number is MiB
    root = tree_of(plain, "the spec")
    return _machine(root, folder=folder, guest_dir=guest_dir, profile_dir=Path())


def _machine(root: Tree, *, folder: Path, guest_dir: Path, profile_dir: Path) -> MachineSpec:
    entries = _machine_entries(root)
    values = _read_all(entries, _machine_readers(folder, guest_dir))
    if "profile" in values:
        chosen = _profile(entries["profile"].value, values.pop("profile"), profile_dir)
        defaults = _machine_entries(chosen)
        if "profile" in defaults:
            defaults["profile"].key.refuse("a profile cannot build on another profile")
        # Whole keys: a spec with disks of its own has none of the profile's.
        values = _read_all(defaults, _machine_readers(profile_dir, guest_dir)) | values
        entries = defaults | entries
    if "name" not in values:
        root.refuse("key 'name' is missing", "give the machine a name, as in 'name: web'")
    spec = MachineSpec(**values)
    _agree(spec, entries, root)
    return spec


def _profile(at: Tree, name: str, profile_dir: Path) -> Tree:
    """The shipped profile of that name; only names found in the folder are ever opened."""
    known = sorted(path.stem for path in profile_dir.glob("*.yaml"))
    if name not in known:
        at.refuse(f"unknown profile {shorten(name)!r}{nearest(name, known)}", f"profiles: {', '.join(known)}")
    path = profile_dir / f"{name}.yaml"
    return compose(load(path), str(path))


def _agree(spec: MachineSpec, entries: Mapping[str, Entry], root: Tree) -> None:
    """Check what no key can be blamed for alone."""

    def at(*keys: str) -> Tree:
        return next((entries[key].value for key in keys if key in entries), root)

    if spec.kernel is None and (spec.initrd is not None or spec.append):
        at("initrd", "append").refuse("'initrd' and 'append' need a 'kernel'")
    if spec.accel == "tcg" and spec.cpu.split(",")[0] == "host":
        at("cpu").refuse("cpu 'host' needs KVM", "leave 'cpu' out, or set 'accel: kvm'")
    if spec.machine != "microvm":
        return
    if spec.firmware == "uefi":
        at("firmware").refuse("a microvm has no flash for UEFI", "use 'firmware: bios', or 'machine: q35'")
    if spec.display != "none":
        at("display").refuse("a microvm has no display", "use 'display: none', or 'machine: q35'")
    for disk in spec.disks:
        if disk.bus in ("sata", "nvme"):
            at("disks").refuse(f"disk {disk.name!r}: a microvm has no {disk.bus} bus", "use 'bus: virtio' or scsi")


# --- mappings and their keys ------------------------------------------------------------------------------------------


def _machine_entries(root: Tree) -> dict[str, Entry]:
    return _entries(root, "the spec", _machine_readers(Path(), Path()))


def _machine_readers(folder: Path, guest_dir: Path) -> dict[str, Reader]:
    def path(tree: Tree, what: str) -> str:
        return file_path(tree, what, folder, guest_dir)

    def disks(tree: Tree, what: str) -> tuple[DiskSpec, ...]:
        return _disks(tree, what, path)

    return {
        "name": machine_name,
        "profile": string,
        "machine": matching(_MACHINE, "a machine type's name such as q35"),
        "accel": one_of(Accel),
        "cpu": matching(_CPU, "a CPU model such as max or Skylake-Client,+aes"),
        "cpus": whole(1, MAX_CPUS),
        "memory": memory,
        "kernel": path,
        "initrd": path,
        "append": string,
        "firmware": one_of(Firmware),
        "disks": disks,
        "nics": _nics,
        "agent": flag,
        "display": one_of(Display),
        "extra": strings,
    }


def _entries(tree: Tree, what: str, known: Mapping[str, Reader]) -> dict[str, Entry]:
    """The mapping's entries, after a look at the keys."""
    if not isinstance(tree.value, dict):
        tree.refuse(f"expected {what} to be a mapping of keys to values, found {tree.described()}")
    for key, entry in tree.value.items():
        if key not in known:
            entry.key.refuse(
                f"unknown key {shorten(key)!r}{nearest(key, list(known))}", f"keys here: {', '.join(known)}"
            )
    return tree.value


def _read_all(entries: Mapping[str, Entry], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The values, under the names that the structs have for them."""
    return {key.replace("-", "_"): readers[key](entry.value, f"'{key}'") for key, entry in entries.items()}


# --- disks ------------------------------------------------------------------------------------------------------------


def _disks(tree: Tree, what: str, path: Reader) -> tuple[DiskSpec, ...]:
    disks: dict[str, DiskSpec] = {}
    for item in items(tree, what):
        disk, name = _disk(item, path)
        if disk.name in disks:
            name.refuse(f"two disks have the name {disk.name!r}")
        disks[disk.name] = disk
    _no_shared_writer(tree, tuple(disks.values()))
    return tuple(disks.values())


def _no_shared_writer(tree: Tree, disks: tuple[DiskSpec, ...]) -> None:
    """What two disks read, none of them may write to: a base can be shared, an image cannot."""
    files = [disk.image or disk.base for disk in disks]
    for disk in disks:
        if disk.image is not None and files.count(disk.image) > 1:
            tree.refuse(f"disk {disk.name!r}: another disk uses its image {disk.image} too", "use 'base' for both")


def _disk(tree: Tree, path: Reader) -> tuple[DiskSpec, Tree]:
    """The disk, and its name's place."""

    def encryption(tree: Tree, what: str) -> Encryption:
        readers: dict[str, Reader] = {"secret-file": path}
        return Encryption(**_read_all(_entries(tree, what, readers), readers))

    readers: dict[str, Reader] = {
        "name": disk_name,
        "size": disk_size,
        "image": path,
        "base": path,
        "format": one_of(Format, "an image of another format: qemu-img convert -O qcow2 IMAGE NEW, then name NEW here"),
        "bus": one_of(Bus),
        "cache": one_of(Cache),
        "discard": flag,
        "read-only": flag,
        "snapshot": flag,
        "encryption": encryption,
    }
    entries = _entries(tree, "a disk", readers)
    values = _read_all(entries, readers)
    if "name" not in values:
        tree.refuse("the disk has no 'name'", "give it one, as in 'name: vda'")
    name = values["name"]
    content = [key for key in entries if key in ("size", "image", "base")]
    if not content:
        tree.refuse(f"disk {name!r} needs one of 'size', 'image' and 'base'", "as in 'size: 10G'")
    if len(content) > 1:
        entries[content[1]].key.refuse(f"disk {name!r} has both {content[0]!r} and {content[1]!r}; one is enough")
    disk = DiskSpec(**values)
    if disk.encryption and disk.format != "qcow2":
        entries["encryption"].key.refuse(f"disk {name!r}: only qcow2 images are encrypted", "leave 'format' out")
    if disk.read_only and disk.bus == "sata":
        entries["read-only"].value.refuse(f"disk {name!r}: QEMU has no read-only SATA disks", "use another 'bus'")
    return disk, entries["name"].value


# --- network cards ----------------------------------------------------------------------------------------------------


def _nics(tree: Tree, what: str) -> tuple[NicSpec, ...]:
    if tree.value == "none":
        return ()
    nics: list[NicSpec] = []
    macs: set[str] = set()
    hosts: set[tuple[str, str, int]] = set()
    for item in (tree,) if tree.value == "user" else items(tree, what):
        nic = _nic(item)
        if nic is None:
            continue
        if nic.mac in macs:
            item.refuse(f"two network cards have the MAC address {nic.mac}")
        macs |= {nic.mac} if nic.mac else set()
        for forward in nic.forwards:
            host = (forward.protocol, forward.address, forward.host)
            if host in hosts:
                item.refuse(f"{forward.protocol} port {forward.host} of {forward.address} is forwarded twice")
            hosts.add(host)
        nics.append(nic)
    return tuple(nics)


def _nic(tree: Tree) -> NicSpec | None:
    """The card, or None for kind ``none``."""
    if tree.value in ("none", "user"):
        return NicSpec() if tree.value == "user" else None
    readers: dict[str, Reader] = {
        "kind": one_of(("none", "user", "tap", "bridge")),
        "mac": _mac,
        "forwards": _forwards,
        "ifname": matching(_INTERFACE, "an interface's name such as tap0"),
        "bridge": matching(_INTERFACE, "a bridge's name such as br0"),
    }
    entries = _entries(tree, "a network card", readers)
    values = {"kind": "user"} | _read_all(entries, readers)
    kind = values["kind"]
    for key, owner in (("forwards", "user"), ("ifname", "tap"), ("bridge", "bridge")):
        if key in entries and kind != owner:
            entries[key].key.refuse(f"{key!r} belongs to kind '{owner}', this card's kind is '{kind}'")
        if kind == owner and owner != "user" and key not in entries:
            tree.refuse(f"a network card of kind '{kind}' needs {key!r}", f"as in '{key}: {kind[:3]}0'")
    return None if kind == "none" else NicSpec(**values)


def _mac(tree: Tree, what: str) -> str:
    mac: str = matching(_MAC, "a MAC address such as 52:54:00:12:34:56")(tree, what)
    mac = mac.lower()
    if int(mac[:2], 16) & 1:
        tree.refuse(f"{what}: {mac} is a multicast address", "the first byte must be even, as in 52:54:00:12:34:56")
    return mac


def _forwards(tree: Tree, what: str) -> tuple[Forward, ...]:
    return tuple(_forward(item, what) for item in items(tree, what))


def _forward(tree: Tree, what: str) -> Forward:
    port = whole(1, MAX_PORT)
    readers: dict[str, Reader] = {
        "host": port,
        "guest": port,
        "protocol": one_of(("tcp", "udp")),
        "address": _address,
    }
    if isinstance(tree.value, str):
        found = _FORWARD.fullmatch(tree.value)
        if not found:
            tree.refuse(f"expected {what} like '2222:22' (host:guest), found {tree.described()}")
        address, host, guest, protocol = found.groups()
        parts = {"address": address, "host": int(host), "guest": int(guest), "protocol": protocol}
        given = {key: Tree(part, tree.where, str(part)) for key, part in parts.items() if part is not None}
        return Forward(**{key: readers[key](part, f"'{key}'") for key, part in given.items()})
    values = _read_all(_entries(tree, "a forward", readers), readers)
    for key in ("host", "guest"):
        if key not in values:
            tree.refuse(f"the forward has no {key!r} port", "as in '{host: 2222, guest: 22}'")
    return Forward(**values)


def _address(tree: Tree, what: str) -> str:
    text = string(tree, what)
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        tree.refuse(f"expected {what} to be an IPv4 address, found {tree.described()}", "as in 127.0.0.1 or 0.0.0.0")
