"""An empty overlay as bytes: what ``qemu-img create`` makes, but for the names of features that nobody needs. Pure.

A process costs more than the rest of a snapshot. The layout is that of QEMU's ``docs/interop/qcow2``: header, refcount
table, refcount block and L1 table, each from a cluster of its own on; one block counts more clusters than all of them.
"""

import struct
from typing import Final

from qmpsnap.block.image.qcow2 import EXT_BACKING_FORMAT, EXTENSION, MAGIC, MAX_L1
from qmpsnap.errors import ImageRefused

CLUSTER: Final = 64 << 10
_PER_ENTRY: Final = CLUSTER // 8 * CLUSTER  # bytes of the disk that an entry of the L1 table stands for
_TABLE, _BLOCK, _L1 = CLUSTER, 2 * CLUSTER, 3 * CLUSTER
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")
_BITS, _ORDER = 16, 4  # of a cluster's size; of a count's width in bits


def header(virtual_size: int, backing: str, backing_format: str) -> bytes:
    """What the first cluster begins with."""
    name, kind = backing.encode(), backing_format.encode()
    extensions = EXTENSION.pack(EXT_BACKING_FORMAT, len(kind)) + kind.ljust(-(-len(kind) // 8) * 8, b"\0")
    extensions += EXTENSION.pack(0, 0)
    start = _HEADER.size + len(extensions)
    entries = -(-virtual_size // _PER_ENTRY)
    fields = _HEADER.pack(
        MAGIC, 3, start, len(name), _BITS, virtual_size, 0, entries, _L1, _TABLE, 1, 0, 0,
        0, 0, 0, _ORDER, _HEADER.size, 0,
    )  # fmt: skip
    return fields + extensions + name


def tables(virtual_size: int) -> tuple[int, dict[int, bytes]]:
    """The length of the file, and what is in it after the header, by its place; the rest is zero.

    Raises:
        ImageRefused: QEMU opens no image that large.
    """
    length = -(-virtual_size // _PER_ENTRY) * 8
    if length > MAX_L1:
        raise ImageRefused(f"an overlay of {virtual_size} bytes is larger than QEMU can open")
    clusters = _L1 // CLUSTER + -(-length // CLUSTER)
    return _L1 + length, {_TABLE: struct.pack(">Q", _BLOCK), _BLOCK: struct.pack(">H", 1) * clusters}


def is_beginning(data: bytes, virtual_size: int) -> bool:
    """Whether this is what is there of a new overlay before it has its header, which comes last."""
    if data[:CLUSTER].strip(b"\0"):
        return False
    length, written = tables(virtual_size)
    planned = bytearray(length)
    for at, part in written.items():
        planned[at : at + len(part)] = part
    return len(data) <= length and all(new in (0, old) for new, old in zip(data, planned, strict=False))
