"""What the suite's machine has when a test gets it, and the order of the tests, which is another one each time."""

import os
import random

import pytest

from qmpsnap.sync import MachineHandle

SET_UP = """
set -e
mkfs.ext4 -q -F /dev/vda
mount /dev/vda /mnt
mkdir /mnt/crontabs
echo original >/mnt/config
syslogd -O /run/log
crond -c /mnt/crontabs
"""


def pytest_qmpsnap_set_up(machine: MachineHandle) -> None:
    machine.run(SET_UP)


def pytest_configure() -> None:
    os.environ.setdefault("SEED", str(random.randrange(1_000_000)))  # also for the workers of xdist


def pytest_report_header() -> str:
    return f"order: SEED={os.environ['SEED']} repeats it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    random.Random(os.environ["SEED"]).shuffle(items)
