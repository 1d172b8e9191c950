"""The names of the tags inside a qcow2 image, read without any tool."""

import os
import struct
from typing import Final

from qmpsnap.block.image import header
from qmpsnap.host.files import opened
from qmpsnap.model.layers.chain import Layer

_ENTRY: Final = struct.Struct(">QIHHIIQII")
"""L1 table and its size, lengths of id and name, seconds, nanoseconds, guest's clock, memory's size, extra length."""

_LIMIT: Final = 16 << 20
"""Bytes of a table that are looked at: QEMU takes no larger one."""


def names(layer: Layer) -> frozenset[str] | None:
    """The tags in an image; None when the table cannot be read."""
    if layer.format != "qcow2":
        return frozenset()
    found = header.read(layer.path, format=layer.format, block_device=True)
    if not found.internal_snapshots:
        return frozenset()
    try:
        with opened(layer.path) as descriptor:
            count, offset = struct.unpack(">IQ", os.pread(descriptor, 12, 60))
            table = os.pread(descriptor, _LIMIT, offset)
    except OSError as error:
        header.require_tellable(error)
        return None
    except (struct.error, OverflowError):
        return None
    return parse(table, count)


def parse(table: bytes, count: int) -> frozenset[str] | None:
    """The names in a snapshot table of so many entries; None when it ends before they do."""
    found: set[str] = set()
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(table):
            return None
        _, _, id_length, name_length, _, _, _, _, extra = _ENTRY.unpack_from(table, at)
        begin = at + _ENTRY.size + extra + id_length
        name = table[begin : begin + name_length]
        if len(name) < name_length:
            return None
        found.add(name.decode(errors="replace"))
        at = begin + name_length
        at += -at % 8
    return frozenset(found)
