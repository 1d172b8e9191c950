"""Digests of what a disk reads as: by what its chain says is data, or by every byte. Equal content, equal digest."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio import to_thread

from qmpsnap.block.image import content, header
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import PREFIX

BLOCK = 64 << 10
"""Bytes that are compared with zeros at once: a hole, a discarded cluster and a cluster of zeros are all alike."""

Extent = tuple[int, int, Path, int]
"""Where in the disk, how many bytes, and where they lie: the file and the place in it."""


async def content_digest(layer: Layer, *, qemu_img: str) -> str:
    """Digest of a layer that nobody writes to, its backing included, by what its chain has allocated.

    Args:
        layer: the layer.
        qemu_img: the qemu-img binary, whose ``map`` is asked.
    """
    argv = [qemu_img, "map", "-f", layer.format, "--output=json", layer.path]
    found = msgspec.json.decode((await anyio.run_process(argv)).stdout)
    places = _places(layer)
    # Compressed or encrypted, or in a cluster.
    if any(extent["data"] and "offset" not in extent for extent in found) or places[-1].startswith(PREFIX):
        return await whole_digest(layer, qemu_img=qemu_img)
    files = [Path(place) for place in places]
    return await to_thread.run_sync(lambda: _digest(_blocks(_placed(files, found)), _length(found)))


async def whole_digest(layer: Layer, *, qemu_img: str) -> str:
    """The same by every byte that QEMU's block layer reads of it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        await content.copy_out(layer, copy, qemu_img=qemu_img)
        return await to_thread.run_sync(raw_digest, copy)


def raw_digest(file: Path) -> str:
    """The same of a raw file, which need not be an image."""
    return _digest(_blocks(_data_of(file)), file.stat().st_size)


def _placed(files: list[Path], found: Iterable[dict[str, Any]]) -> Iterator[Extent]:
    for extent in found:
        if extent["data"]:
            yield extent["start"], extent["length"], files[extent["depth"]], extent["offset"]


def _places(layer: Layer) -> list[str]:
    """Where the chain lies, from the top down: the depth that ``map`` tells is the place in it."""
    places: list[str] = []
    path, format_ = layer.path, layer.format
    while True:
        places.append(path)
        if path.startswith(PREFIX):
            return places
        read = header.read(path, format=format_, block_device=True)
        backing = read.backing
        if backing is None:
            return places
        path = backing if backing.startswith(PREFIX) else os.path.join(os.path.dirname(path), backing)  # noqa: PTH118, PTH120
        format_ = "qcow2" if read.backing_format == "qcow2" else "raw"


def _data_of(file: Path) -> Iterator[Extent]:
    """The parts of a file that are no hole."""
    end = file.stat().st_size
    with file.open("rb") as opened:
        at = 0
        while at < end:
            try:
                start = os.lseek(opened.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(opened.fileno(), start, os.SEEK_HOLE)
            yield start, at - start, file, start


def _blocks(extents: Iterable[Extent]) -> Iterator[tuple[int, bytes]]:
    """Whole blocks, in their order, that hold data; several extents may share one."""
    number, block = -1, bytearray()
    for start, length, file, offset in extents:
        with file.open("rb") as opened:
            opened.seek(offset)
            done = 0
            while done < length:
                at, inside = divmod(start + done, BLOCK)
                if at != number:
                    yield number, bytes(block)
                    number, block = at, bytearray(BLOCK)
                some = min(BLOCK - inside, length - done)
                piece = opened.read(some)
                block[inside : inside + len(piece)] = piece  # beyond a raw file's end there are zeros
                done += some
    yield number, bytes(block)


def _digest(blocks: Iterable[tuple[int, bytes]], length: int) -> str:
    digest = hashlib.sha256(length.to_bytes(8, "big"))
    for number, block in blocks:
        if block.count(0) != len(block):
            digest.update(number.to_bytes(8, "big"))
            digest.update(block)
    return digest.hexdigest()


def _length(found: list[dict[str, Any]]) -> int:
    return max((extent["start"] + extent["length"] for extent in found), default=0)
