"""New images and their removal: made exclusively, verified, durable; or nothing left behind.

The file is ours before anything is written, and qemu-img is handed its descriptor, never its name: whatever appears
at that name meanwhile, no other file is written to. What was made is then judged by our own header reader.
"""

import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, Self

import anyio
from anyio import lowlevel
from msgspec import Struct

from qmpsnap.block.image import empty, encrypted, header, qemu_img
from qmpsnap.block.image.backing import require_size
from qmpsnap.block.image.header import Header, printable
from qmpsnap.effect import Effect
from qmpsnap.errors import (
    DeadlinePassed,
    HostCannot,
    ImageRefused,
    QmpsnapError,
    StateError,
    StorageHangs,
    StoreMismatch,
)
from qmpsnap.hint import call
from qmpsnap.host import files
from qmpsnap.host.files import FileId, same_file
from qmpsnap.host.threads import runs_to_end, to_end, to_read
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import Format

_SECTOR: Final = 512
_TRIES: Final = 50  # at encrypting: each takes milliseconds, and of some hosts' every fourth fails
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_MAX_SAID: Final = 64 << 10  # bytes kept of what qemu-img writes


class ImageTool(Struct, frozen=True):
    """Makes images with qemu-img, a path or a name on PATH; one run of it takes ``timeout`` seconds at most."""

    binary: str = "qemu-img"
    timeout: float = 60.0

    async def create_overlay(
        self, path: str | os.PathLike[str], *, backing: Layer, virtual_size: int, key: int | None = None
    ) -> Header:
        """Make an empty overlay of ``backing`` that QEMU can take over as it is: verified, fsynced, mode 0600.

        Only an encrypted one needs qemu-img. Its header names ``backing.path`` byte for byte, so that QEMU never sees
        an overridden backing. ``key``: descriptor of the key that opens the layer below, and will open this one; None
        for plain images.

        Raises:
            StateError: something is at ``path`` already, or the key does not open the layer below.
            StoreMismatch: the layer below has another size than is recorded.
        """
        place = _check_request(path, virtual_size)
        if virtual_size < backing.virtual_size:
            raise ImageRefused(
                f"an overlay of {virtual_size} bytes is smaller than its backing file of {backing.virtual_size} bytes",
                hint="make the overlay as large as its backing file",
            )
        if key is None:  # all in one call, as a change to a thread and back costs more than what is done there
            async with _claimed(lambda: _Claim.overlay(place, virtual_size, backing)) as claim:
                assert claim.made
                return claim.made
        await to_read(_check_backing, backing, True)
        await encrypted.require_key(backing.path, key, qemu_img=self.binary)
        arguments = ["-u", "-F", backing.format, "-b", backing.path]
        async with _claimed(lambda: _Claim.make(place)) as claim:
            return await self._make_qcow2(claim, arguments, virtual_size, backing, key)

    async def create_base(
        self,
        path: str | os.PathLike[str],
        *,
        format: Format,  # noqa: A002
        virtual_size: int,
        key: int | None = None,
    ) -> Header:
        """Make an empty image without backing: verified, fsynced, mode 0600. Raw needs no qemu-img."""
        place = _check_request(path, virtual_size)
        async with _claimed(lambda: _Claim.make(place)) as claim:
            if format == "raw":
                return await to_end(claim.finish_raw, virtual_size)
            return await self._make_qcow2(claim, [], virtual_size, None, key)

    async def _make_qcow2(
        self, claim: "_Claim", arguments: list[str], virtual_size: int, backing: Layer | None, key: int | None
    ) -> Header:
        # O_RDWR on /proc/self/fd/N opens the claimed inode; qemu-img only truncates it, so its identity stays.
        target = f"/proc/self/fd/{claim.descriptor}"
        encryption = "" if key is None else encrypted.NEW
        # QEMU times its key derivation even if it is given a limit, and now and then its clock fails.
        tries = 1 if key is None else _TRIES
        arguments = [*encrypted.secret(key), "-q", "-f", "qcow2", *arguments]
        options = ["-o", f"compat=1.1{encryption}", "--", target, str(virtual_size)]
        while True:
            try:
                await self._run(claim, ["create", *arguments, *options], key)
                break
            except HostCannot as error:
                tries -= 1
                if not tries or encrypted.NO_CLOCK not in error.message:
                    raise
        return await to_end(claim.finish_qcow2, virtual_size, backing, key is not None)

    async def _run(self, claim: "_Claim", arguments: list[str], key: int | None) -> None:
        """Run qemu-img to its end; it is killed when we are cancelled or its time is over."""
        shown = printable(claim.path)
        try:
            done = await qemu_img.run(
                [self.binary, *arguments],
                deadline=self.timeout,
                late=f"{self.binary} did not end within {self.timeout:g} seconds; {shown} was not created",
                inherited=[claim.descriptor] if key is None else [claim.descriptor, key],
                environment={**os.environ, "LC_ALL": "C"},
                limit=_MAX_SAID,
            )
        except DeadlinePassed as error:
            error.hint = error.hint or "check whether the storage of that folder answers"
            raise
        except HostCannot as error:
            error.add(f"{shown} was not created")
            error.hint = "install qemu-utils, or name the program in QMPSNAP_QEMU_IMG"
            raise
        code, said = done.returncode, done.stderr
        if code == 0:
            return
        text = _one_line(said).replace(f"/proc/self/fd/{claim.descriptor}", shown)
        if any(os.strerror(number) in text for number in _NO_SPACE):
            raise _no_space(claim.path)
        how = f"signal {-code}" if code < 0 else f"exit {code}"
        raise HostCannot(f"{self.binary} failed ({how}): {printable(text) or 'no message'}; {shown} was not created")


