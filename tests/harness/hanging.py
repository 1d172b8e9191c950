"""Storage that hangs on request, for tests: a FUSE file system of ours, started and ended here."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PYTHON = "/usr/bin/python3"
"""Debian's, which has python3-fusepy; ours has a .venv without it."""
WAIT = 20.0


class Storage:
    """Where it is mounted; see :meth:`hang`."""

    def __init__(self, folder: Path, at: Path | None) -> None:
        self.path = at or folder / "mnt"
        self._asked = folder / "hang"

    @contextmanager
    def hang(self, operations: str) -> Iterator[None]:
        """For the block, these operations (:mod:`tests.harness.hangfs`) are not answered, or fail."""
        fresh = self._asked.with_suffix(".new")
        fresh.write_text(operations)
        fresh.replace(self._asked)
        try:
            yield
        finally:
            self.answer()

    def answer(self) -> None:
        """Answer all that waits."""
        self._asked.unlink(missing_ok=True)


def lacking() -> str:
    """Why there can be none here; empty where there can."""
    if os.geteuid() != 0:
        return "only root mounts it for QEMU, too"
    if not Path("/dev/fuse").exists() or not shutil.which("fusermount3"):
        return "this host has no FUSE (/dev/fuse, fusermount3)"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:  # as in a container
        return f"/dev/fuse cannot be opened: {error.strerror}"
    if subprocess.run([PYTHON, "-c", "import fusepy"], check=False, capture_output=True).returncode:
        return "Debian's python3-fusepy is missing: scripts/setup test installs it"
    return ""


@contextmanager
def mounted(at: Path | None = None) -> Iterator[Storage]:
    """A folder on such a file system: the one named, which does not exist yet, or one of its own."""
    folder = Path(tempfile.mkdtemp(prefix="qs-hang-"))
    storage = Storage(folder, at)
    (folder / "back").mkdir(mode=0o700)
    storage.path.mkdir(parents=True)
    argv = [PYTHON, str(Path(__file__).with_name("hangfs.py")), str(folder / "back"), str(storage.path)]
    server = subprocess.Popen([*argv, str(folder / "hang")], stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + WAIT
        while not os.path.ismount(storage.path):
            assert server.poll() is None, "it has ended"
            assert time.monotonic() < end, "it was not mounted"
            time.sleep(0.02)
        yield storage
    finally:
        storage.answer()
        subprocess.run(["fusermount3", "-u", "-z", str(storage.path)], check=False, capture_output=True)
        server.kill()  # whatever still waits there is answered so
        server.wait()
        shutil.rmtree(folder)
