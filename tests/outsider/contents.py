"""What disks hold: read by qemu-img, and held against what was written."""

import itertools
import os
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.outsider import writer

CHUNK = 64 << 10
CHUNKS = 16
SIZE = CHUNK * CHUNKS
"""Bytes of every disk."""

MIXED = 256
"""Chunks that hold more than one byte are told by this and their CRC."""


@dataclass(frozen=True)
class Disk:
    """One disk as it was read: each chunk's byte, and what the writing guest has counted on it."""

    chunks: tuple[int, ...]
    head: int
    ring: tuple[int, ...]


Found = Mapping[str, Disk]
"""A machine's disks of one moment."""


class Unreadable(Exception):
    """qemu-img cannot read it."""


def qemu_img(*words: str) -> str:
    """What that tool prints."""
    tool = os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img")
    done = subprocess.run([tool, *words], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise Unreadable(f"qemu-img {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def read(path: str, image_format: str, tag: str | None = None) -> Disk:
    """All of a disk, its backing included."""
    with tempfile.NamedTemporaryFile(dir=_memory()) as raw:
        inside = ["-l", f"snapshot.name={tag}"] if tag else []
        qemu_img("convert", "-U", "-f", image_format, "-O", "raw", *inside, path, raw.name)
        return parsed(Path(raw.name).read_bytes())


def parsed(raw: bytes) -> Disk:
    """What these bytes are as a disk."""
    chunks = tuple(_byte(raw[start : start + CHUNK]) for start in range(0, len(raw), CHUNK))
    counted = [_number(raw, writer.RING + slot) for slot in range(writer.SLOTS)]
    return Disk(chunks, _number(raw, writer.HEAD), tuple(counted))


def _byte(chunk: bytes) -> int:
    return chunk[0] if chunk.count(chunk[:1]) == len(chunk) else MIXED + zlib.crc32(chunk)


def _number(raw: bytes, sector: int) -> int:
    """What the writing guest has filled a sector with; -1 if it is no such sector."""
    found = raw[sector * 512 : sector * 512 + 512]
    return int(struct.unpack("<I", found[:4])[0]) if found == found[:4] * 128 else -1


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Moment(Protocol):
    """What the disks of a machine may hold."""

    def problem(self, found: Found) -> str:
        """Why that is not what was read; empty if it is."""


@dataclass(frozen=True)
class Written:
    """Each chunk of each disk holds one of these."""

    disks: Mapping[str, tuple[frozenset[int], ...]]

    def problem(self, found: Found) -> str:
        """As for every moment."""
        for name, disk in found.items():
            wanted = self.disks.get(name)
            if wanted is None:
                return f"nothing is known of disk {name}"
            if len(disk.chunks) != len(wanted):
                return f"{name} has {len(disk.chunks)} chunks"
            for at, (byte, may) in enumerate(zip(disk.chunks, wanted, strict=True)):
                if byte not in may:
                    return f"{name} chunk {at} holds {byte}, not {sorted(may)}"
        return ""

    def written(self, disk: str, at: int, byte: int, *, sure: bool) -> "Written":
        """After a write to one chunk, of which it may not be sure that it arrived."""
        chunks = list(self.disks[disk])
        chunks[at] = frozenset({byte}) if sure else chunks[at] | {byte}
        return Written({**self.disks, disk: tuple(chunks)})

    def mixed(self, other: "Written", disks: Sequence[str]) -> "Written":
        """These disks of the other, the rest of this one."""
        return Written({**self.disks, **{name: other.disks[name] for name in disks if name in other.disks}})


@dataclass(frozen=True)
class Counted:
    """The guest has counted at least so far, and its writes are whole up to one moment, on both disks at once."""

    low: int
    high: int = 1 << 31

    def problem(self, found: Found) -> str:
        """As for every moment."""
        if set(found) != {"vda", "vdb"}:
            return f"there is {sorted(found)} instead of both disks"
        first, second = found["vda"], found["vdb"]
        head = first.head
        for mine, theirs in ((head, head), (head + 1, head), (head + 1, head + 1)):
            if first.ring == counted(mine) and second.ring == counted(theirs):
                break
        else:
            return f"head {head}: vda is at {max(first.ring)}, vdb at {max(second.ring)}, or something is missing"
        if not self.low <= head <= self.high:
            return f"the guest had counted from {self.low} to {self.high}, and this is {head}"
        return ""


@dataclass(frozen=True)
class OneOf:
    """One of several moments."""

    moments: tuple[Moment, ...]

    def problem(self, found: Found) -> str:
        """As for every moment."""
        problems = [moment.problem(found) for moment in self.moments]
        return "" if "" in problems else " | ".join(dict.fromkeys(problems))


@dataclass(frozen=True)
class Anything:
    """Somebody else has overwritten it: nothing is promised."""

    def problem(self, found: Found) -> str:  # noqa: ARG002 - whatever it is
        """As for every moment."""
        return ""


def counted(last: int) -> tuple[int, ...]:
    """The slots once that number was written."""
    slots = [0] * writer.SLOTS
    for number in range(max(1, last - writer.SLOTS + 1), last + 1):
        slots[number % writer.SLOTS] = number
    return tuple(slots)


def exactly(found: Found) -> Written:
    """What was read, and nothing else."""
    return Written({name: tuple(frozenset({byte}) for byte in disk.chunks) for name, disk in found.items()})


def empty(*disks: str) -> Written:
    """New disks."""
    return Written({name: tuple(itertools.repeat(frozenset({0}), CHUNKS)) for name in disks})
