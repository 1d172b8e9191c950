"""How much of its own a layer holds, counted in its tables; what its file occupies may be less or more than that.

Less by compressed clusters, by what a file system compresses, shares or leaves out; more by tables, tags and leaks.
"""

import os
import stat
import sys
from array import array
from typing import Final

from qmpsnap.block.image import header
from qmpsnap.block.image.header import Header
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host.files import extents, opened
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.planning.state import CLUSTER, TABLE_COVERS, Held

OFFSET: Final = 0x00FF_FFFF_FFFF_FE00
COMPRESSED: Final = 1 << 62
_ZERO: Final = 1
_HALF: Final = (1 << 32) - 1
_HAS_BIT_0: Final = bytes(value & 1 for value in range(256))
_HAS_BIT_6: Final = bytes(value >> 6 & 1 for value in range(256))


def held(layer: Layer) -> Held:
    """What a layer holds, without what lies below it, at most; all of it where that cannot be read.

    Of an image that a QEMU writes to, its file does not show yet what has grown in that QEMU's memory.
    """
    whole = Held(data=_up(layer.virtual_size), tables=-(-layer.virtual_size // TABLE_COVERS))
    try:
        with opened(layer.path) as descriptor:
            found = header.inspect(descriptor, path=layer.path, format=layer.format)
            counted = _raw(descriptor, found) if layer.format == "raw" else _qcow2(descriptor, found)
    except (OSError, ImageRefused, HostCannot):
        return whole
    return Held(data=min(counted.data, whole.data), zeros=min(counted.zeros, whole.data), tables=counted.tables)


def _up(size: int) -> int:
    return -(-size // CLUSTER) * CLUSTER


def _raw(descriptor: int, found: Header) -> Held:
    """The data outside holes, in whole clusters of the image that receives it."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return Held(data=_up(found.virtual_size), tables=-(-found.virtual_size // TABLE_COVERS))
    data = end = 0
    for start, stop in extents(descriptor, found.file_size):
        first = max(end, start // CLUSTER * CLUSTER)
        end = max(end, _up(stop))
        data += max(0, end - first)
    size = _up(found.virtual_size)
    return Held(data=data, zeros=max(0, size - data), tables=-(-size // TABLE_COVERS))


def _qcow2(descriptor: int, found: Header) -> Held:
    """Clusters that are allocated, compressed or marked as zeros, by the active L1 table and the L2 tables it names."""
    width = 2 if found.extended_l2 else 1  # in words of 64 bits
    covers = found.cluster_size // (8 * width) * found.cluster_size
    data = zeros = 0
    tables = set[int]()
    for place, entry in enumerate(words(os.pread(descriptor, found.l1_size * 8, found.l1_offset))):
        if not (offset := entry & OFFSET):
            continue
        raw = os.pread(descriptor, found.cluster_size, offset)
        if len(raw) < found.cluster_size:  # a table that is cut says nothing of the rest
            data += covers
        elif found.extended_l2 or found.cluster_size < CLUSTER:
            more = _units(raw, found, width)
            data, zeros = data + more.data, zeros + more.zeros
        else:
            more = _plain(raw, found.cluster_size)
            data, zeros = data + more.data, zeros + more.zeros
        first = place * covers
        tables.update(range(first // TABLE_COVERS, (first + covers - 1) // TABLE_COVERS + 1))
    limit = -(-found.virtual_size // TABLE_COVERS)
    return Held(data=data, zeros=zeros, tables=min(len(tables), limit))


def _plain(raw: bytes, cluster: int) -> Held:
    """One table of plain entries, mostly without a look at each."""
    if raw[::8].translate(_HAS_BIT_6).count(1):  # of compressed clusters the lowest bit is no flag
        kinds = [_kind(entry) for entry in words(raw)]
        return Held(data=kinds.count("data") * cluster, zeros=kinds.count("zeros") * cluster)
    zeros = raw[7::8].translate(_HAS_BIT_0).count(1)
    return Held(data=(sum(map(bool, words(raw))) - zeros) * cluster, zeros=zeros * cluster)


def _units(raw: bytes, found: Header, width: int) -> Held:
    """One table of clusters that are small or have subclusters: those it touches in the image that receives it."""
    entries = words(raw)
    kinds = (
        [_kind_extended(entries[at], entries[at + 1]) for at in range(0, len(entries), 2)]
        if width > 1
        else [_kind(entry) for entry in entries]
    )
    unit = max(1, CLUSTER // found.cluster_size)
    size = max(CLUSTER, found.cluster_size)
    groups = [set(kinds[at : at + unit]) for at in range(0, len(kinds), unit)]
    data = sum("data" in group for group in groups)
    zeros = sum("zeros" in group and "data" not in group for group in groups)
    return Held(data=data * size, zeros=zeros * size)


def _kind(entry: int) -> str:
    if entry & COMPRESSED:
        return "data"
    if entry & _ZERO:
        return "zeros"
    return "data" if entry & OFFSET else ""


def _kind_extended(entry: int, bitmap: int) -> str:
    if entry & COMPRESSED or bitmap & _HALF:
        return "data"
    return "zeros" if bitmap else ""


def words(raw: bytes) -> "array[int]":
    """The entries of a table."""
    words = array("Q", raw[: len(raw) // 8 * 8])
    if sys.byteorder == "little":
        words.byteswap()
    return words
