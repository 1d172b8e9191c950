"""What every source is read into: a spec, what of the original is otherwise or missing, and its snapshots."""

import re
from collections.abc import Collection, Iterable
from typing import Final

from msgspec import Struct

from qmpsnap.errors import UsageError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import DISK_NAME, NAME

MIB: Final = 1 << 20
MAX_BYTES: Final = 1 << 20
"""A larger description is refused unread: no manager writes one."""
NO_KERNEL: Final = "boots a disk"

_LONGEST: Final = 63


class Frozen(Struct, frozen=True):
    """An image that holds a disk's content of a snapshot's moment.

    ``above``: the image that was put on it then; where the two are no neighbours any more, one of them was merged.
    """

    path: str
    above: str


class Moment(Struct, frozen=True, kw_only=True):
    """A snapshot as its manager tells of it.

    Attributes:
        name: what it will be called here.
        original: what its manager calls it; also the tag, where it lies inside the images.
        parent: the manager's name of the one before.
        created: seconds since the epoch, UTC.
        frozen: by disk; for those that lie outside of the images.
        inside: the disks that have it as a tag; where both are told, the files decide.
        memory: it has the guest's memory, which only the devices of the original fit.
        why_not: why it cannot become a snapshot, as far as its description tells; empty if it may.
    """

    name: str
    original: str
    parent: str | None = None
    created: float
    description: str = ""
    mode: str = "stopped"
    current: bool = False
    frozen: dict[str, Frozen] = {}
    inside: tuple[str, ...] = ()
    memory: bool = False
    why_not: str = ""


class Imported(Struct, frozen=True, kw_only=True):
    """A machine as its description tells of it.

    Attributes:
        origin: what it was, in words.
        spec: what it is here.
        changed: what the guest finds otherwise, a sentence each.
        left_out: what it does not find at all; no text that may be a secret.
        moments: its snapshots, oldest first.
        runs: how the description tells that the original runs; empty if it does not.
    """

    origin: str
    spec: MachineSpec
    changed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    moments: tuple[Moment, ...] = ()
    runs: str = ""


def machine_name(wanted: str, given: str | None) -> str:
    """The name that was asked for, else the nearest to the original's."""
    return given or plain_name(wanted, taken=(), fallback="imported")


def plain_name(text: str, *, taken: Collection[str], fallback: str) -> str:
    """The nearest name that is allowed and free."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:_LONGEST]
    name = name if NAME.match(name) else fallback
    numbered = (f"{name[: _LONGEST - 5]}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def disk_name(wanted: str, *, taken: Collection[str]) -> str:
    """The original's name of a disk where it is allowed and free, else the next of ``vda``, ``vdb`` ..."""
    name = wanted.lower()
    if DISK_NAME.match(name) and name not in taken:
        return name
    letters = "abcdefghijklmnopqrstuvwxyz"
    spare = [f"vd{letter}" for letter in letters] + [f"vd{first}{second}" for first in letters for second in letters]
    return next(other for other in spare if other not in taken)


def oldest_first(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """In the order of their times, and none before its parent: times have whole seconds."""
    waiting = sorted(moments, key=lambda moment: moment.created)
    known = {moment.original for moment in waiting}
    found: list[Moment] = []
    while waiting:
        done = {moment.original for moment in found}
        ready = [one for one in waiting if one.parent not in known or one.parent in done]
        found.append((ready or waiting)[0])  # parents that go round in a circle order nothing
        waiting.remove(found[-1])
    return tuple(found)


def text_of(data: bytes, source: str) -> str:
    """A description as text, once it has a reasonable size."""
    require_small(data, source)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 text", hint="save the file as UTF-8") from error


def require_small(data: bytes, source: str) -> None:
    """Refuse what no manager writes."""
    if len(data) > MAX_BYTES:
        raise UsageError(f"{source} is larger than {MAX_BYTES >> 20} MiB: no description of a machine is")


def whole_mib(size: int) -> int:
    """The memory in bytes, in whole MiB as a spec has it; rounded up."""
    return max(1, -(-size // MIB)) * MIB
