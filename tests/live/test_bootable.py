"""docs/how-to/from-an-image.md, typed on a Debian image that a boot loader starts."""

import re
import shlex
import struct
import subprocess
import time
from pathlib import Path

import pytest

from qmpsnap.cli.main import main
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from tests.live.played import DOCS
from tests.volumes.guest import DEADLINE

PAGE = DOCS / "how-to/from-an-image.md"
START = 2048
"""The partition's first sector; GRUB lies before it."""
SECTOR = 512
# The guest counts its boots on its disk, and says how many there were.
SCRIPT = "echo boot >>/boots; sync; wc -l /boots; sleep 100000"
CONFIG = f"""\
set root=(hd0,msdos1)
linux /vmlinuz root=/dev/vda1 rw console=ttyS0 quiet panic=-1 init=/bin/sh -- -c '{SCRIPT}'
initrd /initrd.img
boot
"""


def bootable(root: Path, work: Path) -> Path:
    """A qcow2 image with GRUB and one partition that has the file system; needs Debian's packages, and no root."""
    subprocess.run(["apt-get", "download", "-q", "grub-pc-bin", "grub-common"], cwd=work, check=True)
    for package in work.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, work / "grub"], check=True)
    modules = work / "grub/usr/lib/grub/i386-pc"
    (work / "early.cfg").write_text(CONFIG)
    words: list[str | Path] = [work / "grub/usr/bin/grub-mkimage"]
    words += ["-O", "i386-pc", "-d", modules, "-p", "/boot/grub", "-c", "early.cfg"]
    subprocess.run([*words, "-o", "core.img", "biosdisk", "part_msdos", "ext2", "linux"], cwd=work, check=True)
    size = root.stat().st_size
    partition = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", START, size // SECTOR)
    disk = work / "disk.raw"
    with disk.open("wb") as file:
        file.write((modules / "boot.img").read_bytes()[:440] + bytes(6) + partition + bytes(48) + b"\x55\xaa")
        assert file.write((work / "core.img").read_bytes()) < (START - 1) * SECTOR
        file.truncate(START * SECTOR + size)
    copying = ["dd", f"if={root}", f"of={disk}", "bs=1M", "seek=1", "conv=sparse,notrunc", "status=none"]
    subprocess.run(copying, check=True)
    made = work / "debian.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, made], check=True)
    disk.unlink()
    return made


@pytest.mark.grid
@pytest.mark.timeout(DEADLINE * 2)
def test_a_debian_that_grub_boots_gets_to_its_first_revert(debian: Path, home: Path, tmp_path: Path) -> None:
    image = bootable(debian / "root.raw", tmp_path)
    page = PAGE.read_text()
    spec = re.search(r"<!-- web.yaml -->\n```yaml\n(.*?)```", page, re.DOTALL)
    assert spec
    (tmp_path / "web.yaml").write_text(spec[1].replace("debian.qcow2", str(image)))
    console = home / "logs/web" / CONSOLE_LOG
    boots: list[int] = []
    for line in re.findall("^qmpsnap (.*)$", page, re.MULTILINE):
        words = shlex.split(line.replace("web.yaml", str(tmp_path / "web.yaml")))
        assert main(words) == 0
        if words[0] == "start" or "revert" in words:
            end = time.monotonic() + DEADLINE
            while len(found := re.findall(rb"(\d+) /boots", console.read_bytes())) == len(boots):
                assert time.monotonic() < end
                time.sleep(0.2)
            boots = [int(number) for number in found]
    assert boots == [1, 2, 2]
    assert main(["stop", "web", "--force"]) == 0
    assert main(["check", "web"]) == 0
