"""Which machines have a record beside their images: names alone, for what must be quick."""

from __future__ import annotations

import errno
import os

from qmpsnap.errors import HostCannot
from qmpsnap.model.places import RECORD

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from qmpsnap.host.files import Name


def earlier(machines: Name) -> str:
    """The folder that an earlier release kept the records in."""
    return f"{os.path.dirname(machines)}/records"  # noqa: PTH120


def names(machines: Name) -> tuple[str, ...]:
    """The machines that have a record.

    Args:
        machines: the folder with the machines' folders.

    Raises:
        HostCannot: no right to look.
    """
    found = {name for name in _listed(machines) if _may_be_there(f"{os.fspath(machines)}/{name}/{RECORD}")}
    before = {name.removesuffix(".json") for name in _listed(earlier(machines)) if name.endswith(".json")}
    return tuple(sorted(found | before))


def unreadable(folder: Name, error: OSError) -> HostCannot:
    """The error for a folder of records."""
    return HostCannot(
        f"{folder} cannot be read: {error.strerror}",
        hint="let this user read it and its content",
    )


def _listed(folder: Name) -> list[str]:
    try:
        return os.listdir(os.fspath(folder))  # noqa: PTH208 - as text
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error


def _may_be_there(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True