@runs_to_end  # not given up half-way: the caller must learn whether the file is gone
def remove(
    path: str, *, device: int, inode: int, birth: int = 0, size: int | None = None, durably: bool = True
) -> bool:
    """Unlink an image durably, if it is still the file it was recorded as; say whether it was there.

    ``size``: bytes that the file had when it was frozen, None where it was not or nobody knows; it counts where its
    birth does not tell whose number the inode has. Without ``durably`` its folder is the caller's to sync.
    """
    folder_path, name = os.path.split(path)
    with _translated(path, "was not removed"), contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(files.opened_folder(folder_path or "."))
        except (FileNotFoundError, NotADirectoryError):
            return False
        found = FileId.at(name, folder=folder)
        if found is None:
            return False
        if not same_file(FileId(device, inode, birth), found, size=size):
            raise StoreMismatch(
                f"the file at {printable(path)} is not the recorded image; it was not touched",
                hint="move it away; if it is a copy of the recorded image, "
                + call("relocate", dry_run=True)
                + " compares it",
            )
        os.unlink(name, dir_fd=folder)
        if durably:
            _sync(folder, path)
    return True


@runs_to_end
def sync_folders(paths: Iterable[str]) -> None:
    """Make it durable that files of these names were removed; fine where their folder is gone as well."""
    for folder, path in {os.path.split(path)[0]: path for path in paths}.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), files.opened_folder(folder) as descriptor:
            _sync(descriptor, path)


def _sync(folder: int, path: str) -> None:
    with _translated(path, "was removed, but perhaps not durably", effect="unknown"):
        os.fsync(folder)


