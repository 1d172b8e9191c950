"""What a disk holds after a power cut: the log of QEMU's ``blklogwrites``, read and replayed.

The format is that of Linux's dm-log-writes: a superblock in the first sector, then an entry's header in a sector of its
own, followed by its data. A flush is an entry without data; what was written before it is durable.
"""

import random
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD = 1, 2, 4
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


class Entry(Struct, frozen=True):
    """One request: where it wrote, what, and whether it was (also) a flush."""

    offset: int
    length: int
    flags: int
    data: bytes

    @property
    def flushes(self) -> bool:
        """Whether all before it is durable once it is done."""
        return bool(self.flags & FLUSH)


def read(log: Path) -> tuple[Entry, ...]:
    """Every entry of a log that is whole; one that QEMU died in the middle of ends it.

    Raises:
        ValueError: it is no such log.
    """
    raw = log.read_bytes()
    if not raw.strip(b"\0"):
        return ()  # never written to
    magic, version, _, sector = _SUPER.unpack_from(raw)
    if (magic, version) != (MAGIC, 1):
        # The superblock is written with the first flush: until then nothing is durable.
        if raw[:512].strip(b"\0"):
            raise ValueError(f"{log} is no log of writes")
        sector = 512
    entries: list[Entry] = []
    # The number in the superblock is that of the last flush; what came after it is there as well.
    at = sector
    while at + _ENTRY.size <= len(raw):
        first, count, flags, _ = _ENTRY.unpack_from(raw, at)
        if not (first or count or flags):
            break
        length = 0 if flags & DISCARD else count * sector
        data = raw[at + sector : at + sector + length]
        if len(data) < length:
            break
        entries.append(Entry(first * sector, count * sector, flags, data))
        at += sector + length
    return tuple(entries)


def flushes(entries: Sequence[Entry]) -> list[int]:
    """For each flush the number of entries up to and with it."""
    return [place for place, entry in enumerate(entries, start=1) if entry.flushes]


def durable(entries: Sequence[Entry]) -> int:
    """How many entries the last flush has made durable."""
    return max(flushes(entries), default=0)


def replay(image: bytes, entries: Iterable[Entry]) -> bytes:
    """The image with the writes done to it."""
    made = bytearray(image)
    for entry in entries:
        data = bytes(entry.length) if entry.flags & DISCARD else entry.data
        end = entry.offset + len(data)
        made.extend(bytes(max(0, end - len(made))))
        made[entry.offset : end] = data
    return bytes(made)


def cut(entries: Sequence[Entry], seed: int | None) -> list[Entry]:
    """What is on the disk when power goes after these: all that was flushed, and of the rest what chance wants.

    Without a seed nothing of the rest.
    """
    sure = durable(entries)
    rest = entries[sure:]
    if seed is None:
        return list(entries[:sure])
    chance = random.Random(seed)  # noqa: S311 - to be had again
    return [*entries[:sure], *(entry for entry in rest if chance.random() < 0.5)]


def cut_power(folder: Path, paths: dict[str, Path], *, seed: int | None = None) -> int:
    """Let every layer that was opened with a log hold what a power cut leaves; returns how many writes were lost.

    Args:
        folder: the logs, from :func:`tests.faults.filters.logging`.
        paths: where each layer lies.
        seed: chance for what was not flushed; None loses all of it.
    """
    lost = 0
    for layer, path in paths.items():
        logs = sorted(folder.glob(f"{layer}.*.log"), key=lambda log: int(log.suffixes[-2][1:]))
        written = [log for log in logs if read(log)]
        if not written or not path.exists():
            continue
        # What was closed in good order before the last opening is in that one's image.
        entries = read(written[-1])
        kept = cut(entries, seed)
        lost += len(entries) - len(kept)
        with path.open("r+b") as file:  # the same inode: it is the same disk
            file.truncate(0)
            file.write(replay(written[-1].with_suffix(".image").read_bytes(), kept))
    return lost
