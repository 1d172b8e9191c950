"""Where all tests put their files (in memory, if it has room, as most of a live test's time is the disk's), and their
order."""

import os
import shutil
import tempfile
from importlib import import_module

import hypothesis
import psutil
import pytest

from qmpsnap.block.usage import survey
from qmpsnap.qmp import status_poll
from tests import selection

MEMORY = "/dev/shm"
ROOM = 6 << 30
"""Bytes that must be free there and in all; three at once take up less than 2 GiB."""


RANDOM = "QMPSNAP_RANDOM"
"""Set, hypothesis tries new examples; else the same ones each time, so that no change fails by what it did not do."""

SHARED = "QMPSNAP_TESTS_SHARED"
"""Names a folder that all workers of one session share, for what is made once."""


for _profile in ("new", "same"):  # how quick the host is decides nothing
    hypothesis.settings.register_profile(
        _profile,
        derandomize=_profile == "same",
        print_blob=True,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("new" if RANDOM in os.environ else "same")


def pytest_configure(config: pytest.Config) -> None:
    # However busy the host is, it must not decide whether images or QEMU answer at once.
    survey.DEADLINE, status_poll.DEADLINE = 20.0, 5.0
    if "TMPDIR" not in os.environ and _has_room():
        os.environ["TMPDIR"] = MEMORY  # for the processes that tests start, too
        tempfile.tempdir = None
    if not hasattr(config, "workerinput"):
        os.environ[SHARED] = tempfile.mkdtemp(prefix="qs-shared-")
        config.pluginmanager.register(import_module("tests.faults.reporting"))


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(SHARED))


def pytest_report_header() -> str:
    return f"files: in {tempfile.gettempdir()}; TMPDIR names another place"


@pytest.hookimpl(trylast=True)  # after the faults' form has left out its part
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selection.choose(config, items)


def _has_room() -> bool:
    try:
        return shutil.disk_usage(MEMORY).free >= ROOM and psutil.virtual_memory().available >= ROOM
    except OSError:
        return False
