"""The qcow2 header as bytes: what it says, and everything about it that is not acceptable. Pure.

The layout is that of QEMU's ``docs/interop/qcow2``, the limits are those of QEMU's own ``block/qcow2.c``; where QEMU
is lenient about something that no tool writes (overlaps, extensions without end, control bytes in a file name), this
reader refuses. :mod:`qmpsnap.block.image.header` reads the bytes.
"""

import struct
import unicodedata
from collections.abc import Iterator
from typing import Final, NamedTuple, TypedDict

from msgspec import Struct

from qmpsnap.errors import ImageRefused
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.text import printable

MAGIC: Final = b"QFI\xfb"
MAX_CLUSTER: Final = 2 << 20
MAX_BACKING: Final = 1023

_BASE: Final = struct.Struct(">4sIQIIQIIQQIIQ")  # bytes 0 to 71: all of version 2
_MORE: Final = struct.Struct(">QQQII")  # bytes 72 to 103: what version 3 adds
EXTENSION: Final = struct.Struct(">II")
_FEATURE: Final = struct.Struct(">BB46s")

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN: Final = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2

EXT_BACKING_FORMAT: Final = 0xE2792ACA
_EXT_FEATURE_NAMES: Final = 0x6803F857
_EXT_CRYPTO: Final = 0x0537BE77
_EXT_DATA_FILE: Final = 0x44415441

_SECTOR: Final = 512
_MAX_VIRTUAL_SIZE: Final = 1 << 63
MAX_L1: Final = 32 << 20  # bytes, QCOWMAX_L1_SIZE
_MAX_REFCOUNT_TABLE: Final = 8 << 20  # bytes, QCOW_MAX_REFTABLE_SIZE
_MAX_SNAPSHOTS: Final = 65536  # QCOW_MAX_SNAPSHOTS
_SNAPSHOT_ENTRY: Final = 40  # bytes, the least an entry of the snapshot table takes
_MAX_EXTENSIONS: Final = 256  # QEMU writes four; without a limit a header may hold a quarter of a million empty ones
_MAX_FORMAT_NAME: Final = 15
_MIN_CLUSTER_BITS, _MAX_CLUSTER_BITS = 9, 21
_MIN_CLUSTER_BITS_EXTENDED_L2: Final = 14
_MIN_HEADER_3: Final = 104
_MAX_REFCOUNT_ORDER: Final = 6
_AES, _LUKS = 1, 2


class FileFields(TypedDict):
    """What tells an image's file from others, as a layer has it."""

    device: int
    inode: int
    birth: int
    identity: str


class Header(Struct, frozen=True, kw_only=True):
    """What an image's first cluster and its ``stat`` say. Sizes are bytes.

    Attributes:
        version: 2 or 3; 0 for raw, as is ``cluster_size``.
        virtual_size: what the guest sees, in whole sectors as QEMU reports it.
        backing: the backing string exactly as it stands in the header; None at a base.
        backing_format: the format recorded for ``backing``; None means QEMU would guess.
        internal_snapshots: number of tags inside the image.
        dirty: reference counts were not written back; the next writer repairs them.
        corrupt: QEMU found damage and refuses to write.
        l1_offset: where the active L1 table lies; with ``l1_size`` (entries) it tells whether the image is empty.
        allocated: bytes the file occupies on its file system.
        device: with ``inode`` and ``birth`` the file's identity, taken from the descriptor that was read.
        identity: of what is no file.
    """

    format: Format
    virtual_size: int
    file_size: int
    version: int = 0
    cluster_size: int = 0
    backing: str | None = None
    backing_format: str | None = None
    encrypted: bool = False
    internal_snapshots: int = 0
    dirty: bool = False
    corrupt: bool = False
    extended_l2: bool = False
    l1_offset: int = 0
    l1_size: int = 0
    allocated: int = 0
    device: int = 0
    inode: int = 0
    birth: int = 0
    identity: str = ""

    @property
    def file_id(self) -> FileFields:
        """What is recorded of them: a device's node has another number with every boot."""
        if self.identity:
            return {"device": 0, "inode": 0, "birth": 0, "identity": self.identity}
        return {"device": self.device, "inode": self.inode, "birth": self.birth, "identity": ""}


class _Fields(NamedTuple):
    """Bytes 0 to 71, in the order of the format's description."""

    magic: bytes
    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int


class _Fault(Exception):
    """One thing wrong with a header; becomes an ImageRefused once the path is known."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def backing_fault(name: str) -> str | None:
    """Why ``name`` may not be a backing string; None for a plain path that QEMU takes for one, and an RBD image."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "the name is not UTF-8"  # QMP is JSON: it could never be handed to QEMU
    if not 0 < length <= MAX_BACKING:
        return f"the name has {length} bytes; 1 to {MAX_BACKING} are possible"
    if any(unicodedata.category(c) == "Cc" for c in name):
        return "the name holds control characters"
    if RbdImage.parse(name):
        return None
    # QEMU's rule (path_has_protocol): a colon before the first slash makes it a protocol, json: among them.
    if ":" in name.split("/", 1)[0]:
        return "the name is a protocol or json: string, not a plain path"
    return None


