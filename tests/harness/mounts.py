"""File systems that can clone files, on loop mounts: only root can mount one, and CI must."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

Kind = Literal["xfs", "btrfs"]
KINDS: tuple[Kind, ...] = ("xfs", "btrfs")
_MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
_PACKAGES = {"xfs": "xfsprogs", "btrfs": "btrfs-progs"}


def require(kind: Kind) -> None:
    """Skip the test where such a file system cannot be made, with the reason; in CI it fails."""
    program = _MAKE[kind][0]
    reason = ""
    if os.geteuid():
        reason = f"only root can mount {kind} on a loop device"
    elif not shutil.which(program):
        reason = f"{program} is missing: apt-get install {_PACKAGES[kind]}"
    elif kind not in Path("/proc/filesystems").read_text() and subprocess.call(["modprobe", "-q", kind]):
        reason = f"the kernel of this host has no {kind}"
    if reason and os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI a live test does not skip")
    if reason:
        pytest.skip(reason)


@contextlib.contextmanager
def mounted(kind: Kind, folder: Path, *, mib: int = 1024) -> Iterator[Path]:
    """A new file system of that kind at ``folder``/KIND."""
    image, place = folder / f"{kind}.img", folder / kind
    with image.open("wb") as file:
        file.truncate(mib << 20)
    subprocess.run([*_MAKE[kind], str(image)], check=True, stdout=subprocess.DEVNULL)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        image.unlink()
