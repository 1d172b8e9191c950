"""A home of its own with machines in it, and all that is ended with it."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from tests.outsider import contents, looks, writer
from tests.outsider.contents import Written
from tests.outsider.known import DISKS, Known
from tests.outsider.looks import Lied, Monitor
from tests.outsider.typed import typed

STILL = """\
name: {name}
memory: 16M
accel: tcg
disks:
  - {{name: vda, {vda}}}
  - {{name: vdb, {vdb}}}
"""


class World:
    """One home."""

    def __init__(self, *, small: bool) -> None:
        """``small``: on a file system that can be filled, as root."""
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="qo-", dir=memory)).resolve()
        self.small = small and os.geteuid() == 0 and self._mounted()
        self.home, self.images = self.root / "home", self.root / "images"
        self.images.mkdir()
        self.machines: dict[str, Known] = {}
        self.born = 0
        os.environ["QMPSNAP_HOME"] = str(self.home)
        os.environ["QMPSNAP_IMAGES"] = str(self.images)
        writer.install(self.images / "writer.raw", contents.SIZE)

    def _mounted(self) -> bool:
        options = ["-t", "tmpfs", "-o", "size=512m,mode=700", "qmpsnap-outsider", str(self.root)]
        return subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0

    def next_name(self, letter: str) -> str:
        """A name that no machine had."""
        self.born += 1
        return f"{letter}{self.born}"

    def spec(self, name: str, vda: str, vdb: str) -> Path:
        """A file that describes a machine."""
        path = self.images / f"{name}.yaml"
        path.write_text(STILL.format(name=name, vda=vda, vdb=vdb))
        return path

    def define(self, guest: str, second: str = "qcow2") -> Known:
        """A machine of that guest, stopped."""
        name = self.next_name("w" if guest == "writer" else "m")
        first = "base: writer.raw, format: raw" if guest == "writer" else f"size: {contents.SIZE}"
        spec = self.spec(name, first, f"size: {contents.SIZE}, format: {second}")
        answer = typed("define", str(spec), "-o", "json")
        if answer.code:
            raise Lied(f"define: exit {answer.code}: {answer.err}")
        start: Written = contents.empty(*DISKS)
        if guest == "writer":
            disk = contents.read(str(self.images / "writer.raw"), "raw")
            start = start.mixed(contents.exactly({"vda": disk}), ("vda",))
        known = self.machines[name] = Known(name, guest, start)
        return known

    def write(self, known: Known, disk: str, at: int, byte: int) -> None:
        """A write of a guest that stands, flushed: by its monitor, or by qemu-io where nothing runs."""
        if not isinstance(known.active, Written) or known.seen is None:
            return
        line = f"write -P {byte} {at * contents.CHUNK} {contents.CHUNK}"
        active = known.seen.chains[disk][-1]
        arrived = False
        with contextlib.suppress(OSError):
            if known.seen.running and known.seen.monitor:
                with Monitor(known.seen.monitor) as monitor:
                    monitor.io(disk, line)
                    monitor.io(disk, "flush")
                arrived = True
            elif not known.seen.running:
                tool = os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img").replace("qemu-img", "qemu-io")
                argv = [tool, "-f", active["format"], "-c", line, "-c", "flush", active["path"]]
                arrived = subprocess.run(argv, check=False, capture_output=True).returncode == 0
        known.active = known.active.written(disk, at, byte, sure=arrived)

    def kill(self, *pids: int) -> None:
        """End them as a power cut would, and see them gone."""
        found = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                process.kill()
                found.append(process)
        psutil.wait_procs(found, timeout=10)

    def reboot(self) -> None:
        """All that runs dies at once, and the run folders are gone."""
        self.kill(*(process.pid for process in looks.processes(self.root)))
        shutil.rmtree(self.home / "run", ignore_errors=True)

    def settled(self, expected: set[int]) -> str:
        """Why something else than these processes is left: empty once it is not, which guards may take a moment for."""
        deadline = time.monotonic() + 60
        while True:
            left = [process for process in looks.processes(self.root) if process.pid not in expected]
            if not left:
                return ""
            if time.monotonic() > deadline:
                return f"left are {[' '.join(_words(process))[:200] for process in left]}"
            time.sleep(0.05)

    def close(self, *, keep: bool) -> None:
        """End what runs there, and remove it unless it is to be looked at."""
        self.kill(*(process.pid for process in looks.processes(self.root)))
        if keep:
            shutil.copytree(self.root, f"{tempfile.gettempdir()}/kept-{self.root.name}", symlinks=True, ignore=_sockets)
        if self.small:
            subprocess.run(["umount", "-l", str(self.root)], check=False)
        shutil.rmtree(self.root, ignore_errors=True)


def _sockets(folder: str, names: list[str]) -> list[str]:
    """What cannot be copied."""
    return [name for name in names if (Path(folder) / name).is_socket()]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return ["?"]
