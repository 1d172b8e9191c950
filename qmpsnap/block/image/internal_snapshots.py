"""Snapshots inside qcow2 images: taking one out, into a new image of its own.

An image with a tag is never rolled back where anybody else reads it: its file is copied, and the copy is rolled back.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import anyio

from qmpsnap.block.image import header
from qmpsnap.block.image import qemu_img as tool
from qmpsnap.block.image.encrypted import alone
from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.host.files import FileId, create_exclusive, extents, opened, same_file, sync_folder, unlink_own
from qmpsnap.host.threads import to_end
from qmpsnap.model.layers.chain import Layer

FICLONE: Final = 0x40049409
"""ioctl(2) that lets two files share their blocks, on file systems that can."""

_CHUNK = 4 << 20
_HEAD: Final = 64 << 10
"""Bytes in which a header and the name of its backing lie: the smallest first cluster that has both is shorter."""
_CONSTANT: Final = 36
"""Bytes of a header, up to its encryption, that tags leave as they are."""


async def take_out(
    source: Layer, tag: str, target: Layer, *, keep: bool, qemu_img: str, deadline: float = 3600
) -> Header:
    """Make ``target`` hold what ``source`` held when the tag was made."""
    await to_end(_copy, source.path, target.path, (source.device, source.inode, source.birth))
    try:
        inside = {found["name"] for found in await _inside(target.path, qemu_img, deadline)}
        _require(tag, inside, source)
        await _run([qemu_img, "snapshot", "-a", tag, alone(target.path)], deadline)
        for other in sorted(inside - ({tag} if keep else set())):
            await _run([qemu_img, "snapshot", "-d", other, alone(target.path)], deadline)
        return await to_end(_sync, target)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await to_end(discard, target, source)
        raise


def discard(target: Layer, source: Layer) -> None:
    """Remove a copy of ``source`` that nobody has used yet; fine when it is not there. What is no copy of it stays."""
    try:
        ours = _begins_like(target.path, source.path)
    except FileNotFoundError:
        return
    if ours:
        Path(target.path).unlink(missing_ok=True)


def _begins_like(target: str, source: str) -> bool:
    """Whether a file is a copy, or what there is of one: of a header what no tag changes, and the backing's name."""
    heads = []
    for path in (target, source):
        with opened(path) as descriptor:
            heads.append((os.fstat(descriptor).st_size, os.pread(descriptor, _HEAD, 0)))
    (size, copied), (whole, head) = heads
    place, length = (int.from_bytes(head[at : at + width], "big") for at, width in ((8, 8), (16, 4)))
    same = copied[:_CONSTANT] == head[:_CONSTANT] and copied[place : place + length] == head[place : place + length]
    return same or (size in (0, whole) and not copied.strip(b"\0"))


async def go_to(layer: Layer, tag: str, *, qemu_img: str, deadline: float = 600) -> None:
    """Roll an image back to its tag. Nobody may have it open, and nobody else may read it."""
    with contextlib.ExitStack() as stack:
        descriptor = await to_end(stack.enter_context, _opened(layer))
        # The very file that was looked at, whatever its name leads to by now.
        image = alone(f"/proc/self/fd/{descriptor}")
        await _run([qemu_img, "snapshot", "-a", tag, image], deadline, inherited=[descriptor])


@contextmanager
def _opened(layer: Layer) -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(opened(layer.path, os.O_RDONLY))
        except OSError as error:
            raise HostCannot(f"{layer.path} cannot be opened: {error.strerror}") from error
        if not same_file(layer, FileId.of(descriptor)):
            raise StoreMismatch(f"{layer.path} is not the recorded file")
        yield descriptor


def _copy(source: str, target: str, recorded: tuple[int, int] | tuple[int, int, int]) -> None:
    """Copy a file that has this device, inode and birth, holes as holes, or share its blocks."""
    try:
        into = create_exclusive(target)
    except FileExistsError as error:
        raise StateError(f"{target} exists already") from error
    try:
        with opened(source, os.O_RDONLY) as out:
            if not same_file(FileId(*recorded), FileId.of(out)):
                unlink_own(target, into)
                raise StoreMismatch(f"{source} is not the recorded file")
            with contextlib.suppress(OSError):
                fcntl.ioctl(into, FICLONE, out)
                return
            _copy_data(out, into)
    except OSError as error:
        unlink_own(target, into)
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise HostCannot(f"{source} cannot be copied to {target}: {error.strerror}", hint=hint) from error
    finally:
        os.close(into)


def _copy_data(out: int, into: int) -> None:
    size = os.fstat(out).st_size
    os.ftruncate(into, size)
    for start, end in extents(out, size):
        at = start
        while at < end:
            chunk = os.pread(out, min(_CHUNK, end - at), at)
            if not chunk:
                raise OSError(errno.EIO, "it became shorter while it was read")
            at += os.pwrite(into, chunk, at)  # the next turn does what a full disk left over, or meets its error


def _sync(target: Layer) -> Header:
    with opened(target.path) as descriptor:
        os.fsync(descriptor)
    sync_folder(Path(target.path).parent)
    return header.read(target.path, format=target.format)


def _require(tag: str, inside: Collection[str], source: Layer) -> None:
    if tag not in inside:
        raise StoreMismatch(f"{source.path} has no internal snapshot {tag}")


async def _inside(path: str, qemu_img: str, deadline: float) -> list[dict[str, Any]]:
    said = await _run([qemu_img, "info", "--output=json", alone(path)], deadline)
    found: list[dict[str, Any]] = json.loads(said).get("snapshots", [])
    return found


async def _run(argv: list[str], deadline: float, *, inherited: Sequence[int] = ()) -> bytes:
    late = f"{argv[0]} {argv[1]} {argv[-1]} took longer than {deadline:g} s"
    done = await tool.run(argv, deadline=deadline, late=late, inherited=inherited)
    if done.returncode:
        raise HostCannot(f"{argv[0]} {argv[1]} failed: {done.stderr.decode(errors='backslashreplace').strip()}")
    return done.stdout
