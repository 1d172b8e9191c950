"""Whether leaked clusters may be given back: where a table was lost, they may be the only copy of what was written.

A QEMU that was killed leaves such clusters behind as well: it had counted them and not yet entered them in a table.
They are the newest of the image then, so that none lies below one that is in use, and no table looks lost.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Final

from qmpsnap.block.image import header
from qmpsnap.block.image.allocated import COMPRESSED, OFFSET, words
from qmpsnap.block.image.header import Header
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host.files import opened
from qmpsnap.model.layers.chain import Layer

_LEAKED: Final = re.compile(rb"^Leaked cluster (\d+) refcount=\d+ reference=(\d+)$", re.MULTILINE)
_FLAGS: Final = 1 << 63 | 1
"""Of an entry of a table: the cluster has one reader (``COPIED``), and it reads as zeros."""
_MOST: Final = 1 << 16
"""Leaked clusters that are looked at."""


def leaked(said: bytes) -> list[int]:
    """Numbers of the clusters that ``qemu-img check`` has found and that nothing refers to."""
    return [int(found[1]) for found in _LEAKED.finditer(said) if int(found[2]) == 0]


def doubt(layer: Layer, clusters: Sequence[int]) -> str:
    """Why leaked clusters of an image may hold what a lost table has named; empty where nothing says so."""
    try:
        with opened(layer.path) as descriptor:
            found = header.inspect(descriptor, path=layer.path, format="qcow2")
            return _of_tables(descriptor, found, clusters) or _of_clusters(descriptor, found, clusters)
    except OSError as error:
        raise HostCannot(f"{layer.path} cannot be read: {error.strerror}") from error
    except ImageRefused as error:
        return error.message


def _of_tables(descriptor: int, found: Header, clusters: Sequence[int]) -> str:
    size = found.cluster_size
    first = [entry & OFFSET for entry in words(os.pread(descriptor, found.l1_size * 8, found.l1_offset))]
    if not any(first):
        return "its L1 table names nothing"
    highest = max(first)
    for offset in filter(None, first):
        table = os.pread(descriptor, size, offset)
        if len(table) < size:
            return f"its L2 table at byte {offset} is cut"
        if not table.strip(b"\0"):
            return f"its L2 table at byte {offset} names nothing"
        highest = max(highest, *_places(table, found))
    lower = next((cluster for cluster in clusters if cluster * size < highest), None)
    return "" if lower is None else f"cluster {lower} is below clusters in use"


def _of_clusters(descriptor: int, found: Header, clusters: Sequence[int]) -> str:
    size = found.cluster_size
    if len(clusters) > _MOST:
        return f"there are more than {_MOST}"
    for cluster in clusters:
        if _looks_like_table(os.pread(descriptor, size, cluster * size), found):
            return f"cluster {cluster} looks like a table"
    return ""


def _places(table: bytes, found: Header) -> Iterator[int]:
    """Where the clusters lie that a table names; of a compressed one, where it begins."""
    bits = (1 << 62 - (found.cluster_size.bit_length() - 9)) - 1
    for entry in _entries(table, found):
        yield entry & bits if entry & COMPRESSED else entry & OFFSET


def _looks_like_table(data: bytes, found: Header) -> bool:
    """Whether these bytes may be a table of either kind: each entry names a whole cluster of the file, or none."""
    allowed = OFFSET & -found.cluster_size | _FLAGS
    end = -(-found.file_size // found.cluster_size) * found.cluster_size
    entries = [entry for entry in _entries(data, found) if entry]
    plain = [entry for entry in entries if not entry & COMPRESSED]
    return bool(plain) and all(not entry & ~allowed and entry & OFFSET < end for entry in plain)


def _entries(table: bytes, found: Header) -> Sequence[int]:
    every = words(table)
    return every[::2] if found.extended_l2 else every  # the other half says which parts of a cluster are there
