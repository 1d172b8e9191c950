"""Reads an ISO 9660 image by the standards, and by nothing of qmpsnap."""

import struct
from collections.abc import Iterator

SECTOR = 2048


def label(image: bytes) -> str:
    """The volume label in the primary descriptor."""
    return image[16 * SECTOR + 40 :][:32].decode().rstrip()


def files(image: bytes, *, joliet: bool = False) -> dict[str, bytes]:
    """What the root folder holds, by the names of Rock Ridge or Joliet."""
    at = 16 * SECTOR
    while image[at] != (2 if joliet else 1):
        assert image[at + 1 : at + 7] == b"CD001\1"
        assert image[at] != 255
        at += SECTOR
    sector, size = _extent(image[at + 156 :])
    found = {}
    for record in _records(image[sector * SECTOR :][:size]):
        start, length = _extent(record)
        name = record[33 : 33 + record[32]]
        if name not in (b"\0", b"\1"):
            said = name.decode("utf-16-be").removesuffix(";1") if joliet else _rock_ridge(record)
            found[said] = image[start * SECTOR :][:length]
    return found


def _extent(record: bytes) -> tuple[int, int]:
    little, big = struct.unpack("<I4xI", record[2:14]), struct.unpack(">I4xI", record[6:18])
    assert little == big
    return little


def _records(folder: bytes) -> Iterator[bytes]:
    at = 0
    while folder[at]:
        yield folder[at : at + folder[at]]
        at += folder[at]


def _rock_ridge(record: bytes) -> str:
    use = record[33 + record[32] + (record[32] + 1) % 2 :]
    while len(use) > 3:
        if use[:2] == b"NM":
            return use[5 : use[2]].decode()
        use = use[use[2] :]
    raise AssertionError(f"no name in {record!r}")
