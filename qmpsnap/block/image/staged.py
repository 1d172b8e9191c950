"""Images at paths that users choose: made beside, then named, and never confused with somebody else's file.

A file is made under the temporary name ``<name>.qs-<tag>.part``; once its identity is durable it gets the name the user
gave, which must be free. So it is always known whether a file at that name is qmpsnap's.
"""

import errno
import os
import stat
from pathlib import Path

from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.hint import option
from qmpsnap.host.files import FileId, opened, same_file, sync_folder
from qmpsnap.host.threads import runs_to_end


def part_of(path: str, tag: str) -> str:
    """Where the file is made; ``tag`` is nobody else's."""
    return f"{path}.qs-{tag}.part"


@runs_to_end
def put(part: str, path: str, file: FileId) -> None:
    """Give a finished file its name, durably."""
    try:
        os.link(part, path, follow_symlinks=False)
        if not _is(path, file):
            Path(path).unlink()  # the name that we have just given it; the file keeps its own
            raise StoreMismatch(f"{printable(part)} was replaced by another file; it was not touched")
        Path(part).unlink()
        sync_folder(Path(path).parent)
    except FileExistsError as error:
        raise taken(path) from error
    except OSError as error:
        hint = ""
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            hint = "that file system has no hard links: create the image yourself, then use " + option("reuse")
        raise HostCannot(f"{printable(path)} cannot be created: {error.strerror}", hint=hint) from error


@runs_to_end
def claim(part: str, path: str) -> None:
    """Give a finished file its name durably, and keep the temporary one, which distinguishes it from other files."""
    try:
        os.link(part, path, follow_symlinks=False)
        sync_folder(Path(path).parent)
    except FileExistsError as error:
        raise StateError(f"{printable(path)} exists already", hint="choose another name") from error
    except OSError as error:
        raise HostCannot(f"{printable(path)} cannot be created: {error.strerror}") from error


@runs_to_end
def make_durable(path: str, file: FileId) -> None:
    """Write a file out, and its name."""
    try:
        with opened(path) as descriptor:
            if not same_file(file, FileId.of(descriptor)):
                raise StoreMismatch(f"{printable(path)} was replaced by another file", effect="unknown")
            os.fsync(descriptor)
        sync_folder(Path(path).parent)
    except OSError as error:
        raise HostCannot(f"{printable(path)} cannot be synced: {error.strerror}", effect="unknown") from error


@runs_to_end
def discard(path: str, file: FileId) -> bool:
    """Remove the file at that name if it is the one meant; say whether it was."""
    if not _is(path, file):
        return False
    try:
        Path(path).unlink()
        sync_folder(Path(path).parent)
    except OSError as error:
        raise HostCannot(f"{printable(path)} cannot be removed: {error.strerror}") from error
    return True


def require_folder(path: str) -> None:
    """Make sure that the folder of an image is there, before the image passes for removed.

    Where it is not, as of a file system that is not mounted, the image would come back with that.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise HostCannot(
            f"{printable(path)} cannot be removed: there is no folder {printable(str(folder))}",
            hint="mount its file system or create the folder",
            effect="unknown",
        )


def _identity(path: str) -> FileId | None:
    """Identity of the regular file at that name, None if there is none."""
    try:
        with opened(path, os.O_PATH) as descriptor:
            return FileId.of(descriptor) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # it may be there, and then it is not gone
        raise HostCannot(f"{printable(path)} cannot be read: {error.strerror}", effect="unknown") from error


identity_of = runs_to_end(_identity)


def taken(path: str) -> StateError:
    """Something is at a name that should be free."""
    return StateError(
        f"{printable(path)} exists already",
        hint="choose another name, or overwrite that image with " + option("reuse"),
    )


def _is(path: str, file: FileId) -> bool:
    found = _identity(path)
    return found is not None and same_file(file, found)
