"""libvirt's domain XML (``virsh dumpxml``) as a machine."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from qmpsnap.errors import UsageError
from qmpsnap.hint import option
from qmpsnap.imports import libvirt_devices, libvirt_snapshots
from qmpsnap.imports.found import Imported, machine_name, whole_mib
from qmpsnap.imports.libvirt_devices import Differences, named
from qmpsnap.imports.xml_tree import Element, parse
from qmpsnap.model.machines.spec import MachineSpec

_POWERS: Final = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_UNIT: Final = re.compile("([KMGT]?)(B|iB|)|b|k|bytes")
_QEMUS: Final = {"pclmuldq": "pclmulqdq"}
"""A CPU feature that libvirt calls otherwise."""
_DEFAULTS: Final = {"on_poweroff": "destroy", "on_reboot": "restart", "on_crash": "destroy"}
_READ: Final = frozenset({"name", "uuid", "memory", "currentMemory", "vcpu", "os", "features", "cpu", "devices"})
_OURS: Final = frozenset({"acpi", "apic"})
_LOADED: Final = frozenset({"type", "loader", "nvram", "boot", "kernel", "initrd", "cmdline", "firmware"})


def read(data: bytes, source: str, *, snapshots: Sequence[tuple[str, bytes]] = (), name: str | None = None) -> Imported:
    """The machine that a domain's XML describes.

    Args:
        data: the document, which errors call ``source``.
        source: see there.
        snapshots: (source, document) of each of its snapshots, as ``virsh snapshot-dumpxml`` prints it.
        name: of the machine; None for the domain's.
    """
    root = parse(data, source)
    if root.tag == "domainsnapshot":
        raise UsageError(
            f"{source} describes a snapshot, not a domain",
            hint="name it beside the domain: " + option("snapshot", "FILE"),
        )
    if root.tag != "domain" or root.get("type") not in ("kvm", "qemu"):
        what = f"a domain of type {root.get('type')!r}" if root.tag == "domain" else f"<{root.tag}>"
        raise UsageError(f"{source} has {what}, not a domain of QEMU's", hint="virsh dumpxml DOMAIN prints one")
    _require_arch(root, source)
    original = root.first("name").text
    differences = Differences()
    spec = MachineSpec(
        name=machine_name(original, name),
        uuid=root.first("uuid").text.lower(),
        machine=root.first("os", "type").get("machine") or "pc",
        accel="kvm" if root.get("type") == "kvm" else "tcg",
        cpu=_cpu(root, differences),
        cpus=_number(root.first("vcpu"), source, 1),
        memory=whole_mib(_bytes(root.first("memory"), source)),
    )
    spec = libvirt_devices.add(_boot(root, spec), root, differences)
    differences.left_out += _rest(root)
    found = Imported(
        origin=f"libvirt's domain {original}",
        spec=spec,
        changed=tuple(differences.changed),
        left_out=tuple(differences.left_out),
        runs="its XML has a domain id, which only a running domain has" if root.get("id") else "",
    )
    return replace(found, moments=libvirt_snapshots.read(snapshots, original=original, spec=spec))


def _require_arch(root: Element, source: str) -> None:
    arch = root.first("os", "type").get("arch") or "x86_64"
    if arch not in ("x86_64", "i686"):
        raise UsageError(f"{source} has a guest for {arch}; qmpsnap starts x86_64 machines only")
    if root.first("os", "type").text != "hvm":
        raise UsageError(f"{source} has a guest of kind {root.first('os', 'type').text!r}, which QEMU does not run")


def _number(element: Element, source: str, least: int) -> int:
    if not element:
        return least
    if not re.fullmatch("[0-9]{1,12}", element.text):
        raise UsageError(f"{source}: <{element.tag}> is {element.text[:40]!r}, not a number")
    return max(least, int(element.text))


def _bytes(element: Element, source: str) -> int:
    """A size by its unit: a bare letter and ``iB`` are powers of 1024, ``B`` of 1000, nothing is KiB."""
    unit = element.get("unit") or "KiB"
    found = _UNIT.fullmatch(unit)
    if found is None:
        raise UsageError(f"{source}: <{element.tag}> has the unknown unit {unit[:40]!r}")
    if unit in ("b", "bytes", "B"):
        return _number(element, source, 0)
    bytes_: int = (1000 if found[2] == "B" else 1024) ** _POWERS[found[1] or "K"]
    return _number(element, source, 0) * bytes_


def _cpu(root: Element, differences: Differences) -> str:
    cpu = root.first("cpu")
    differences.left_out += [f"cpu: {child.tag}" for child in cpu.children if child.tag not in ("model", "feature")]
    features = [(child.get("policy"), child.get("name")) for child in cpu.all("feature")]
    marks = {"force": "+", "require": "+", "": "+", "disable": "-", "forbid": "-"}
    words = [f"{marks[policy]}{_QEMUS.get(name, name)}" for policy, name in features if policy in marks]
    match cpu.get("mode") or ("custom" if cpu.first("model") else ""):
        case "host-passthrough":
            model = "host"
        case "host-model":
            model = "host"
            differences.changed.append("the CPU is 'host', all that this host's has: it was host-model")
        case "maximum":
            model = "max"
        case "custom":
            model = cpu.first("model").text
        case _:
            model = "qemu64"  # QEMU's default, which libvirt leaves to it
    return ",".join((model, *words))


def _boot(root: Element, spec: MachineSpec) -> MachineSpec:
    os = root.first("os")
    loader, variables = os.first("loader"), os.first("nvram")
    if loader.get("type") == "pflash" or os.get("firmware") == "efi":
        spec = replace(spec, firmware="uefi", uefi_code=loader.text or None, uefi_variables=variables.text or None)
    kernel = os.first("kernel").text
    if not kernel:
        return spec
    return replace(spec, kernel=kernel, initrd=os.first("initrd").text or None, append=os.first("cmdline").text)


def _rest(root: Element) -> Iterator[str]:
    """What nobody has looked at; values may be secrets and are not told."""
    if root.first("currentMemory") and root.first("currentMemory").text != root.first("memory").text:
        yield "currentMemory: the guest gets all of its memory"
    loader = root.first("os", "loader")
    if loader and loader.get("type") != "pflash" and root.first("os").get("firmware") != "efi":
        yield "os: loader, as it is no flash"
    if loader.get("secure") == "yes":
        yield "os: the protection of Secure Boot's variables"
    yield from (f"os: {named(child)}" for child in root.first("os").children if child.tag not in _LOADED)
    yield from (f"features: {child.tag}" for child in root.first("features").children if child.tag not in _OURS)
    if root.first("vcpu").get("current"):
        yield "vcpu: all vCPUs are there from the start"
    for child in root.children:
        kept = child.tag in _READ or _DEFAULTS.get(child.tag) == child.text
        if child.tag == "clock":
            yield from _clock(child)
        elif child.tag.endswith("}commandline"):
            words = [each for each in child.children if each.tag.endswith("}arg")]
            yield f"qemu:commandline: {len(words)} arguments; the spec's 'extra' takes those that the guest needs"
        elif not kept:
            yield child.tag.partition("}")[2] or child.tag


def _clock(clock: Element) -> Iterator[str]:
    if clock.get("offset") not in ("", "utc"):
        yield f"clock: offset {clock.get('offset')}; the guest's clock is UTC"
    yield from (f"clock: {named(timer)}" for timer in clock.children)
