"""Whether something has written to a frozen image, as far as its file tells. Without asyncio, as ``list`` asks here."""

from __future__ import annotations

import errno
import os
import stat

from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.host.files import is_recorded, opened
from qmpsnap.model.layers.stamp import Stamp

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Final, Literal

    from qmpsnap.model.layers.chain import Image
    from qmpsnap.model.layers.stamp import History
    from qmpsnap.model.names import LayerId

    Trouble = Literal["missing", "replaced"]

_HEAD: Final = 64 << 10
"""Bytes that are read of the beginning, and of a raw image of the end as well."""
_TABLES: Final = 64
"""L2 tables that are read: 4 MiB, with which an image of the default cluster size names 32 GiB."""
_MARKS: Final = 79
"""The byte of a header that marks an image as dirty or corrupt."""


def stamp(layer: Image) -> Stamp | None:
    """A layer's file as it is, without a digest; None where another file or none has its name, or a block device."""
    try:
        with opened(layer.path, os.O_PATH) as descriptor:
            status, same = os.fstat(descriptor), is_recorded(layer, descriptor)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or not same:
        return None
    return Stamp(mtime_ns=status.st_mtime_ns, size=status.st_size, ctime_ns=status.st_ctime_ns)


def agrees(layer: Image, recorded: Stamp, now: Stamp) -> bool:
    """Whether nothing seems to have written to a layer since.

    Another change time alone (``chmod``, a hard link, but also a write whose time was put back) is no verdict: then
    header and tables are compared with what they were.
    """
    if (recorded.mtime_ns, recorded.size) != (now.mtime_ns, now.size):
        return False
    if recorded.ctime_ns in (0, now.ctime_ns) or not recorded.digest:
        return True
    return digest(layer) in ("", recorded.digest)


def is_untouched(layer: Image, history: History) -> bool:
    """Whether a layer's name leads to the recorded file, and nothing has written to that: told with one look.

    The file that a number of an inode is given to anew has a later change time, which nobody but the kernel sets. So
    nobody has to ask for its birth.
    """
    try:
        now = os.lstat(layer.path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    seen = (now.st_mtime_ns, now.st_size, now.st_ctime_ns)
    return (
        bool(history)
        and (now.st_dev, now.st_ino) == (layer.device, layer.inode)
        and all((then.mtime_ns, then.size, then.ctime_ns) == seen for then in history)
    )


def changed(layers: Iterable[Image], known: Mapping[LayerId, History]) -> dict[LayerId, frozenset[int]]:
    """The layers whose own files are there and are not what they once were: since when they were that."""
    found: dict[LayerId, frozenset[int]] = {}
    for layer in layers:
        history = known.get(layer.id, ())
        try:
            if not history or is_untouched(layer, history):
                continue
        except OSError:  # as where its file is not there
            continue
        now = stamp(layer)
        wrong = frozenset(then.since for then in history if now and not agrees(layer, then, now))
        if wrong:
            found[layer.id] = wrong
    return found


def trouble(layer: Image) -> Trouble | None:
    """Whether no file has a layer's name, or another than the recorded one; None also where nobody can tell.

    A cluster is not asked: that takes longer than a list may.
    """
    if layer.storage == "rbd":
        return None
    try:
        with opened(layer.path, os.O_PATH if layer.storage == "file" else os.O_RDONLY) as descriptor:
            return None if is_recorded(layer, descriptor) else "replaced"
    except (FileNotFoundError, NotADirectoryError):
        # A thin snapshot on a logical volume has no device until a verb needs it.
        return None if layer.identity.startswith("lvm:") and "/qs-" in layer.path else "missing"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link that leads to no device any more
            return "replaced"
        raise


def digest(layer: Image) -> str:
    """Of an image's header and upper tables, of a raw one of its ends; empty where they cannot be read."""
    try:
        with opened(layer.path) as descriptor:
            return _digest(descriptor, layer)
    except (OSError, ImageRefused, HostCannot):
        return ""


def _digest(descriptor: int, layer: Image) -> str:
    from hashlib import sha256  # all three are slow to load, and seldom needed

    from qmpsnap.block.image import header
    from qmpsnap.block.image.allocated import OFFSET, words

    found = header.inspect(descriptor, path=layer.path, format=layer.format)
    head = bytearray(os.pread(descriptor, max(_HEAD, found.cluster_size), 0))
    if layer.format == "qcow2" and found.version > 2:  # noqa: PLR2004 - version 2 has no such marks
        head[_MARKS] &= ~0b11  # any program that finds damage sets this mark, and `check` reports it
    sum_ = sha256(head)
    if layer.format == "raw":
        sum_.update(os.pread(descriptor, _HEAD, max(0, found.file_size - _HEAD)))
        return sum_.hexdigest()
    table = os.pread(descriptor, found.l1_size * 8, found.l1_offset)
    sum_.update(table)
    for entry in [entry for entry in words(table) if entry & OFFSET][:_TABLES]:
        sum_.update(os.pread(descriptor, found.cluster_size, entry & OFFSET))
    return sum_.hexdigest()
