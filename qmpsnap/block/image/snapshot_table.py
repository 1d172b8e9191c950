"""The tags inside a qcow2 image, read without any tool."""

import os
import struct
from typing import Final

from msgspec import Struct

from qmpsnap.block.image import header
from qmpsnap.host.files import opened
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import Format

_ENTRY: Final = struct.Struct(">QIHHIIQII")
"""L1 table and its size, lengths of id and name, seconds, nanoseconds, guest's clock, memory's size, extra length."""

_SIZE: Final = struct.Struct(">8xQ")
"""What the extra data of a tag begin with: the size of its memory once more, and of the disk, in bytes."""

_LIMIT: Final = 16 << 20
"""Bytes of a table that are looked at: QEMU takes no larger one."""


class Entry(Struct, frozen=True):
    """One tag: QEMU's number and the user's name of it, when it was made (seconds since the epoch).

    ``size``: what the disk had then, in bytes; None where an old image does not say it.
    """

    id: str
    name: str
    created: float
    size: int | None = None


def names(layer: Layer) -> frozenset[str] | None:
    """The names of an image's tags; None when the table cannot be read."""
    found = entries(layer.path, layer.format)
    return None if found is None else frozenset(entry.name for entry in found)


def size(layer: Layer, tag: str) -> int | None:
    """The virtual size that an image had when it got this tag, in bytes; None where that cannot be told."""
    return next((entry.size for entry in entries(layer.path, layer.format) or () if entry.name == tag), None)


def entries(path: str, format_: Format) -> tuple[Entry, ...] | None:
    """The tags in an image, in the order of its table; None when that cannot be read."""
    if format_ != "qcow2":
        return ()
    found = header.read(path, format=format_, block_device=True)
    if not found.internal_snapshots:
        return ()
    try:
        with opened(path) as descriptor:
            count, offset = struct.unpack(">IQ", os.pread(descriptor, 12, 60))
            table = os.pread(descriptor, _LIMIT, offset)
    except OSError as error:
        header.require_tellable(error)
        return None
    except (struct.error, OverflowError):
        return None
    return parse(table, count)


def parse(table: bytes, count: int) -> tuple[Entry, ...] | None:
    """The tags in a snapshot table of so many entries; None when it ends before they do."""
    found: list[Entry] = []
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(table):
            return None
        _, _, id_length, name_length, seconds, nanoseconds, _, _, extra = _ENTRY.unpack_from(table, at)
        begin = at + _ENTRY.size + extra + id_length
        number, name = table[begin - id_length : begin], table[begin : begin + name_length]
        if len(name) < name_length:
            return None
        created = seconds + nanoseconds / 1e9
        disk = _SIZE.unpack_from(table, at + _ENTRY.size)[0] if extra >= _SIZE.size else None
        found.append(Entry(number.decode(errors="replace"), name.decode(errors="replace"), created, disk))
        at = begin + name_length
        at += -at % 8
    return tuple(found)