class _Claim:
    """A file that we alone created, open from its birth until it is finished or discarded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.made: Header | None = None
        self._name = path.name
        # A task that is torn out of its thread discards while that thread may still be at work here.
        self._lock = threading.Lock()
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.descriptor = files.create_exclusive(path.name, os.O_RDWR, folder=self._folder)
        except BaseException:
            os.close(self._folder)
            raise

    @classmethod
    def make(cls, path: Path) -> Self:
        """The claim, with the errors of the family."""
        shown = printable(str(path))
        try:
            with _translated(str(path)):
                return cls(path)
        except HostCannot as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            raise StateError(f"{shown} exists already", hint="move it away or choose another name") from error.__cause__

    def finish_raw(self, virtual_size: int) -> Header:
        """Give an empty raw image its size and make it durable."""
        with self._lock, _translated(self.path):
            os.ftruncate(self.descriptor, virtual_size)
            return self._settle(header.inspect(self.descriptor, path=self.path, format="raw"))

    @classmethod
    def overlay(cls, path: Path, virtual_size: int, backing: Layer) -> Self:
        """The claim with an empty overlay in it, which is discarded where that fails."""
        _check_backing(backing, encrypted=False)
        claim = cls.make(path)
        try:
            claim.made = claim.make_overlay(virtual_size, backing)
        except BaseException as error:
            _tell_left(error, _discard(claim))
            raise
        return claim

    def make_overlay(self, virtual_size: int, backing: Layer) -> Header:
        """Write an empty overlay; what has no header yet holds nothing, so that comes last.

        What is zero is left a hole: an fsync writes three blocks then, not fifty.
        """
        length, tables = empty.tables(virtual_size)
        with self._lock, _translated(self.path):
            os.ftruncate(self.descriptor, length)
            for at, table in tables.items():
                _write(self.descriptor, table, at=at)
            _write(self.descriptor, empty.header(virtual_size, backing.path, backing.format), at=0)
        return self.finish_qcow2(virtual_size, backing, encrypted=False)

    def finish_qcow2(self, virtual_size: int, backing: Layer | None, encrypted: bool) -> Header:  # noqa: FBT001
        """Compare what was made with what was asked, and make it durable."""
        with self._lock, _translated(self.path):
            try:
                made = header.inspect(self.descriptor, path=self.path, format="qcow2")
            except ImageRefused as error:
                raise self._unexpected(error.message) from error
            wanted = (virtual_size, backing.path if backing else None, backing.format if backing else None)
            if (made.virtual_size, made.backing, made.backing_format) != wanted:
                raise self._unexpected(f"size, backing file and its format should be {wanted!r}")
            if made.internal_snapshots or made.dirty or made.corrupt or made.encrypted is not encrypted:
                raise self._unexpected(
                    f"it should have no internal snapshots, be clean and {'' if encrypted else 'not '}encrypted"
                )
            if os.pread(self.descriptor, made.l1_size * 8, made.l1_offset).strip(b"\0"):
                raise self._unexpected("it should be empty")
            return self._settle(made)

    def discard(self) -> None:
        """Remove the file durably, unless its name leads to another file by now, and let go of it."""
        with self._lock:
            try:
                if files.unlink_own(self._name, self.descriptor, folder=self._folder):
                    os.fsync(self._folder)
            finally:
                self.close()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)
        os.close(self._folder)
        self.descriptor = self._folder = -1  # a thread that comes late meets EBADF, not somebody else's file

    def _settle(self, made: Header) -> Header:
        """Durable from here on: the file, then its name; and the name must still lead to it."""
        os.fsync(self.descriptor)
        os.fsync(self._folder)
        if not files.leads_to(self._name, self.descriptor, folder=self._folder):
            raise StoreMismatch(f"another file appeared at {printable(self.path)} meanwhile; it was not touched")
        return made

    def _unexpected(self, what: str) -> HostCannot:
        return HostCannot(f"{printable(self.path)} was not created as requested: {what}; it was removed")


@asynccontextmanager
async def _claimed(make: Callable[[], _Claim]) -> AsyncIterator[_Claim]:
    """A claim that is discarded when the block fails, is cancelled or runs out of time."""
    claim = await to_end(make)  # to its end: we know of the file even if this is cancelled meanwhile
    try:
        yield claim
        await lowlevel.checkpoint()  # who is cancelled never learns of the file: then there is none
    except BaseException as error:
        with anyio.CancelScope(shield=True):
            try:
                problem = await to_end(_discard, claim)
            except StorageHangs as hang:
                problem = hang.message
        _tell_left(error, problem)
        raise
    claim.close()


def _tell_left(error: BaseException, problem: str) -> None:
    """Say what the problem with discarding a claim means, in the error for which it is given up."""
    if isinstance(error, StorageHangs):
        error.effect = "unknown"
    elif problem and isinstance(error, QmpsnapError):
        error.effect = "unknown"
        error.add(f"an unfinished file may be left there: {problem}")


def _discard(claim: _Claim) -> str:
    """Discard the claim and return what went wrong, or an empty string."""
    try:
        claim.discard()
    except OSError as error:
        return str(error.strerror)
    return ""


def _write(descriptor: int, data: bytes, *, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _one_line(stderr: bytes) -> str:
    """What qemu-img wrote, on one line."""
    lines = stderr.decode(errors="backslashreplace").splitlines()
    # It wants to unlink what it failed to make and cannot, having a descriptor only: that is for us to do.
    return "; ".join(line.strip() for line in lines if "Error when deleting file" not in line)


def _check_request(path: str | os.PathLike[str], virtual_size: int) -> Path:
    """The place for a new image, once name and size are such that every tool agrees about them."""
    text = os.fspath(path)
    # It becomes the backing string of a later overlay, so the rules for those hold now.
    problem = header.backing_fault(text) or ("" if text.startswith("/") else "the path is not absolute")
    if not problem and Path(text).name in ("", ".."):
        problem = "the path names no file"
    if problem:
        raise ImageRefused(f"no image can be created at {printable(text)!r}: {problem}")
    if virtual_size <= 0 or virtual_size % _SECTOR or virtual_size >= 1 << 63:
        raise ImageRefused(
            f"an image cannot have {virtual_size} bytes",
            hint=f"use a positive multiple of {_SECTOR} bytes",
        )
    return Path(text)


def _check_backing(backing: Layer, encrypted: bool) -> None:  # noqa: FBT001
    """The layer below as an overlay needs it: a plain absolute name, of its format and size, encrypted as this one."""
    is_place = backing.path.startswith("/") or backing.storage == "rbd"
    problem = header.backing_fault(backing.path) or ("" if is_place else "the path is not absolute")
    if problem:
        raise ImageRefused(f"{printable(backing.path)!r} cannot be a backing file: {problem}")
    found = header.read(backing.path, format=backing.format, block_device=True)
    if found.encrypted is not encrypted:
        # An overlay in plain text would hold what the guest believes to be encrypted.
        states = ("is encrypted", "is not") if found.encrypted else ("is not encrypted", "is")
        raise ImageRefused(
            f"{printable(backing.path)} {states[0]}, but its disk {states[1]} by the spec",
            hint="a disk's 'encryption' holds for all its layers; adopted machines cannot have encrypted disks",
        )
    # An overlay of the recorded size would cut, or lengthen, the disk that the guest sees.
    require_size(backing, found)


@contextmanager
def _translated(path: str, outcome: str = "was not created", *, effect: Effect = "none") -> Iterator[None]:
    """The system's errors as the family's, at this one place."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(path, outcome, effect=effect) from error
        hint = "make the folder first" if isinstance(error, FileNotFoundError) else ""
        raise HostCannot(f"{printable(path)} {outcome}: {error.strerror}", hint=hint, effect=effect) from error


def _no_space(path: str, outcome: str = "was not created", *, effect: Effect = "none") -> HostCannot:
    folder = printable(str(Path(path).parent))
    return HostCannot(
        f"no space left in {folder}: {printable(path)} {outcome}",
        hint=f"free some space there (df -h {folder})",
        effect=effect,
    )
