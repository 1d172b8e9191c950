"""Bundles: a whole machine in one file that is written and read from front to back.

After :data:`MAGIC` come frames: one byte for the kind, the payload's length (8 bytes, big-endian), the payload.

- ``M``: what the machine is, JSON of whoever writes it; the first frame, and the only one of its kind.
- ``F``: a file begins: its number in the manifest and its length (8 bytes each).
- ``D``: a piece of that file: where it belongs (8 bytes), then its bytes. What no piece covers is a hole.
- ``Z``: the SHA-256 of all that came before; the file ends here.

Nothing that a bundle says is believed before that digest is compared: until then what is unpacked is nobody's.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.host import files, write_errors
from qmpsnap.host.files import FileId, Identified, extents, same_file, sync_folder

MAGIC: Final = b"qmpsnap bundle 1\n"
MANIFEST_LIMIT: Final = 64 << 20
"""Bytes of a manifest: one snapshot takes about 1 KiB."""

_PIECE: Final = 1 << 20
_WORD: Final = 8
_HEAD: Final = 1 + _WORD


class Source(NamedTuple):
    """A file that goes into a bundle, and what was recorded of it; None of one that nobody has recorded."""

    path: str
    recorded: Identified | None = None


class Unpacked(NamedTuple):
    """A bundle that was read to its end: its manifest, and the paths that its files have now."""

    manifest: bytes
    files: tuple[str, ...]


# --- writing ----------------------------------------------------------------------------------------------------------


def write(target: str, manifest: bytes, sources: Sequence[Source]) -> int:
    """Make a bundle of that name, which must be free; it gets the name when all is on the disk. Returns its bytes.

    Raises:
        StateError: the name is taken.
        StoreMismatch: a file is not the recorded one.
        HostCannot: a file cannot be read, or the bundle not be written.
    """
    part = f"{target}.{os.getpid()}.part"
    with _translated(target):
        if os.path.lexists(target):
            raise StateError(f"{target} exists already", hint="choose another name")
        descriptor = files.create_exclusive(part, os.O_WRONLY)
        try:
            with os.fdopen(descriptor, "wb") as file:
                writer = _Writer(file.write)
                writer.frame(b"M", manifest)
                for number, source in enumerate(sources):
                    _pack(writer, number, source)
                file.write(b"Z" + (32).to_bytes(_WORD, "big") + writer.digest.digest())
                file.flush()
                os.fsync(file.fileno())
                written = file.tell()
            os.link(part, target)  # which overwrites nothing
        except FileExistsError as error:
            raise StateError(f"{target} exists already", hint="choose another name") from error
        finally:
            Path(part).unlink(missing_ok=True)
        sync_folder(Path(target).parent)
    return written


class _Writer:
    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self.digest = hashlib.sha256()
        self._put(MAGIC)

    def frame(self, kind: bytes, payload: bytes) -> None:
        self._put(kind + len(payload).to_bytes(_WORD, "big"))
        self._put(payload)

    def _put(self, data: bytes) -> None:
        self.digest.update(data)
        self._write(data)


def _pack(writer: _Writer, number: int, source: Source) -> None:
    with files.opened(source.path) as descriptor:
        if source.recorded and not same_file(source.recorded, FileId.of(descriptor)):
            raise StoreMismatch(f"{source.path} is not the recorded file")
        size = os.fstat(descriptor).st_size
        writer.frame(b"F", number.to_bytes(_WORD, "big") + size.to_bytes(_WORD, "big"))
        for start, end in extents(descriptor, size):
            at = start
            while at < end:
                piece = os.pread(descriptor, min(_PIECE, end - at), at)
                if not piece:
                    raise StoreMismatch(f"{source.path} became shorter while it was read")
                if piece.strip(b"\0"):
                    writer.frame(b"D", at.to_bytes(_WORD, "big") + piece)
                at += len(piece)


# --- reading ----------------------------------------------------------------------------------------------------------


def manifest_of(path: str) -> bytes:
    """What a bundle says of itself at its beginning; nothing of it is proven yet."""
    with _reading(path) as reader:
        return reader.manifest()


def unpack(path: str, folder: str) -> Unpacked:
    """Write a bundle's files into an empty folder, each on the disk, and return once the digest of all is right.

    Raises:
        StoreMismatch: it is no bundle, or damaged.
        HostCannot: it cannot be read, or the files not be written.
    """
    with _reading(path) as reader, _translated(folder):
        manifest = reader.manifest()
        made: list[str] = []
        kind, payload = reader.frame()
        while kind == b"F":
            made.append(str(Path(folder, f"{len(made)}.part")))
            kind, payload = _unpack_one(reader, payload, made)
        reader.require_end(kind, payload)
        sync_folder(folder)
        return Unpacked(manifest, tuple(made))


def _unpack_one(reader: "_Reader", begins: bytes, made: list[str]) -> tuple[bytes, bytes]:
    """Write one file; returns the frame behind it."""
    number, size = int.from_bytes(begins[:_WORD], "big"), int.from_bytes(begins[_WORD:], "big")
    if len(begins) != 2 * _WORD or number != len(made) - 1 or size >= 1 << 63:
        reader.damaged()
    descriptor = files.create_exclusive(made[-1])
    try:
        os.ftruncate(descriptor, size)
        while (frame := reader.frame())[0] == b"D":
            at, piece = int.from_bytes(frame[1][:_WORD], "big"), memoryview(frame[1])[_WORD:]
            if len(frame[1]) < _WORD or at + len(piece) > size:
                reader.damaged()
            while piece:
                done = os.pwrite(descriptor, piece, at)
                at, piece = at + done, piece[done:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return frame


class _Reader:
    def __init__(self, read: Callable[[int], bytes], path: str) -> None:
        self._read = read
        self._path = path
        self._digest = hashlib.sha256()

    def damaged(self) -> NoReturn:
        raise StoreMismatch(f"{self._path} is damaged: it is not the bundle that was written", hint="copy it again")

    def manifest(self) -> bytes:
        if self._take(len(MAGIC)) != MAGIC:
            raise StoreMismatch(f"{self._path} is not a bundle")
        kind, payload = self.frame(limit=MANIFEST_LIMIT)
        return payload if kind == b"M" else self.damaged()

    def frame(self, *, limit: int = _PIECE + _WORD) -> tuple[bytes, bytes]:
        before = self._digest.copy()
        head = self._take(_HEAD)
        size = int.from_bytes(head[1:], "big")
        if size > limit or head[:1] not in (b"M", b"F", b"D", b"Z"):
            self.damaged()
        payload = self._take(size)
        if head[:1] == b"Z" and payload != before.digest():
            self.damaged()
        return head[:1], payload

    def require_end(self, kind: bytes, payload: bytes) -> None:
        if kind != b"Z" or len(payload) != self._digest.digest_size or self._read(1):
            self.damaged()

    def _take(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            self.damaged()
        self._digest.update(data)
        return data


@contextmanager
def _reading(path: str) -> Iterator[_Reader]:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - by the very name
            yield _Reader(file.read, path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise HostCannot(f"{path} cannot be read: {said}") from error


@contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what, remedy = write_errors.reason(Path(path).parent, error)
        raise HostCannot(f"{error.filename or path} cannot be written: {what}", hint=remedy) from error
