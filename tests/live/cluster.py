"""A Ceph cluster for tests, and the images in it."""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.devices import run

MIB = 1 << 20
_NUMBERS = itertools.count(1)
SCRIPT = Path(__file__).parents[2] / "scripts" / "ceph-one-node"


@contextmanager
def cluster() -> Iterator[Path]:
    """A cluster of its own for the block; the path of its clients' configuration."""
    if not shutil.which("rbd") and os.geteuid() != 0:
        pytest.skip("Ceph's programs are missing, and only root can install them")
    folder = Path(tempfile.mkdtemp(prefix="qs-ceph-")) / "ceph"
    try:
        yield Path(run(str(SCRIPT), "up", str(folder)))
    finally:
        run(str(SCRIPT), "down", str(folder))
        folder.parent.rmdir()


def new_image(conf: Path) -> RbdImage:
    """One of 16 MiB that no other test has: a QEMU that was killed keeps its own from removal for half a minute."""
    found = RbdImage(pool="rbd", image=f"web{next(_NUMBERS)}", conf=str(conf))
    rbd(found, "create", "--size=16M")
    return found


def on_image(image: RbdImage, name: str = "web") -> MachineSpec:
    """A machine with one disk, the image."""
    return MachineSpec(name=name, memory=64 * MIB, disks=(DiskSpec(name="vda", rbd=image),))


def require_module(image: RbdImage) -> None:
    """Skip where this QEMU cannot open RBD images; Debian's own one has a package for it."""
    qemu_img = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
    argv = [
        qemu_img,
        "info",
        "--image-opts",
        "--output=json",
        f"driver=rbd,pool={image.pool},image={image.image},conf={image.conf}",
    ]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode and "QMPSNAP_QEMU_IMG" not in os.environ and os.geteuid() == 0:
        run("apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends", "qemu-block-extra")
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this QEMU has no module for RBD: {done.stderr.strip()}")


def rbd(image: RbdImage, *words: str, stdin: bytes = b"") -> Any:
    """What ``rbd`` says of an image, as JSON where that is asked for."""
    done = subprocess.run(["rbd", *image.arguments, *words], check=True, capture_output=True, input=stdin)
    return json.loads(done.stdout) if "--format=json" in words else done.stdout
