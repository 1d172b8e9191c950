"""Proxmox' configurations: one with everything, and whatever else may stand in such a file."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.errors import UsageError
from qmpsnap.imports import proxmox, spec_text
from qmpsnap.imports.found import Frozen, Imported
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec
from tests.imports.sources import PROXMOX, STORAGE

IMAGES = "/var/lib/vz/images/100"


def read(text: str = PROXMOX) -> Imported:
    return proxmox.read(text.encode(), "/etc/pve/qemu-server/100.conf", storage=STORAGE)


def test_a_whole_configuration() -> None:
    found = read()
    assert found.spec == MachineSpec(
        name="web.server",
        uuid="0f0e0d0c-1234-4321-9876-0123456789ab",
        machine="pc-q35-8.1",
        accel="kvm",
        cpu="qemu64,+aes,+popcnt,+pni,+sse4.1,+sse4.2,+ssse3,+pcid",
        cpus=4,
        memory=2 << 30,
        firmware="uefi",
        uefi_variables=f"{IMAGES}/vm-100-disk-1.raw",
        disks=(
            DiskSpec(name="scsi0", image=f"{IMAGES}/vm-100-disk-0.qcow2", bus="scsi"),
            DiskSpec(
                name="scsi1",
                image="/mnt/big/images/100/vm-100-disk-2.raw",
                format="raw",
                bus="scsi",
                cache="none",
                discard=False,
                read_only=True,
            ),
        ),
        cdrom="/var/lib/vz/template/iso/debian-12.iso",
        nics=(
            NicSpec(kind="bridge", bridge="vmbr0", mac="bc:24:11:aa:bb:cc"),
            NicSpec(kind="bridge", bridge="vmbr1", mac="bc:24:11:aa:bb:cd", model="e1000"),
        ),
    )
    assert found.origin == "Proxmox' VM 100 (Web.Server)"
    assert "it was pc-q35-8.1+pve0" in found.changed[0]
    for named in (
        "hostpci0",
        "cipassword",
        "ide0: a cdrom with local:100/vm-100-cloudinit.qcow2",
        "net0: tag",
        "scsi0: iothread",
    ):
        assert named in found.left_out
    assert "unused0 local:100/vm-100-disk-9.qcow2" in found.left_out
    assert "section [PENDING]" in found.left_out


def test_a_tpm_becomes_a_new_one() -> None:
    found = read(f"tpmstate0: local:100/vm-100-disk-5.raw,size=4M,version=v2.0\n{PROXMOX}")
    assert found.spec.tpm
    assert "the TPM is a new one: the state of Proxmox' is left out" in found.changed
    assert "\ntpm: true\n" in spec_text.render(found)


def test_no_secret_is_printed() -> None:
    assert "supersecret" in PROXMOX
    found = read(f"args: -object secret,data=supersecret\nsshkeys: supersecret\n{PROXMOX}")
    assert "supersecret" not in msgspec.json.encode(found).decode() + spec_text.render(found)


def test_its_snapshots() -> None:
    fresh, upgrade = read().moments
    assert (fresh.original, fresh.parent, fresh.created, fresh.memory) == ("fresh", None, 1700000100, False)
    assert (upgrade.parent, upgrade.current, upgrade.memory) == ("fresh", True, True)
    assert upgrade.description == "it worked\nhere"
    assert upgrade.inside == ("scsi0",)
    assert upgrade.frozen == {"scsi0": Frozen(f"{IMAGES}/snap-before-upgrade-vm-100-disk-0.qcow2", "")}
    other = PROXMOX.replace("[fresh]\nmemory: 2048\nscsi0: local:100/vm-100-disk-0", "[fresh]\nscsi0: local:100/other")
    assert read(other).moments[0].why_not == "its disks are not the machine's"


def test_every_storage_needs_its_folder() -> None:
    with pytest.raises(UsageError, match="the folder of storage local, big is not known") as caught:
        proxmox.read(PROXMOX.encode(), "100.conf", storage={})
    assert "local=DIR" in caught.value.hint


@pytest.mark.parametrize(
    ("volume", "path", "format_"),
    [
        ("big:vm-100-disk-0", "/mnt/big/vm-100-disk-0", "raw"),
        ("local:9000/base-9000-disk-0.qcow2/100/vm-100-disk-0.qcow2", f"{IMAGES}/vm-100-disk-0.qcow2", "qcow2"),
        ("/dev/disk/by-id/x", "/dev/disk/by-id/x", "raw"),
        ("file=local:100/a.qcow2", f"{IMAGES}/a.qcow2", "qcow2"),
    ],
)
def test_where_a_volume_lies(volume: str, path: str, format_: str) -> None:
    (disk,) = read(f"memory: 512\nvirtio0: {volume},size=1G\n").spec.disks
    assert (disk.image, disk.format) == (path, format_)


def test_defaults_are_those_of_proxmox() -> None:
    spec = read("cores: 1\nkvm: 0\nide0: local:1/a.raw\nboot: order=ide0\n").spec
    assert (spec.name, spec.machine, spec.accel, spec.cpu) == ("vm-100", "pc", "tcg", "kvm64,+lahf_lm,+sep")
    assert (spec.memory, spec.agent, spec.disks[0].bus, spec.disks[0].cache) == (512 << 20, False, "ide", "none")


REFUSED = {
    "100.conf:2: this is no 'key: value'": "memory: 512\nwhat is this\n",
    "is no configuration of a Proxmox VM": "name: web\ndisks: 1\n",
    "memory is 'much', not a number": "memory: much\n",
    "'local:../../x' is not a volume": "memory: 512\nscsi0: local:../../x\n",
    "is larger than 1 MiB": "#" * (1 << 21),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_no_configuration_is_refused(said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(REFUSED[said])
    assert said in caught.value.message


KEYS = st.sampled_from(
    ["scsi0", "ide2", "net0", "boot", "cpu", "machine", "memory", "smbios1", "[s]", "parent", "vga", "#"]
)


@given(st.lists(st.tuples(KEYS, st.text(max_size=20)), max_size=6))
@settings(deadline=None)
def test_any_lines_are_a_machine_or_a_usage_error(lines: list[tuple[str, str]]) -> None:
    with contextlib.suppress(UsageError):
        spec_text.render(read("cores: 1\n" + "".join(f"{key}: {value}\n" for key, value in lines)))
