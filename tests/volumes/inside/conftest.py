"""In the guest: a volume group, and volumes of it that are gone after each case."""

import inspect
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.machine import qemu
from qmpsnap.machine.starting import probe
from qmpsnap.qmp import session

GROUP = "vg0"
POOL = "pool"


def tool(*words: str) -> str:
    """What one of LVM's programs prints."""
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout.strip()


@pytest.fixture(scope="session", autouse=True)
def patience() -> None:
    """A QEMU that is emulated takes a minute to start on a busy host: here alone, so not when this file is loaded."""
    qemu.LAUNCH_DEADLINE = 300.0
    vars(probe)["LAUNCH_DEADLINE"] = 300.0
    for function in (session.connect, qemu.monitor):
        inspect.unwrap(function).__kwdefaults__["deadline"] = 60.0


@pytest.fixture(scope="session", autouse=True)
def group() -> None:
    tool("vgcreate", GROUP, "/dev/vdd")


@pytest.fixture(autouse=True)
def volumes() -> Iterator[None]:
    """The pool is made once: that takes longer than all that most cases do."""
    if not Path(f"/dev/mapper/{GROUP}-{POOL}").exists():
        tool("lvcreate", "-y", "--type", "thin-pool", "-n", POOL, "-L", "256M", GROUP)
    yield
    tool("lvremove", "-y", "--select", f"lv_name!={POOL} && lv_role!={{thickorigin}}", GROUP)
    tool("lvremove", "-y", "--select", f"lv_name!={POOL}", GROUP)
