"""State files: QEMU's stream, then a manifest that says what it is and what it must digest to.

QEMU loads a stream that is cut, flipped or another machine's without a word, so nothing is loaded that has not been
read and compared first. While it is written a file has another name (``*.part``) and is nobody's.

The end of a file: manifest as JSON, its SHA-256 (32 bytes), its length (8, little-endian), :data:`MAGIC` (16).
"""

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.hint import call, option
from qmpsnap.host import files
from qmpsnap.host.files import FileId, same_file, sync_folder
from qmpsnap.model.layers.vmstate import Manifest, Stream, Vmstate
from qmpsnap.model.names import OperationId

MAGIC = b"qmpsnap vmstate\n"
MANIFEST_LIMIT = 1 << 20
"""Bytes a manifest may have: one of a machine with hundreds of devices has 20 kB."""

FALLOC_FL_KEEP_SIZE = 1
"""Of fallocate(2), which Python has only without flags."""
SYNC_FILE_RANGE_WRITE = 2
"""Of sync_file_range(2), which Python has not: begin to write, and do not wait."""

STREAM_MAGIC = b"QEVM"
"""The first bytes of what QEMU writes."""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""The first bytes of a compressed stream."""

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""What link(2) says where there are none: FAT, many a network's or user's file system."""
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
"""Of renameat2(2), which Python has not."""

_CHUNK = 1 << 20
_LOOK = 0.005
"""Seconds between two looks for more to digest."""
_TAIL = 32 + 8 + len(MAGIC)


def part(path: str, operation: OperationId) -> str:
    """The name a state file has while it is written: of no other operation, so nobody else's file."""
    return f"{path}.{operation}.part"


def create(path: str) -> int:
    """Make the file, which must not exist, for this user alone; returns a descriptor open for writing only."""
    with _translated(path):
        return files.create_exclusive(path)


