"""The guest with the logical volume manager: what is copied in, how it is run, and what comes back.

Emulated, without a network, its own disk unchanged: a second disk has an archive of what is copied in, a third one
takes what comes back, a fourth is for volume groups, a fifth one is an xfs. ``python -m tests.volumes.guest SCRIPT``
runs a shell script in it and shows what it prints.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.harness import wheel

ROOT = Path(__file__).parents[2]
DEADLINE = 1800
"""Seconds; a quiet host needs a tenth of it."""
ROOM = 1 << 30
"""Bytes of the disk for volume groups, in a file with holes."""
_BACK = 64 << 20
_APPEND = "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"
"""On a busy host the kernel's test of the timer fails, and it panics."""
_SHELL = """\
cat >/etc/lvm/lvm.conf <<'END'
devices { filter = [ "a|^/dev/vdd$|", "r|.*|" ] use_devicesfile = 0 hints = "none"
  md_component_detection = 0 multipath_component_detection = 0 }
backup { backup = 0 archive = 0 }
global { thin_check_executable = "" use_lvmpolld = 0 event_activation = 0 }
activation { monitoring = 0 }
END
export PYTHONPATH=/tmp/work/site PYTHONDONTWRITEBYTECODE=1
printf '%s\\n' '#!/usr/bin/python3' 'from qmpsnap.cli.start import run' 'run()' >/usr/local/bin/qmpsnap
chmod 755 /usr/local/bin/qmpsnap
"""


def image() -> Path:
    """The folder with kernel and file system; built where that has not been done."""
    built = subprocess.run([ROOT / "tests/volumes/build"], check=True, capture_output=True, text=True)
    return Path(built.stdout.strip())


def run(script: str, work: Path) -> Path:
    """Run a shell script in the guest, beside a copy of ``inside``; returns the folder with what it left in ``out``.

    In there: ``code``, its exit code. What it prints is in ``work/console``.
    """
    made = image()
    (work / "wheel").mkdir()
    (work / "run").write_text(_SHELL + script)
    with tarfile.open(work / "in.tar", "w") as archive:
        archive.add(wheel.installed(work / "wheel"), "site")
        archive.add(ROOT / "tests/volumes/inside", "inside")
        archive.add(work / "run", "run")
    for name, size in (("back.tar", _BACK), ("room", ROOM), ("xfs", ROOM)):
        with (work / name).open("wb") as file:
            file.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", work / "xfs"], check=True, stdin=subprocess.DEVNULL)
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-accel", "tcg,thread=multi", "-smp", "2", "-m", "1G", "-cpu", "max,la57=off"]
    words += ["-kernel", str(made / "vmlinuz"), "-initrd", str(made / "initrd")]
    words += ["-append", _APPEND, "-serial", f"file:{work / 'console'}"]
    for path, options in (
        (made / "root.raw", "snapshot=on"),
        (work / "in.tar", "readonly=on"),
        (work / "back.tar", "cache=unsafe"),
        (work / "room", "cache=unsafe"),
        (work / "xfs", "cache=unsafe"),
    ):
        words += ["-drive", f"if=virtio,format=raw,file={path},{options}"]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, timeout=DEADLINE)
    out = work / "out"
    out.mkdir()
    subprocess.run(["tar", "-xf", work / "back.tar", "-C", out, "--no-same-owner"], check=True)
    return out


def main() -> int:
    """Returns the script's exit code."""
    with tempfile.TemporaryDirectory(prefix="qv-") as folder:
        work = Path(folder)
        try:
            return int((run(Path(sys.argv[1]).read_text(), work) / "code").read_text())
        finally:
            sys.stdout.write((work / "console").read_text(errors="replace"))


if __name__ == "__main__":
    sys.exit(main())
