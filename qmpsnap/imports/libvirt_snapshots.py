"""libvirt's metadata of snapshots: what ``virsh snapshot-dumpxml`` prints, or a file below its ``qemu/snapshot``."""

import re
from collections.abc import Sequence
from typing import Final

from qmpsnap.errors import UsageError
from qmpsnap.imports.found import Frozen, Moment, oldest_first, plain_name
from qmpsnap.imports.xml_tree import Element, parse
from qmpsnap.model.machines.spec import MachineSpec

_MODES: Final = {"disk-snapshot": "live", "running": "live", "paused": "paused"}


def read(documents: Sequence[tuple[str, bytes]], *, original: str, spec: MachineSpec) -> tuple[Moment, ...]:
    """The snapshots of a domain that was called ``original``, oldest first."""
    found: list[Moment] = []
    names: set[str] = set()
    for source, data in documents:
        root = parse(data, source)
        if root.tag != "domainsnapshot":
            raise UsageError(f"{source} has <{root.tag}>, not a snapshot", hint="virsh snapshot-dumpxml prints one")
        moment = _moment(root, source, original, spec, names)
        if any(one.original == moment.original for one in found):
            raise UsageError(f"{source} describes the snapshot {moment.original!r} a second time", hint="name it once")
        names.add(moment.name)
        found.append(moment)
    return oldest_first(found)


def _moment(root: Element, source: str, original: str, spec: MachineSpec, names: set[str]) -> Moment:
    name, created = root.first("name").text, root.first("creationTime").text
    if not name or not re.fullmatch("[0-9]{1,12}", created):
        raise UsageError(f"{source} has a snapshot without name or time")
    domain = root.first("domain")
    before = {
        disk.first("target").get("dev"): disk.first("source").get("file")
        for disk in domain.first("devices").all("disk")
    }
    frozen: dict[str, Frozen] = {}
    inside: list[str] = []
    for disk in root.first("disks").all("disk"):
        dev = disk.get("name")
        if spec.disk(dev.lower()) is None:
            continue
        if disk.get("snapshot") == "external":
            frozen[dev.lower()] = Frozen(before.get(dev, ""), disk.first("source").get("file"))
        elif disk.get("snapshot") == "internal":
            inside.append(dev.lower())
    return Moment(
        name=plain_name(name, taken=names, fallback="snapshot"),
        original=name,
        parent=root.first("parent", "name").text or None,
        created=float(created),
        description=root.first("description").text,
        mode=_MODES.get(root.first("state").text, "stopped"),
        current=root.first("active").text == "1",
        frozen=frozen,
        inside=tuple(inside),
        memory=root.first("memory").get("snapshot") in ("internal", "external"),
        why_not=_why_not(root, original, spec, none=not frozen and not inside),
    )


def _why_not(root: Element, original: str, spec: MachineSpec, *, none: bool) -> str:
    domain = root.first("domain")
    if domain and (domain.first("name").text, domain.first("uuid").text.lower()) != (original, spec.uuid):
        return f"it is of domain {domain.first('name').text}"
    return "it has none of the machine's disks" if none else ""
