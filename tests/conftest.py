"""Where all tests put their files: in memory, if it has room, as most of a live test's time is the disk's."""

import os
import shutil
import tempfile

import psutil

MEMORY = "/dev/shm"
ROOM = 6 << 30
"""Bytes that must be free there and in all; three at once take up less than 2 GiB."""


def pytest_configure() -> None:
    if "TMPDIR" not in os.environ and _has_room():
        os.environ["TMPDIR"] = MEMORY  # for the processes that tests start, too
        tempfile.tempdir = None


def pytest_report_header() -> str:
    return f"files: in {tempfile.gettempdir()}; TMPDIR names another place"


def _has_room() -> bool:
    try:
        return shutil.disk_usage(MEMORY).free >= ROOM and psutil.virtual_memory().available >= ROOM
    except OSError:
        return False