def parse(data: bytes, file_size: int, *, path: str = "image") -> Header:
    """Check a qcow2 header and return what it says; identity and allocation stay 0. Pure.

    ``ImageRefused``: the header is cut, damaged, hostile, or asks for something qmpsnap does not allow.
    """
    try:
        return _parse(data, file_size)
    except _Fault as fault:
        raise ImageRefused(f"image {printable(path)} is refused: {fault}", hint=fault.hint) from None


def _parse(data: bytes, file_size: int) -> Header:
    """The header, or a _Fault: first the fields that say how to read the others, then everything they point at."""
    if len(data) < _BASE.size:
        raise _Fault("the header is truncated")
    fields = _Fields._make(_BASE.unpack_from(data))
    cluster = _check_beginning(fields, len(data))
    features, order, length = _version_3(data, cluster) if fields.version > 2 else (0, 4, _BASE.size)  # noqa: PLR2004
    start, named = fields.backing_offset, fields.backing_length
    if start and not length <= start <= cluster - min(named, cluster):
        raise _Fault("the backing file name is outside the first cluster or inside the header")
    extensions = _extensions(data, length, start or cluster)
    _check_features(features, extensions, fields.cluster_bits, data[104] if length > _MIN_HEADER_3 else 0)
    if order > _MAX_REFCOUNT_ORDER:
        raise _Fault(f"reference counts of 2^{order} bits are not possible")
    _check_encryption(fields.crypt_method, extensions.get(_EXT_CRYPTO), cluster, file_size)
    _check_tables(fields, cluster, file_size)
    extended = bool(features & _EXTENDED_L2)
    _check_size(fields, cluster * (cluster // (16 if extended else 8)))
    backing = _backing(data[start : start + named]) if start else None
    return Header(
        format="qcow2",
        version=fields.version,
        virtual_size=fields.size // _SECTOR * _SECTOR,  # QEMU drops a broken last sector
        cluster_size=cluster,
        backing=backing,
        backing_format=_backing_format(extensions.get(EXT_BACKING_FORMAT)) if backing else None,
        encrypted=bool(fields.crypt_method),
        internal_snapshots=fields.snapshots,
        dirty=bool(features & _DIRTY),
        corrupt=bool(features & _CORRUPT),
        extended_l2=extended,
        l1_offset=fields.l1_offset,
        l1_size=fields.l1_size,
        file_size=file_size,
    )


def _check_beginning(fields: _Fields, available: int) -> int:
    """The cluster size in bytes, once the bytes are known to be a header of a known version."""
    if fields.magic != MAGIC:
        raise _Fault("it has no qcow2 magic")
    if fields.version not in (2, 3):
        raise _Fault(f"qcow2 version {fields.version} is not known, only 2 and 3", "see qemu-img convert -O qcow2")
    if not _MIN_CLUSTER_BITS <= fields.cluster_bits <= _MAX_CLUSTER_BITS:
        raise _Fault(f"a cluster of 2^{fields.cluster_bits} bytes is not possible")
    cluster: int = 1 << fields.cluster_bits
    if available < cluster:
        raise _Fault("the header is truncated: the file ends inside its first cluster")
    return cluster


def _version_3(data: bytes, cluster: int) -> tuple[int, int, int]:
    """Incompatible features, refcount order and header length of a version 3 header."""
    features, _compatible, _autoclear, order, length = _MORE.unpack_from(data, _BASE.size)
    if not _MIN_HEADER_3 <= length <= cluster or length % 8:
        raise _Fault(f"a header length of {length} bytes is not possible")
    return features, order, length


def _extensions(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """The header extensions between the header and the backing name (or the end of the first cluster)."""
    found: dict[int, bytes] = {}
    offset = start
    for _ in range(_MAX_EXTENSIONS):
        if offset >= end:
            return found
        if offset + EXTENSION.size > end:
            break
        kind, length = EXTENSION.unpack_from(data, offset)
        if kind == 0:
            return found
        offset += EXTENSION.size
        if length > end - offset:
            raise _Fault(f"header extension {kind:#010x} reaches past the end of the header")
        if kind in found:
            raise _Fault(f"header extension {kind:#010x} occurs twice")
        found[kind] = data[offset : offset + length]
        offset += -(-length // 8) * 8
    raise _Fault("the header extensions do not end")


def _check_features(features: int, extensions: dict[int, bytes], cluster_bits: int, compression: int) -> None:
    if features & _DATA_FILE or _EXT_DATA_FILE in extensions:
        name = extensions.get(_EXT_DATA_FILE)
        raise _Fault(
            f"it has an external data file{f' ({printable(name)})' if name else ''}",
            "put the data into the image: qemu-img convert -O qcow2",
        )
    if unknown := features & ~_KNOWN:
        names = dict(_feature_names(extensions.get(_EXT_FEATURE_NAMES, b"")))
        listed = ", ".join(names.get(bit) or f"bit {bit}" for bit in range(64) if unknown >> bit & 1)
        raise _Fault(f"it needs features that this version does not know: {listed}", "try a newer version of qmpsnap")
    if bool(features & _COMPRESSION) != bool(compression) or compression > 1:
        raise _Fault(f"compression type {compression} is not known or not declared")
    if features & _EXTENDED_L2 and cluster_bits < _MIN_CLUSTER_BITS_EXTENDED_L2:
        raise _Fault(f"extended L2 entries are not possible with clusters of 2^{cluster_bits} bytes")


def _feature_names(table: bytes) -> Iterator[tuple[int, str]]:
    """Names of incompatible features by bit: the image's own words, so escaped."""
    for kind, bit, name in _FEATURE.iter_unpack(table[: len(table) // _FEATURE.size * _FEATURE.size]):
        if kind == 0 and name.strip(b"\0"):
            word = printable(name.rstrip(b"\0"))
            yield bit, f"bit {bit} ({word})"


def _check_encryption(method: int, pointer: bytes | None, cluster: int, file_size: int) -> None:
    if method == _AES:
        raise _Fault(
            "it is encrypted by the old AES method, which QEMU machines no longer open",
            "convert it: qemu-img convert --object secret,... -O qcow2 -o encrypt.format=luks,...",
        )
    if method not in (0, _LUKS):
        raise _Fault(f"encryption method {method} is not known")
    if (method == _LUKS) != (pointer is not None):
        raise _Fault("its encryption method and its encryption header do not agree")
    if pointer is not None:
        if len(pointer) != 16:  # noqa: PLR2004  two 64-bit numbers
            raise _Fault("the pointer to its encryption header is damaged")
        offset, length = struct.unpack(">QQ", pointer)
        _check_table("encryption header", offset, length, limit=file_size, cluster=cluster, end=file_size)


def _check_tables(fields: _Fields, cluster: int, file_size: int) -> None:
    """The tables' places; QEMU reads each as a whole, so a giant one is an attack on memory."""
    if not fields.refcount_clusters:
        raise _Fault("it has no refcount table")
    _check_table(
        "refcount table",
        fields.refcount_offset,
        fields.refcount_clusters * cluster,
        limit=_MAX_REFCOUNT_TABLE,
        cluster=cluster,
        end=-(-file_size // cluster) * cluster,  # the last cluster of a file may be short
    )
    if fields.snapshots:
        length, limit = fields.snapshots * _SNAPSHOT_ENTRY, _MAX_SNAPSHOTS * _SNAPSHOT_ENTRY
        place = fields.snapshots_offset
        _check_table("snapshot table", place, length, limit=limit, cluster=cluster, end=file_size)
    if fields.l1_size:
        place, length = fields.l1_offset, fields.l1_size * 8
        _check_table("L1 table", place, length, limit=MAX_L1, cluster=cluster, end=file_size)


def _check_size(fields: _Fields, per_entry: int) -> None:
    """The virtual size against the L1 table, each entry of which stands for ``per_entry`` bytes of guest data."""
    if fields.size >= _MAX_VIRTUAL_SIZE:
        raise _Fault(f"a virtual size of {fields.size} bytes is not possible")
    if fields.l1_size * per_entry < fields.size:
        raise _Fault(f"an L1 table of {fields.l1_size} entries is too small for a virtual size of {fields.size} bytes")


def _check_table(what: str, offset: int, length: int, *, limit: int, cluster: int, end: int) -> None:
    if length > limit:
        raise _Fault(f"a {what} of {length} bytes is more than the possible {limit}")
    if offset % cluster or offset < cluster:
        raise _Fault(f"the {what} begins at byte {offset}, inside another cluster")
    if offset + length > end:
        raise _Fault(f"the {what} is beyond the end of the file")


def _backing(raw: bytes) -> str | None:
    if not raw:
        return None  # as QEMU takes it
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise _Fault(f"its backing file name {printable(raw)} is not UTF-8") from None
    if problem := backing_fault(name):
        raise _Fault(
            f"its backing file name {printable(name)!r} is not allowed: {problem}",
            "record a plain path: qemu-img rebase -u -F FORMAT -b PATH IMAGE",
        )
    return name


def _backing_format(raw: bytes | None) -> str | None:
    if not raw:
        return None
    if len(raw) > _MAX_FORMAT_NAME or not raw.isascii() or not raw.decode("ascii").isprintable():
        raise _Fault(f"its backing format {printable(raw, 40)!r} is not a format name")
    return raw.decode("ascii")
