"""qcow2 images as bytes, and anything in their headers bent."""

import struct

CLUSTER = 1 << 16
GIB = 1 << 30


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def image(
    *,
    magic: bytes = b"QFI\xfb",
    version: int = 3,
    backing: bytes = b"",
    backing_offset: int | None = None,
    backing_length: int | None = None,
    cluster_bits: int = 16,
    size: int = GIB,
    crypt: int = 0,
    l1_size: int = 2,
    l1_offset: int = 3 * CLUSTER,
    refcount_offset: int = CLUSTER,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    snapshots_offset: int = 0,
    features: int = 0,
    order: int = 4,
    length: int = 112,
    compression: int = 0,
    extensions: bytes = b"",
    end: bytes = bytes(8),
    total: int = 3 * CLUSTER + 16,
) -> bytes:
    """An empty image as qemu-img lays it out, with anything in it bent as a test wants it."""
    more = b"" if version == 2 else struct.pack(">QQQIIB7x", features, 0, 0, order, length, compression)
    area = extensions + end
    place = 72 + len(more) + len(area)
    if backing_offset is None:
        backing_offset = place if backing else 0
    base = struct.pack(
        ">4sIQIIQIIQQIIQ",
        magic,
        version,
        backing_offset,
        len(backing) if backing_length is None else backing_length,
        cluster_bits,
        size,
        crypt,
        l1_size,
        l1_offset,
        refcount_offset,
        refcount_clusters,
        snapshots,
        snapshots_offset,
    )
    return (base + more + area + backing).ljust(total, b"\0")
