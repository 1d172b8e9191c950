"""Block devices, by what sysfs says: which one a node leads to whatever its number, and what of the kernel uses it.

A device's node is made anew with every boot, and its number is given to the next one; a volume's name under
``/dev/VG`` is a link to whatever number it has now.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

    from qmpsnap.host.files import Name

_UUID: Final = 32
"""Characters of an LVM UUID without its hyphens."""


def number_of(path: Name) -> int | None:
    """The number of the device that a name leads to, links followed; None where that is no block device."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None


# --- which one it is --------------------------------------------------------------------------------------------------


def identity(number: int) -> str:
    """What tells a device from all others from boot to boot; empty where it has nothing like that.

    Of a logical volume ``lvm:`` and the UUID that ``lvs`` prints.
    """
    folder = _folder(number)
    if part := _said(f"{folder}/partition"):
        whole = _said(f"{os.path.dirname(folder)}/dev")  # noqa: PTH120
        known = identity(_number(whole)) if whole else ""
        return f"{known}-part{part}" if known else ""
    if uuid := _said(f"{folder}/dm/uuid"):
        return _lvm(uuid) or f"dm:{uuid}"
    if file := _said(f"{folder}/loop/backing_file"):
        return f"loop:{file}@{_said(f'{folder}/loop/offset')}"
    if image := _said(f"{folder}/device/image_id"):
        return f"rbd:{_said(f'{folder}/device/cluster_fsid')}/{_said(f'{folder}/device/pool_id')}/{image}"
    return (
        _said(f"{folder}/wwid", before="wwn:")
        or _said(f"{folder}/device/wwid", before="wwn:")
        or _said(f"{folder}/serial", before="serial:")
        or _by_udev(number)
    )


def _lvm(uuid: str) -> str:
    """A logical volume's UUID as LVM prints it; empty for what is none, or a part of one."""
    known = uuid.removeprefix("LVM-")
    if known == uuid or len(known) != 2 * _UUID:
        return ""
    own = known[_UUID:]
    return f"lvm:{own[:6]}-" + "-".join(own[at : at + 4] for at in range(6, 26, 4)) + f"-{own[26:]}"


def _by_udev(number: int) -> str:
    """The first of the names that udev has given a device for its serial number."""
    links = []
    for line in _said(f"/run/udev/data/b{os.major(number)}:{os.minor(number)}").splitlines():
        if line.startswith("E:ID_WWN="):
            return f"wwn:{line.removeprefix('E:ID_WWN=')}"
        if line.startswith("S:disk/by-id/"):
            links.append(line.removeprefix("S:disk/by-id/"))
    return f"by-id:{min(links)}" if links else ""


# --- what uses it -----------------------------------------------------------------------------------------------------


def holders(number: int) -> tuple[str, ...]:
    """What of this host uses a device but processes: file systems, swap, other devices; for a sentence.

    A file system of another mount namespace, or what has no name, is told by the kernel's refusal alone.
    """
    numbers = {number, *_parts(number)}
    found = [*_mounts(numbers), *_swaps(numbers)]
    above = sorted(name for each in numbers for name in _names(f"{_folder(each)}/holders"))
    found += [f"device /dev/{_said(f'/sys/block/{name}/dm/name', before='mapper/') or name}" for name in above]
    for device in sorted(name for name in _names("/sys/block") if name.startswith("loop")):
        file = _said(f"/sys/block/{device}/loop/backing_file")
        if file and number_of(file) in numbers:
            found.append(f"device /dev/{device}")
    return tuple(dict.fromkeys(found))


def is_claimed(path: Name) -> bool:
    """Whether the kernel refuses a device to an exclusive user, as it is one of itself: mounted, or in another device.

    QEMU and LVM's tools are none.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _mounts(numbers: set[int]) -> Iterator[str]:
    for line in _said("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        # Some file systems have a number that is no device's.
        if _number(fields[2]) in numbers or (
            (source := after.split()[1]).startswith("/") and number_of(source) in numbers
        ):
            place = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
            yield f"the file system that is mounted at {place}"


def _swaps(numbers: set[int]) -> Iterator[str]:
    for line in _said("/proc/swaps").splitlines()[1:]:
        if number_of(line.split()[0]) in numbers:
            yield "swap"


def _parts(number: int) -> Iterator[int]:
    folder = _folder(number)
    for name in _names(folder):
        if _said(f"{folder}/{name}/partition"):
            yield _number(_said(f"{folder}/{name}/dev"))


def _folder(number: int) -> str:
    return os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def _number(text: str) -> int:
    major, _, minor = text.partition(":")
    return os.makedev(int(major), int(minor))


def _said(file: str, *, before: str = "") -> str:
    """What a file of the kernel's or of udev's says, after ``before``; empty where it is not there or says nothing."""
    with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="surrogateescape") as text:  # noqa: PTH123
        if said := text.read().strip():
            return before + said
    return ""


def _names(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)  # noqa: PTH208
    return []
