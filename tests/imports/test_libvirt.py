"""libvirt's XML: recorded descriptions become specs, and nothing but a UsageError comes of any other."""

import contextlib
import io
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.cli.main import main
from qmpsnap.errors import UsageError
from qmpsnap.imports import libvirt, spec_text
from qmpsnap.imports.found import MAX_BYTES, Frozen, Imported
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec
from tests.imports.sources import FOLDER, recorded

WEB = MachineSpec(
    name="web",
    uuid="9f6a1d3e-4b55-4c3a-9a51-6a7f1f1c2b01",
    machine="pc-q35-7.2",
    accel="tcg",
    cpu="qemu64,+x2apic,-svm",
    cpus=2,
    memory=256 << 20,
    firmware="uefi",
    uefi_code="/usr/share/OVMF/OVMF_CODE_4M.fd",
    uefi_variables=f"{FOLDER}/web_VARS.fd",
    disks=(
        DiskSpec(name="vda", image=f"{FOLDER}/web.Before Upgrade", cache="none"),
        DiskSpec(name="sda", image=f"{FOLDER}/data.Before Upgrade", bus="scsi", discard=False),
    ),
    cdrom=f"{FOLDER}/boot.iso",
    nics=(NicSpec(mac="52:54:00:8a:3b:01"), NicSpec(mac="52:54:00:8a:3b:02", model="e1000")),
)


def web(**also: bytes) -> Imported:
    return libvirt.read(recorded("web.xml"), "web.xml", snapshots=[*also.items()])


def edited(*changes: tuple[str, str], of: str = "web.xml") -> bytes:
    text = recorded(of).decode()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text.encode()


def test_a_domain_that_libvirt_has_printed() -> None:
    found = web()
    assert found.spec == WEB
    assert (found.changed, found.runs, found.origin) == ((), "", "libvirt's domain web")
    full = edited(("machine='pc-q35-7.2'", "machine='microvm'"))
    assert f"disk sdb: a cdrom with {FOLDER}/boot.iso" in libvirt.read(full, "web.xml").left_out
    for device in ("graphics type=vnc", "memballoon model=virtio", "input type=tablet bus=usb", "metadata"):
        assert device in found.left_out
    assert "controller type=pci model=pcie-root-port (9 times)" in found.left_out


@pytest.mark.parametrize("backend", ["emulator", "passthrough"])
def test_an_emulated_tpm_becomes_a_new_one(backend: str) -> None:
    taken = backend == "emulator"
    tpm = f"<devices><tpm model='tpm-crb'><backend type='{backend}' version='2.0'/></tpm>"
    found = libvirt.read(edited(("<devices>", tpm)), "web.xml")
    assert found.spec.tpm is taken
    assert (f"tpm {backend}" in found.left_out) is not taken
    assert any("the TPM is a new one" in change for change in found.changed) is taken


def test_it_is_read_from_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("table", "json", "name"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(recorded("web.xml"))))
        assert main(["import", "libvirt", "-", "-o", form]) == 0
    printed = capsys.readouterr().out
    text, _, rest = printed.partition("{\n")
    document = json.loads("{" + rest.rpartition("}")[0] + "}")
    assert document["spec"] == text
    assert (document["machine"], document["runs"], document["snapshots"]) == ("web", None, [])
    assert printed.endswith("}\nweb\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x" * (MAX_BYTES + 1))))
    assert main(["import", "libvirt", "-"]) == 2


def test_a_running_domain_is_told() -> None:
    assert "domain id" in libvirt.read(recorded("running.xml"), "r").runs


def test_no_secret_is_printed() -> None:
    assert b"hunter2" in recorded("web.xml")
    data = edited(
        ("<metadata>", "<description>hunter2</description><metadata>"),
        ("<source file='/srv/images/boot.iso'/>", "<source file='x'><auth username='hunter2'/></source>"),
        ("<rng model='virtio'>", "<rng model='virtio' secret='hunter2'>"),
        ("<input type='mouse'", "<filesystem><source dir='hunter2'/></filesystem><input type='mouse'"),
    )
    found = libvirt.read(data, "web.xml")
    assert "hunter2" not in msgspec.json.encode(found).decode() + spec_text.render(found)


def test_snapshots_outside_the_images() -> None:
    # both have the same second: the parent comes first nevertheless
    fresh, upgrade = web(b=recorded("before-upgrade.xml"), a=recorded("fresh.xml")).moments
    assert (fresh.name, fresh.parent, fresh.description, fresh.mode) == ("fresh", None, "just installed", "live")
    assert (upgrade.name, upgrade.original, upgrade.parent) == ("before-upgrade", "Before Upgrade", "fresh")
    assert fresh.frozen == {
        "vda": Frozen(f"{FOLDER}/web.qcow2", f"{FOLDER}/web.fresh"),
        "sda": Frozen(f"{FOLDER}/data.img", f"{FOLDER}/data.fresh"),
    }
    assert (fresh.inside, fresh.memory, fresh.why_not) == ((), False, "")


def test_snapshots_inside_the_images() -> None:
    snapshots = [(name, recorded(f"inner-{name}.xml")) for name in ("two", "one")]
    found = libvirt.read(recorded("inner.xml"), "inner.xml", snapshots=snapshots)
    assert found.spec.disks == (DiskSpec(name="hda", image=f"{FOLDER}/inner.qcow2", bus="ide", cache="none"),)
    assert [(one.name, one.inside, one.memory, one.parent) for one in found.moments] == [
        ("one", ("hda",), False, None),
        ("two", ("hda",), True, "one"),
    ]


