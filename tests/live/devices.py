"""Block devices for tests: loop devices, which take root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20


def require_loops() -> None:
    """Skip where this user cannot make loop devices; in CI tests run as root."""
    if os.geteuid() != 0 or not shutil.which("losetup") or not Path("/dev/loop-control").exists():
        if os.environ.get("CI"):
            pytest.fail("loop devices need root, losetup and /dev/loop-control, and in CI a live test does not skip")
        pytest.skip("loop devices need root, losetup and /dev/loop-control")


@contextmanager
def loop(file: Path, size: int = 16 * MIB) -> Iterator[Path]:
    """A loop device on a file, which is made if it is not there."""
    if not file.exists():
        file.touch()
        os.truncate(file, size)
    device = Path(run("losetup", "--find", "--show", str(file)))
    try:
        yield device
    finally:
        run("losetup", "--detach", str(device))


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
