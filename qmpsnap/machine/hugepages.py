"""A guest's RAM in huge pages again, while it runs, so that the pause of the next full snapshot is short.

A background save frees the pages one by one and so splits the kernel's huge pages. QEMU would have to read and protect
every small one while the guest is paused: some 50 ms per GiB in use, a few with huge pages
(docs/explanation/qemu-facts.md).
"""

import ctypes
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

ENOUGH = 0.9
"""The share of a mapping that must be in memory: a huge page takes its whole size, whatever of it was in use."""
SMALLEST = 64 << 20
"""Bytes below which a mapping is not worth it."""
LONGEST = 2.0
"""Seconds after which the rest is left as it is: somebody waits for the snapshot."""

_AT_ONCE = 64 << 20
_PROCESS_MADVISE, _MADV_COLLAPSE = 440, 25
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *$")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Mapping(NamedTuple):
    start: int
    size: int
    resident: int
    wants_huge: bool


def gather(pid: int) -> bool:
    """Put what a process wants in huge pages, and has in memory nearly as a whole, into huge pages.

    Only root may, and Linux 6.1 and later can; otherwise nothing happens. Returns whether the kernel did it.
    """
    deadline = time.monotonic() + LONGEST
    try:
        found = [mapping for mapping in _mappings(pid) if mapping.wants_huge and mapping.size >= SMALLEST]
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        done = [
            time.monotonic() < deadline and _collapse(process, at, min(_AT_ONCE, mapping.start + mapping.size - at))
            for mapping in found
            if mapping.resident >= mapping.size * ENOUGH
            for at in range(mapping.start, mapping.start + mapping.size, _AT_ONCE)
        ]
    finally:
        os.close(process)
    return any(done)


def _collapse(process: int, start: int, size: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    vector = _Iovec(start, size)
    arguments = (ctypes.c_long(process), ctypes.byref(vector), ctypes.c_ulong(1), ctypes.c_long(_MADV_COLLAPSE))
    return bool(libc.syscall(ctypes.c_long(_PROCESS_MADVISE), *arguments, ctypes.c_ulong(0)) >= 0)


def _mappings(pid: int) -> list[_Mapping]:
    """The private anonymous mappings, as ``/proc/PID/smaps`` has them."""
    found: list[_Mapping] = []
    own = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if header := _HEADER.match(line):
            start, end = (int(address, 16) for address in header.groups())
            found.append(_Mapping(start, end - start, 0, wants_huge=False))
            own = True
        elif "-" in name.partition(" ")[0]:
            own = False
        elif own and name == "Rss":
            found[-1] = found[-1]._replace(resident=int(value.split()[0]) << 10)
        elif own and name == "VmFlags":
            found[-1] = found[-1]._replace(wants_huge="hg" in value.split())
    return found
