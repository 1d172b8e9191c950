"""A small ISO 9660 image of a few files in one folder, whose names Rock Ridge and Joliet keep.

Linux and the BSDs read the names of Rock Ridge, Windows those of Joliet. The same files give the same bytes.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from msgspec import Struct

SECTOR: Final = 2048
_FIRST: Final = 16
"""The sector of the first descriptor; those before it are the system's."""
_TABLES: Final = _FIRST + 3
"""Two path tables, little-endian and big-endian, of each of the two trees."""
_ROOTS: Final = _TABLES + 4
_CONTENT: Final = _ROOTS + 2

_DATE: Final = bytes((100, 1, 1, 0, 0, 0, 0))
"""The first of January 2000, as the image is to depend on nothing but its files."""
_NO_DATE: Final = b"0" * 16 + b"\0"
_IS_FOLDER: Final = 2
"""The flag in a directory record."""
_UCS2_LEVEL_3: Final = b"%/E"
_FOLDER_MODE: Final = 0o040555
_FILE_MODE: Final = 0o100444
_LONGEST: Final = 29
"""Characters of a name that interchange level 2 leaves beside the dot and the version."""


class _File(Struct, frozen=True):
    name: str
    sector: int
    content: bytes


def image(files: Mapping[str, bytes], *, label: str) -> bytes:
    """The image, with that volume label; pure.

    ``ValueError``: the names are too long, or their records fill more than a sector.
    """
    placed = tuple(_placed(files))
    size = _CONTENT + sum(_sectors(file.content) for file in placed)
    trees = (_rock_ridge(placed), _joliet(placed))
    parts = [
        bytes(_FIRST * SECTOR),
        _descriptor(label, size, joliet=False),
        _descriptor(label, size, joliet=True),
        b"\xffCD001\1",
        *(_path_table(order, root) for root in (_ROOTS, _ROOTS + 1) for order in "<>"),
        *(b"".join(records) for records in trees),
        *(file.content for file in placed),
    ]
    if any(len(folder) > SECTOR for folder in parts[-len(placed) - 2 : len(parts) - len(placed)]):
        raise ValueError("the records of these files fill more than a sector")
    return b"".join(part.ljust(_sectors(part) * SECTOR, b"\0") for part in parts)


def _placed(files: Mapping[str, bytes]) -> Iterator[_File]:
    sector = _CONTENT
    for name in sorted(files, key=_plain):
        yield _File(name, sector, files[name])
        sector += _sectors(files[name])


def _sectors(content: bytes) -> int:
    return -(-len(content) // SECTOR)


def _plain(name: str) -> bytes:
    """The name where neither extension is read: capitals, digits and underscores."""
    if len(name) > _LONGEST:
        raise ValueError(f"the name {name!r} is longer than {_LONGEST} characters")
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in name.upper()).encode() + b".;1"


def _both(code: str, *numbers: int) -> bytes:
    """Each number in both byte orders; ``code`` is that of :mod:`struct`."""
    return b"".join(struct.pack(f"<{code}", number) + struct.pack(f">{code}", number) for number in numbers)


def _descriptor(label: str, size: int, *, joliet: bool) -> bytes:
    """The primary volume descriptor, or Joliet's supplementary one."""

    def text(length: int, said: str = "") -> bytes:
        if not joliet:
            return said.encode("ascii").ljust(length)
        return said.ljust(length // 2).encode("utf-16-be").ljust(length, b"\0")

    table, root = (_TABLES + 2, _ROOTS + 1) if joliet else (_TABLES, _ROOTS)
    return b"".join((
        bytes((2 if joliet else 1,)), b"CD001\1\0", text(32), text(32, label), bytes(8), _both("I", size),
        (_UCS2_LEVEL_3 if joliet else b"").ljust(32, b"\0"),
        _both("H", 1, 1, SECTOR), _both("I", len(_path_table("<", root))),
        struct.pack("<II", table, 0), struct.pack(">II", table + 1, 0),
        _record(b"\0", root, SECTOR, flags=_IS_FOLDER),
        *(text(length) for length in (128, 128, 128, 128, 37, 37, 37)),  # who made it, and names of files on that
        _NO_DATE * 4, b"\1",
    ))  # fmt: skip


def _path_table(order: str, root: int) -> bytes:
    """The table of folders: the root alone."""
    return struct.pack(f"{order}BBIH", 1, 0, root, 1) + b"\0\0"


def _record(name: bytes, sector: int, size: int, *, flags: int = 0, use: bytes = b"") -> bytes:
    """A directory record; ``use``: what its system use area holds."""
    named = bytes((len(name),)) + name
    body = b"".join((
        b"\0", _both("I", sector, size), _DATE, bytes((flags, 0, 0)), _both("H", 1),
        named + b"\0" * (len(name) % 2 == 0), use + b"\0" * (len(use) % 2),
    ))  # fmt: skip
    return bytes((len(body) + 1,)) + body


def _rock_ridge(files: Iterable[_File]) -> list[bytes]:
    """The records of the primary tree."""
    attributes = b"PX\x24\1" + _both("I", _FOLDER_MODE, 2, 0, 0)
    extension = b"RRIP_1991A"
    begin = b"SP\7\1\xbe\xef\0" + b"ER" + bytes((8 + len(extension), 1, len(extension), 0, 0, 1)) + extension
    records = [
        _record(b"\0", _ROOTS, SECTOR, flags=_IS_FOLDER, use=begin + attributes),
        _record(b"\1", _ROOTS, SECTOR, flags=_IS_FOLDER, use=attributes),
    ]
    for file in files:
        name = file.name.encode("ascii")
        use = b"PX\x24\1" + _both("I", _FILE_MODE, 1, 0, 0) + b"NM" + bytes((5 + len(name), 1, 0)) + name
        records.append(_record(_plain(file.name), file.sector, len(file.content), use=use))
    return records


def _joliet(files: Iterable[_File]) -> list[bytes]:
    """The records of the tree whose names are UCS-2."""
    root = _ROOTS + 1
    records = [_record(name, root, SECTOR, flags=_IS_FOLDER) for name in (b"\0", b"\1")]
    for file in sorted(files, key=lambda each: each.name):
        name = f"{file.name};1".encode("utf-16-be")
        records.append(_record(name, file.sector, len(file.content)))
    return records
