"""What an image says of itself, learned without QEMU: reads headers, accepts or refuses files, follows backing strings.

Every image that somebody else made passes here before any tool opens it; :mod:`qmpsnap.block.image.qcow2` judges
the bytes.
"""

import contextlib
import errno
import os
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.block.image.qcow2 import MAGIC, MAX_CLUSTER, Header, backing_fault, parse
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.hint import option
from qmpsnap.host import files
from qmpsnap.host.files import opened
from qmpsnap.model.layers.chain import MAX_LAYERS, Layer
from qmpsnap.model.machines.rbd import PREFIX, RbdImage
from qmpsnap.model.machines.spec import Format, Storage
from qmpsnap.model.text import printable

__all__ = [
    "MAX_DEPTH",
    "FoundLayer",
    "Header",
    "backing_fault",
    "conversion",
    "detect",
    "inspect",
    "is_empty",
    "parse",
    "printable",
    "read",
    "read_chain",
    "require",
    "require_few_tags",
    "require_tellable",
]

MAX_DEPTH: Final = MAX_LAYERS

MAX_TAGS: Final = 1024
"""Snapshots that a foreign image may have inside: QEMU reads all of them whenever it opens it, and hangs in 65,536."""

_MAGICS: Final = (
    (0, MAGIC + b"\0\0\0\1", "qcow"),
    (0, MAGIC, "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)  # LUKS is not among them: an encrypted volume is opaque data, and raw is what it is

_PACKED: Final = (
    (b"\x1f\x8b", "gunzip --keep"),
    (b"\xfd7zXZ\0", "unxz --keep"),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"BZh", "bunzip2 --keep"),
)
"""Images are handed out packed, under names that do not always say so."""

_SECTOR: Final = 512
_FIRST_READ: Final = 64 << 10  # one default cluster: nearly every image is read in one go


class FoundLayer(Struct, frozen=True, kw_only=True):
    """One layer of a chain as the headers tell it; its format is said by the header above, at the top by the caller.

    ``path``: absolute. Where the layer above has an absolute backing string it is that very string.
    """

    path: str
    format: Format
    header: Header
    storage: Storage = "file"


def detect(data: bytes) -> Format:
    """The format by its magic: qcow2, or else raw. For images of our own only; a foreign image's format is declared."""
    return "qcow2" if data.startswith(MAGIC) else "raw"


def inspect(descriptor: int, *, path: str, format: Format | None = None, foreign: bool = False) -> Header:  # noqa: A002
    """As :func:`read`, from an open descriptor; ``path`` is only for messages."""
    try:
        status = os.fstat(descriptor)
        # A device's st_size is 0; its end is found by seeking.
        size = os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size
        data = os.pread(descriptor, _FIRST_READ, 0)
        if data.startswith(MAGIC) and len(data) == _FIRST_READ and data[20:24] > b"\0\0\0\x10":
            data = os.pread(descriptor, MAX_CLUSTER, 0)  # a cluster larger than the first read
    except OSError as error:
        raise HostCannot(f"{printable(path)} cannot be read: {error.strerror}") from error
    if (format == "qcow2" and _magic(data) != "qcow2") or (format == "raw" and foreign):
        _require_declared(data, _end(descriptor, size), path=path, format=format)
    if (format or detect(data)) == "qcow2":
        header = parse(data, size, path=path)
    else:
        header = Header(format="raw", virtual_size=-(-size // _SECTOR) * _SECTOR, file_size=size)
    identity, birth = files.identity_of(status), files.born(descriptor)
    return replace(
        header,
        device=status.st_dev,
        inode=status.st_ino,
        birth=birth,
        identity=identity,
        allocated=size if identity else status.st_blocks * 512,
    )


def _end(descriptor: int, size: int) -> bytes:
    """The last sector of a file."""
    try:
        return os.pread(descriptor, _SECTOR, max(0, size - _SECTOR))
    except OSError:  # the first one could be read, and tells most
        return b""


def _magic(data: bytes) -> str | None:
    return next((kind for offset, bytes_, kind in _MAGICS if data.startswith(bytes_, offset)), None)


def _require_declared(data: bytes, end: bytes, *, path: str, format: Format) -> None:  # noqa: A002
    """Refuse what shows another format than the declared one; the hint is the way to one that can be declared."""
    shown = printable(path)
    magic, sign = _magic(data), "begins"
    if magic is None and end.startswith(b"conectix"):
        magic, sign = "vpc", "ends"  # a virtual hard disk of fixed size
    if magic == "qcow2":
        raise ImageRefused(
            f"image {shown} is declared raw but begins like a qcow2 image",
            hint="declare its format as qcow2",
        )
    if magic:
        but = f"{sign} like a {magic} image" if format == "raw" else f"has no qcow2 header: it {sign} like {magic}"
        raise ImageRefused(
            f"image {shown} is declared {format} but {but}; qmpsnap takes snapshots of qcow2 and raw images only",
            hint=conversion(path, magic),
        )
    if format == "qcow2":
        packer = next((unpack for bytes_, unpack in _PACKED if data.startswith(bytes_)), None)
        raise ImageRefused(
            f"image {shown} is declared qcow2 but has no qcow2 header",
            hint=f"unpack it: {packer} {shlex.quote(shown)}" if packer else "if it is raw, declare its format as raw",
        )


def conversion(path: str, magic: str) -> str:
    """The hint to an image of another format: the command that makes a qcow2 image of it."""
    target = os.path.splitext(path)[0] + ".qcow2"  # noqa: PTH122  a name, whatever it holds
    target = f"{path}.qcow2" if target == path else target
    command = f"qemu-img convert -f {magic} -O qcow2 {shlex.quote(path)} {shlex.quote(target)}"
    return printable(f"convert it while it is not in use, then use the new image: {command}", 2000)


def read(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002
    foreign: bool = False,
    block_device: bool = False,
) -> Header:
    """Read an image's header without following a symlink, blocking on a pipe or asking QEMU.

    ``format`` is pinned: ``raw`` stays raw whatever a guest wrote into its first sector, unless the image is
    ``foreign``; None goes by the magic. ``ImageRefused``: not there, a symlink, not a regular file, not of that format,
    or see :func:`parse`. Of an RBD image nothing is read but its size.
    """
    if image := RbdImage.parse(os.fspath(path)):
        from qmpsnap.host import ceph  # seldom needed

        found = ceph.info(image)
        return Header(format="raw", virtual_size=found.size, file_size=found.size, identity=found.identity)
    with _opened(path, block_device=block_device) as descriptor:
        return inspect(descriptor, path=os.fspath(path), format=format, foreign=foreign)


@contextmanager
def _opened(path: str | os.PathLike[str], *, block_device: bool) -> Iterator[int]:
    shown = printable(os.fspath(path))
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(opened(path))
        except ValueError as error:
            raise ImageRefused(f"{shown} is not a path: {error}") from error
        except OSError as error:
            raise _cannot_open(shown, error) from error
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or (block_device and stat.S_ISBLK(mode))):
            kind = "a block device, which is not allowed here" if stat.S_ISBLK(mode) else "not a regular file"
            raise ImageRefused(f"{shown} is {kind}", hint="name an image file")
        yield descriptor


def is_empty(layer: Layer) -> bool:
    """Whether nothing was ever written to a layer: its L1 table is all zero and it holds no tag. Raw never is.

    A running QEMU may have a write under way that the file does not show yet.
    """
    if layer.format != "qcow2":
        return False
    with _opened(layer.path, block_device=False) as descriptor:
        found = inspect(descriptor, path=layer.path, format="qcow2")
        if found.internal_snapshots:
            return False
        try:
            table = os.pread(descriptor, found.l1_size * 8, found.l1_offset)
        except OSError as error:
            raise HostCannot(f"{printable(layer.path)} cannot be read: {error.strerror}") from error
    return not table.strip(b"\0")


def require(
    path: str | os.PathLike[str],
    *,
    format: Format,  # noqa: A002
    allowed: Sequence[Path] | None = None,
) -> Header:
    """Accept a foreign image only when it is what it is declared to be and lies where images may lie.

    Not for a raw layer a guest has already written to: the guest chooses its first bytes. Use ``read(format="raw")``.
    The last component of the path may not be a symlink. ``allowed``: folders it must lie in, directly or deeper; None
    when the caller has checked the place.
    """
    if image := RbdImage.parse(os.fspath(path)):
        raise ImageRefused(f"rbd:{image} is the disk of no machine here", hint="define a machine with it first")
    real = _inside(os.fspath(path), allowed)
    found = read(real, format=format, foreign=True)
    require_few_tags(path, found)
    return found


def require_few_tags(path: str | os.PathLike[str], found: Header) -> None:
    """Refuse an image with more snapshots inside than QEMU reads in any time, which it does whenever it opens it."""
    if found.internal_snapshots > MAX_TAGS:
        raise ImageRefused(
            f"image {printable(os.fspath(path))} has {found.internal_snapshots} internal snapshots, more than"
            f" {MAX_TAGS}, which QEMU takes too long to open",
            hint=printable(f"copy it without them: qemu-img convert -O qcow2 {shlex.quote(os.fspath(path))} NEW", 2000),
        )


def read_chain(
    path: str | os.PathLike[str],
    format: Format,  # noqa: A002
    *,
    allowed: Sequence[Path] | None,
    max_depth: int = MAX_DEPTH,
    storage: Storage = "file",
    known: Callable[[str], Storage] = lambda _: "file",
) -> list[FoundLayer]:
    """Follow the backing strings from the image at ``path`` down and return its layers, base first.

    What :func:`require` refuses of any layer is refused, and a loop, more than ``max_depth`` layers, and a backing
    format that is missing or neither raw nor qcow2. ``storage``: of the image at ``path``. What is said to be a file
    may be none only if it is ``known``, as a layer of some machine.
    """
    layers: list[FoundLayer] = []
    seen: set[tuple[int, int] | str] = set()
    place, pinned = os.fspath(path), format
    if not place.startswith(PREFIX):
        place = os.path.join(Path.cwd(), place)  # noqa: PTH118  Path would drop what QEMU keeps
    while True:
        if len(layers) == max_depth:
            raise ImageRefused(
                f"{printable(os.fspath(path))} has more than {max_depth} layers",
                hint="copy it into one image while it is not in use: "
                + printable(f"qemu-img convert -O qcow2 {shlex.quote(os.fspath(path))} NEW", 2000),
            )
        storage, header = _look(place, pinned, storage, allowed, known)
        if (file := header.identity or (header.device, header.inode)) in seen:
            raise ImageRefused(f"the chain of {printable(os.fspath(path))} loops at {printable(place)}")
        seen.add(file)
        layers.append(FoundLayer(path=place, format=pinned, header=header, storage=storage))
        if header.backing is None:
            return layers[::-1]
        pinned = _pinned_format(place, header)
        storage, above = "file", place
        place = header.backing
        if not place.startswith(PREFIX):
            place = os.path.join(os.path.dirname(above), place)  # noqa: PTH118, PTH120  nothing may be normalised


def _look(
    path: str,
    format: Format,  # noqa: A002
    storage: Storage,
    allowed: Sequence[Path] | None,
    known: Callable[[str], Storage],
) -> tuple[Storage, Header]:
    """What an image lies in, and its header."""
    if storage != "file":
        return storage, _no_file(path, storage)
    try:
        return storage, require(path, format=format, allowed=allowed)
    except ImageRefused:
        if (found := known(path)) == "file":
            raise
        return found, _no_file(path, found)


def _no_file(path: str, storage: Storage) -> Header:
    """What there is to know of a block device or an RBD image, which are always raw."""
    from qmpsnap.host import block_devices  # seldom needed

    if storage == "host_device" and block_devices.number_of(path) is None:
        if not os.path.exists(path):  # noqa: PTH110
            raise ImageRefused(f"there is no block device {printable(path)}")
        raise ImageRefused(f"{printable(path)} is not a block device", hint="name a file with 'image' instead")
    found = read(path, format="raw", block_device=True)
    if not found.identity:
        raise ImageRefused(
            f"block device {printable(path)} has no UUID, WWN or serial number that tells it from other devices",
            hint="give it a serial number, or use a logical volume on it",
        )
    return found


def _pinned_format(path: str, header: Header) -> Format:
    """The recorded format of the layer below, which must not be guessed."""
    if header.backing_format == "qcow2":
        return "qcow2"
    if header.backing_format == "raw":
        return "raw"
    backing = header.backing or ""
    hint = f"record it: qemu-img rebase -u -F qcow2 -b {shlex.quote(backing)} {shlex.quote(path)}  (or -F raw)"
    if header.backing_format is None:
        problem = "names a backing image without its format: raw or qcow2 would have to be guessed"
    else:
        problem = f"names a backing image of format {printable(header.backing_format)}, not raw or qcow2"
        # With its backing in it the image is one of qcow2 alone.
        hint = "flatten it while it is not in use: " + conversion(path, "qcow2").partition(": ")[2]
    raise ImageRefused(f"image {printable(path)} {problem}", hint=printable(hint, 2000))


def _inside(path: str, allowed: Sequence[Path] | None) -> Path:
    """The path with its folder resolved, once that folder is known to be an allowed one."""
    folder, name = os.path.split(path)
    try:
        real = Path(os.path.realpath(folder, strict=True)) / name
        inside = allowed is None or any(real.is_relative_to(os.path.realpath(place)) for place in allowed)
    except ValueError as error:
        raise ImageRefused(f"{printable(path)} is not a path: {error}") from error
    except OSError as error:
        raise _cannot_open(printable(path), error) from error
    if inside:
        return real
    assert allowed is not None
    places = ", ".join(str(place) for place in allowed) or "none"
    raise ImageRefused(
        f"image {printable(path)} is outside the allowed folders",
        hint=f"move it to an allowed folder ({places}), or allow its own with " + option("folders", "DIR"),
    )


def require_tellable(error: HostCannot | OSError) -> None:
    """Raise what tells of this process and not of a file: it has run out of descriptors or memory."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


def _cannot_open(shown: str, error: OSError) -> ImageRefused | HostCannot:
    """The error for an image that would not open."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO):
        return ImageRefused(f"there is no image {shown} ({error.strerror})")
    if error.errno == errno.ELOOP:
        return ImageRefused(f"{shown} is a symbolic link", hint="name the image file itself")
    return HostCannot(f"{shown} cannot be opened: {error.strerror}")
