"""Small pages of another process become huge ones, if that does not cost memory; by the kernel's own count."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpsnap.machine import hugepages

MIB = 1 << 20
CHILD = """
import mmap, sys
area = mmap.mmap(-1, 128 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, int(sys.argv[1]) << 20, 4096):
    area[at] = 1
area.madvise(mmap.MADV_HUGEPAGE)
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[Callable[[int], int]]:
    """Starts a process that has so many MiB of 128 in use, in small pages; returns its pid."""
    started: list[subprocess.Popen[str]] = []

    def start(mib: int) -> int:
        argv = [sys.executable, "-c", CHILD, str(mib)]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "there\n"
        return process.pid

    yield start
    for process in started:
        process.communicate("")


def huge(pid: int) -> int:
    """Bytes in huge pages."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    return sum(int(kib) for kib in re.findall(r"^AnonHugePages: +(\d+) kB", text, re.MULTILINE)) << 10


def test_what_is_in_use_becomes_huge(child: Callable[[int], int]) -> None:
    pid = child(128)
    assert huge(pid) < 8 * MIB
    if not hugepages.gather(pid):
        pytest.skip("this kernel or this user cannot")
    assert huge(pid) > 100 * MIB


def test_what_is_not_in_use_stays_as_it_is(child: Callable[[int], int]) -> None:
    pid = child(64)
    assert not hugepages.gather(pid)
    assert huge(pid) < 8 * MIB


def test_a_process_that_is_gone_is_no_error() -> None:
    assert not hugepages.gather(1 << 30)


def test_without_the_right_nothing_happens(child: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugepages, "_PROCESS_MADVISE", -1)  # ENOSYS; EPERM ends alike
    pid = child(128)
    assert not hugepages.gather(pid)
    assert huge(pid) < 8 * MIB