def reserve(descriptor: int, size: int, path: str) -> None:
    """Allocate ``size`` bytes for the file without making it longer, so that writing them cannot fail with ENOSPC."""
    import ctypes

    with _translated(path):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(descriptor, FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def also_direct(descriptor: int) -> int | None:
    """The very same file once more, past the page cache; None where its file system cannot."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


class Digest:
    """The SHA-256 of a file that QEMU writes from its beginning to its end, followed by a thread while it is written.

    What QEMU has written is sent to the disk meanwhile, so that less is left for the fsync at the end. Nobody waits for
    the thread, whose storage may hang: what it has not digested is left to the caller of :meth:`taken`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        self._stopped = threading.Event()
        self._taken = (0, hashlib.sha256())
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        """Digest no more."""
        self._stopped.set()

    def taken(self) -> tuple[int, "hashlib._Hash"]:
        """So many bytes of the beginning, and what they digest to."""
        self.stop()
        return self._taken

    def _follow(self) -> None:
        with os.fdopen(self._descriptor, "rb", buffering=0), contextlib.suppress(OSError):
            while not self._stopped.is_set():
                at, found = self._taken
                if chunk := os.pread(self._descriptor, _CHUNK, at):
                    found = found.copy()
                    found.update(chunk)
                    self._taken = (at + len(chunk), found)
                    _begin_writeback(self._descriptor, at, len(chunk))
                else:
                    self._stopped.wait(_LOOK)


def _begin_writeback(descriptor: int, start: int, size: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    libc.sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def finish(written: str, path: str, manifest: Manifest, digest: Digest | None = None) -> Vmstate:
    """Digest what QEMU wrote, compress it if the manifest says so, and give it its manifest and name, all durably.

    If an earlier process did part of it and died, the rest is done. A link in the file's place is not followed. It gets
    the name ``path``, which must be free, only once it is whole; for that the file system needs hard links, or a rename
    that overwrites nothing.
    """
    with _translated(path):
        if manifest.compression == "zstd":
            _compress(written)
        with _opened(written, os.O_RDWR) as descriptor:
            require_own(descriptor, written, path)
            if not _begins_ours(descriptor):
                raise StoreMismatch(f"{written} was replaced by another file; it was not touched")
            if not _is_sealed(descriptor, written, manifest.operation):
                _seal(descriptor, manifest, digest)
            os.ftruncate(descriptor, os.fstat(descriptor).st_size)  # lets go of the room it did not need
            os.fsync(descriptor)
            _name(descriptor, written, path)
            files.unlink_own(written, descriptor)
    return find(path)[0]


def require_own(descriptor: int, written: str, path: str) -> None:
    """Make sure that the open file has no name but the two that we give it: it is to be written to."""
    found, names = os.fstat(descriptor), 1
    if os.path.lexists(path):
        names += os.path.samestat(found, os.lstat(path))
    if found.st_nlink != names:
        raise StoreMismatch(f"{written} is a hard link to another file; it was not touched")


def _is_sealed(descriptor: int, path: str, operation: OperationId) -> bool:
    try:
        return _manifest(descriptor, path).operation == operation
    except StoreMismatch:
        return False


def _seal(descriptor: int, manifest: Manifest, begun: Digest | None = None) -> None:
    """Append the manifest, into the room that was promised to the stream."""
    size, digest = _digest(descriptor, os.fstat(descriptor).st_size, begun)
    text = msgspec.json.encode(msgspec.structs.replace(manifest, bytes=size, digest=digest))
    left = text + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + MAGIC
    try:
        at = size
        while left:
            count = os.pwrite(descriptor, left, at)
            left, at = left[count:], at + count
    except OSError:
        os.ftruncate(descriptor, size)  # part of a manifest would be taken for the stream's end
        raise


def _name(descriptor: int, written: str, path: str) -> None:
    """Give an open file its name, durably or not at all; never another file's place."""
    take_back = _give_name(written, path)
    try:
        same = files.leads_to(path, descriptor)
        sync_folder(Path(path).parent)
    except OSError:
        take_back()
        raise
    if not same:
        take_back()
        raise StoreMismatch(f"{written} was replaced by another file")


def _give_name(written: str, path: str) -> Callable[[], None]:
    """A second name where the file system has hard links, so that there is no moment without one; returns the undo."""
    try:
        os.link(written, path, follow_symlinks=False)  # unlike a plain rename it never takes another file's place
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename(written, path)
        return lambda: _rename(path, written)
    return Path(path).unlink


def _rename(source: str, target: str) -> None:
    """Rename a file to a name that must be nobody's."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def discard(written: str) -> None:
    """Remove an unfinished file; fine when it is not there. Somebody else's file in its place stays."""
    for path in (written, _packed(written)):
        if Path(path).is_symlink() or not Path(path).is_file():
            continue
        with contextlib.suppress(StoreMismatch), _opened(path) as descriptor:
            if not os.fstat(descriptor).st_size or _begins_ours(descriptor):
                files.unlink_own(path, descriptor)


def _begins_ours(descriptor: int) -> bool:
    """Whether it begins as QEMU's stream does, or one that we have packed; QEMU may write pages before that."""
    return os.pread(descriptor, 4, 0) in (STREAM_MAGIC, ZSTD_MAGIC, bytes(4))


def find(path: str) -> tuple[Vmstate, Manifest]:
    """What a state file says it is; its stream is not looked at."""
    with _opened(path) as descriptor:
        manifest = _manifest(descriptor, path)
        file = FileId.of(descriptor)
    stream = {name: getattr(manifest, name) for name in Stream.__struct_fields__}
    return Vmstate(path=path, device=file.device, inode=file.inode, birth=file.birth, **stream), manifest


@contextmanager
def verified(state: Vmstate) -> Iterator[int]:
    """The stream of a state file, open for reading, after all of it was compared with the record.

    A compressed one is unpacked into a file without a name beside it. ``StoreMismatch``: it is not the recorded file,
    or not what it was; nothing was loaded.
    """
    with _opened(state.path) as descriptor:
        if not same_file(state, FileId.of(descriptor)):
            raise StoreMismatch(f"{state.path} is not the recorded file")
        manifest = _manifest(descriptor, state.path)
        size, digest = _digest(descriptor, state.bytes)
        if (size, digest) != (state.bytes, state.digest) or manifest.digest != state.digest:
            raise StoreMismatch(
                f"{state.path} is damaged: its digest is {digest[:12]}..., the recorded one {state.digest[:12]}...",
                hint="put a copy of the file back, or revert to another snapshot",
            )
        os.lseek(descriptor, 0, os.SEEK_SET)
        if state.compression == "none":
            yield descriptor
            return
        with _unpacked(descriptor, state) as plain:
            yield plain


def _manifest(descriptor: int, path: str) -> Manifest:
    foreign = StoreMismatch(
        f"{path} is not a state file, or its end is missing or damaged",
        hint="use a snapshot's own state file; " + call("snapshots", "VM") + " lists the snapshots",
    )
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
    length = int.from_bytes(tail[32:40], "little")
    if len(tail) < _TAIL or tail[40:] != MAGIC or not 0 < length <= min(MANIFEST_LIMIT, size - _TAIL):
        raise foreign
    text = os.pread(descriptor, length, size - _TAIL - length)
    if hashlib.sha256(text).digest() != tail[:32]:
        raise foreign
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except msgspec.MsgspecError as error:
        raise foreign from error
    if manifest.bytes != size - _TAIL - length:
        raise foreign
    return manifest


def _digest(descriptor: int, size: int, begun: Digest | None = None) -> tuple[int, str]:
    """How many bytes there are, ``size`` at most, and their SHA-256."""
    at, found = begun.taken() if begun else (0, hashlib.sha256())
    while at < size and (chunk := os.pread(descriptor, min(_CHUNK, size - at), at)):
        found.update(chunk)
        at += len(chunk)
    return at, found.hexdigest()


def _packed(path: str) -> str:
    """The name of the file that a compressed one is made in."""
    return f"{path}z"


def _compress(path: str) -> None:
    """Pack a file in place, unless it is: the packed one takes its name once it is whole."""
    packed = _packed(path)
    Path(packed).unlink(missing_ok=True)  # of an earlier try: the name is this operation's alone
    with _opened(path) as descriptor:
        if os.pread(descriptor, len(ZSTD_MAGIC), 0) == ZSTD_MAGIC:
            return
        try:
            with os.fdopen(os.dup(descriptor), "rb") as source, os.fdopen(create(packed), "wb") as target:
                zstandard_package().ZstdCompressor().copy_stream(source, target)
        except BaseException:
            Path(packed).unlink(missing_ok=True)
            raise
    Path(packed).replace(path)


@contextmanager
def _unpacked(descriptor: int, state: Vmstate) -> Iterator[int]:
    import tempfile

    with _translated(state.path), tempfile.TemporaryFile(dir=Path(state.path).parent) as plain:
        with os.fdopen(os.dup(descriptor), "rb") as packed:
            zstandard_package().ZstdDecompressor().copy_stream(_Limited(packed, state.bytes), plain)
        plain.flush()
        readable = os.open(f"/proc/self/fd/{plain.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield readable
    finally:
        os.close(readable)


class _Limited:
    """A file that ends earlier: what comes after is the manifest."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        found = self._file.read(wanted)
        self._left -= len(found)
        return found


def zstandard_package() -> Any:
    """The ``zstandard`` package, or ``HostCannot`` where it is missing."""
    try:
        import zstandard  # an extra of the package: who does not compress does not need it
    except ImportError as error:
        raise HostCannot(
            "compression needs the Python package zstandard",
            hint="pip install 'qmpsnap[zstd]', or omit " + option("compression", "zstd"),
        ) from error
    return zstandard


@contextmanager
def _opened(path: str, access: int = os.O_RDONLY) -> Iterator[int]:
    with _translated(path):
        # A pipe in its place must not make us wait for a writer.
        descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StoreMismatch(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise StateError(f"{path} exists already", hint="move it away or choose another name") from error
    except ValueError as error:
        raise HostCannot(f"{path!r} is not a path: {error}", hint="choose another name") from error
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check its folder and permissions"
        raise HostCannot(f"{path}: {error.strerror}", hint=hint) from error
