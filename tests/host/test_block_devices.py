"""Which block device it is, from what sysfs and udev say of it."""

from pathlib import Path

import pytest

from qmpsnap.host import block_devices

LVM = "LVM-" + "v" * 32 + "abcdef0123456789ABCDEF01234zyxwv"


def tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], udev: str = "") -> str:
    """The identity of a device of which the kernel tells this."""
    folder = tmp_path / "sys"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + "\n")
    said = block_devices._said

    def read(file: str, *, before: str = "") -> str:
        return udev if file.startswith("/run/udev") else said(file, before=before)

    monkeypatch.setattr(block_devices, "_folder", lambda number: str(folder / "part" if number == 1 else folder))
    monkeypatch.setattr(block_devices, "_said", read)
    return block_devices.identity(1 if "part/partition" in files else 2)


@pytest.mark.parametrize(
    ("files", "udev", "identity"),
    [
        ({"dm/uuid": LVM}, "", "lvm:abcdef-0123-4567-89AB-CDEF-0123-4zyxwv"),
        ({"dm/uuid": LVM + "-cow"}, "", f"dm:{LVM}-cow"),
        ({"dm/uuid": "CRYPT-LUKS2-1"}, "", "dm:CRYPT-LUKS2-1"),
        ({"loop/backing_file": "/a b", "loop/offset": "0"}, "", "loop:/a b@0"),
        ({"device/image_id": "i", "device/pool_id": "3", "device/cluster_fsid": "f"}, "", "rbd:f/3/i"),
        ({"wwid": "eui.1"}, "", "wwn:eui.1"),
        ({"device/wwid": "naa.5"}, "", "wwn:naa.5"),
        ({"serial": "vda1"}, "", "serial:vda1"),
        ({}, "E:ID_WWN=0x5\nS:disk/by-id/b", "wwn:0x5"),
        ({}, "S:disk/by-path/0\nS:disk/by-id/b\nS:disk/by-id/a", "by-id:a"),
        ({"part/partition": "2", "dev": "0:2", "wwid": "eui.1"}, "", "wwn:eui.1-part2"),
        ({"part/partition": "2", "dev": "0:2"}, "", ""),
        ({}, "", ""),
    ],
)
def test_a_device_is_told_by_what_it_keeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], udev: str, identity: str
) -> None:
    assert tell(monkeypatch, tmp_path, files, udev) == identity


def test_a_file_is_no_device(tmp_path: Path) -> None:
    assert block_devices.number_of(tmp_path) is None
    assert block_devices.number_of(tmp_path / "none") is None
    assert block_devices.number_of("/dev/null") is None