def test_a_snapshot_of_another_domain_is_left_out() -> None:
    (moment,) = web(a=recorded("inner-one.xml")).moments
    assert moment.why_not == "it is of domain inner"
    with pytest.raises(UsageError, match="a second time"):
        web(a=recorded("fresh.xml"), b=recorded("fresh.xml"))
    with pytest.raises(UsageError, match="describes a snapshot, not a domain"):
        libvirt.read(recorded("fresh.xml"), "fresh.xml")
    with pytest.raises(UsageError, match="has <domain>, not a snapshot"):
        web(a=recorded("web.xml"))


DISKS = {
    "its storage is of type network, no file": ("type='file' device='disk'", "type='network' device='disk'"),
    "/web.Before Upgrade is vmdk; convert it: qemu-img convert -f vmdk": ("type='qcow2'", "type='vmdk'"),
    "driver io=native": ("cache='none'", "io='native'"),
    "the key of its encryption": ("<target dev='vda'", "<encryption format='luks'/><target dev='vda'"),
    "disk vda: serial": ("<target dev='vda'", "<serial>x</serial><target dev='vda'"),
}


@pytest.mark.parametrize("said", DISKS)
def test_what_a_disk_lacks_is_named(said: str) -> None:
    assert said in "\n".join(libvirt.read(edited(DISKS[said]), "w").left_out)


CHANGES = {
    "network card 52:54:00:8a:3b:01 is on a user network; it was on libvirt's network default": (
        "<interface type='user'>",
        "<interface type='network'><source network='default'/>",
    ),
    "network card 52:54:00:8a:3b:02 is virtio; it was ne2k_pci": ("type='e1000'", "type='ne2k_pci'"),
    "disk vda is on bus sata; it was ide": ("bus='virtio'", "bus='ide'"),
    "disk vda is on bus scsi; it was usb": ("bus='virtio'", "bus='usb'"),
    "the CPU is 'host', all that this host's has: it was host-model": ("mode='custom'", "mode='host-model'"),
}


@pytest.mark.parametrize("said", CHANGES)
def test_what_the_guest_finds_changed_is_told(said: str) -> None:
    assert said in "\n".join(libvirt.read(edited(CHANGES[said]), "w").changed)


def test_a_bridge_is_kept_and_the_boot_disk_is_first() -> None:
    data = edited(
        ("<interface type='user'>", "<interface type='bridge'><source bridge='br7'/>"),
        ("<target dev='sda'", "<boot order='1'/><target dev='sda'"),
    )
    spec = libvirt.read(data, "w").spec
    assert spec.nics[0] == NicSpec(kind="bridge", bridge="br7", mac="52:54:00:8a:3b:01")
    assert [disk.name for disk in spec.disks] == ["sda", "vda"]


@pytest.mark.parametrize(
    ("unit", "amount", "size"),
    [("KiB", 262144, 256 << 20), ("", 262144, 256 << 20), ("GB", 1, 954 << 20), ("G", 1, 1 << 30), ("b", 1, 1 << 20)],
)
def test_memory_has_its_unit(unit: str, amount: int, size: int) -> None:
    data = edited(("<memory unit='KiB'>262144<", f"<memory{unit and f' unit={unit!r}'}>{amount}<"))
    assert libvirt.read(data, "w").spec.memory == size


REFUSED = {
    "document types and entities in XML are refused": b'<!DOCTYPE d [<!ENTITY a "b">]><domain type="kvm">&a;</domain>',
    "larger than 1 MiB": b"<domain>" + b" " * MAX_BYTES + b"</domain>",
    "not well-formed XML: no element found": b"",
    "not well-formed XML: mismatched tag": b"<domain></d>",
    "not well-formed XML: undefined entity": b"<domain type='kvm'>&unknown;</domain>",
    "elements more than 64 deep": b"<a>" * 65 + b"</a>" * 65,
    "not a domain of QEMU's": b"<html/>",
    "a domain of type 'xen'": b"<domain type='xen'/>",
    "a guest for aarch64": b"<domain type='kvm'><os><type arch='aarch64'>hvm</type></os></domain>",
    "<memory> is 'much', not a number": b"<domain type='kvm'><os><type>hvm</type></os><memory>much</memory></domain>",
    "has the unknown unit 'Pages'": b"<domain type='kvm'><os><type>hvm</type></os><memory unit='Pages'/></domain>",
    "unknown encoding": b"<?xml version='1.0' encoding='nonsense'?><domain/>",
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_domain_is_refused(said: str) -> None:
    with pytest.raises(UsageError) as caught:
        libvirt.read(REFUSED[said], "dom.xml")
    assert said in caught.value.message
    assert caught.value.message.startswith("dom.xml")


PIECES = st.sampled_from(
    [
        *(
            "<disk",
            "<source file='/a'/>",
            "<target dev='vda'",
            " type='file'",
            ">",
            "/>",
            "</disk>",
            "<interface>",
            "&#0;",
        ),
        *(
            "</interface>",
            "<boot order='9999999'/>",
            "<mac address='x'/>",
            "<nvram>",
            "</nvram>",
            "é",
            "\x00",
            "<!--",
            "]]>",
        ),
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join))
@settings(deadline=None)
def test_any_devices_are_a_machine_or_a_usage_error(inner: str) -> None:
    data = f"<domain type='kvm'><os><type>hvm</type></os><devices>{inner}</devices></domain>".encode()
    with contextlib.suppress(UsageError):
        spec_text.render(libvirt.read(data, "dom.xml"))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        libvirt.read(data, "dom.xml")
