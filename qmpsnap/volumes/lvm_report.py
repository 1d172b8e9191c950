"""What LVM's programs are told and what they answer: argument lists out, values in.

Volume groups and volumes are given as ``GROUP/VOLUME``, whose characters are checked, behind all options.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, Self

import msgspec
from msgspec import Struct

from qmpsnap.errors import HostCannot, UsageError
from qmpsnap.model.text import printable
from qmpsnap.volumes.names import VolumeName

PART: Final = ".part"
"""Ends the name of a volume that is still being copied to."""

_NAME: Final = r"(?!\.\.?/|\.\.?\Z)[A-Za-z0-9_+.][A-Za-z0-9_+.-]{0,126}"
"""As lvm(8) allows it; what begins with a hyphen is an option."""
_PATH: Final = re.compile(rf"/dev/({_NAME})/({_NAME})\Z")
_THICK: Final = re.compile(r"([1-9][0-9]{0,2})%|([1-9][0-9]{0,11})([MGT])\Z")
_SUFFIX: Final = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_COLUMNS: Final = (
    "lv_uuid,lv_name,lv_size,lv_attr,origin_uuid,origin_size,pool_lv_uuid,data_percent,metadata_percent,"
    "lv_metadata_size,vg_free,vg_extent_size"
)
_CHUNK: Final = 4096
"""Bytes that a thick snapshot copies at once, by default."""
_MAPPED: Final = _CHUNK // 16
"""Chunks that a chunk of its table names."""


class Place(Struct, frozen=True):
    """A volume's name."""

    group: str
    volume: str

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """The volume of a path ``/dev/GROUP/VOLUME``; None where it has another form."""
        found = _PATH.match(path)
        return cls(found[1], found[2]) if found else None

    @property
    def path(self) -> str:
        """As QEMU opens it."""
        return f"/dev/{self.group}/{self.volume}"

    def __str__(self) -> str:
        return f"{self.group}/{self.volume}"


class LogicalVolume(Struct, frozen=True, kw_only=True):
    """One volume, as ``lvs`` prints it: every value is text, and empty where it does not apply."""

    lv_uuid: str
    lv_name: str
    lv_size: str
    lv_attr: str
    origin_uuid: str
    origin_size: str
    pool_lv_uuid: str
    data_percent: str
    metadata_percent: str
    lv_metadata_size: str
    vg_free: str
    vg_extent_size: str

    @property
    def identity(self) -> str:
        """What tells it from all others, as layers have it."""
        return f"lvm:{self.lv_uuid}"

    @property
    def size(self) -> int:
        """Bytes: of a thick snapshot those that it has for what changes."""
        return int(self.lv_size)

    @property
    def seen(self) -> int:
        """Bytes that whoever opens it sees."""
        return int(self.origin_size) if self.is_thick_snapshot else self.size

    @property
    def free(self) -> int:
        """Bytes of its group that no volume has."""
        return int(self.vg_free)

    @property
    def extent(self) -> int:
        """Bytes by which volumes of its group grow."""
        return int(self.vg_extent_size)

    @property
    def is_thin(self) -> bool:
        """Whether it shares a pool's blocks."""
        return self.lv_attr[0] == "V"

    @property
    def is_thick_snapshot(self) -> bool:
        """Whether it keeps the blocks that change in another volume."""
        return self.lv_attr[0] in "sS"

    @property
    def is_invalid(self) -> bool:
        """Whether it is a thick snapshot that has run full; an inactive one does not tell."""
        return self.is_thick_snapshot and self.lv_attr[4] in "IS"

    @property
    def is_merging(self) -> bool:
        """Whether a snapshot is being merged into it, which is not listed any more."""
        return self.lv_attr[0] == "O"

    @property
    def is_open(self) -> bool:
        """Whether a process or another device has it open."""
        return self.lv_attr[5] == "o"

    @property
    def full(self) -> float:
        """How much of its data space is used, from 0 to 1; 0 where it is inactive."""
        return float(self.data_percent or 0) / 100

    @property
    def mapped(self) -> int:
        """Bytes that a thin volume has in its pool, at most: two digits of their share are all that is known."""
        share = min(1.0, self.full + 0.0001) if self.data_percent else 1.0
        return math.ceil(self.size * share)

    def refusal(self) -> str:
        """Why it is none that a guest's disk can lie on and be snapshotted; empty where it is one."""
        return _REFUSED.get(self.lv_attr[0], "")


_REFUSED: Final = {
    "s": "is a snapshot itself, of which LVM takes none",
    "S": "is a snapshot that is being merged",
    "O": "has a snapshot that is being merged into it",
    "c": "is being converted",
} | dict.fromkeys("tTdDeiIlpv", "is a part of other volumes")
"""By the first character of its attributes, see lvs(8)."""


class _Volumes(Struct, frozen=True):
    lv: list[LogicalVolume]


class _Report(Struct, frozen=True):
    report: list[_Volumes]


def parse(stdout: bytes) -> dict[str, LogicalVolume]:
    """The volumes that ``lvs`` has printed, by name."""
    try:
        report = msgspec.json.decode(stdout, type=_Report)
    except msgspec.DecodeError as error:
        raise HostCannot(f"lvs answers what is not understood: {printable(stdout)}") from error
    return {volume.lv_name: volume for part in report.report for volume in part.lv}


# --- argument lists ---------------------------------------------------------------------------------------------------


def list_volumes(group: str) -> list[str]:
    """All volumes of a group."""
    return ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "--options", _COLUMNS, "--", group]


def thin_snapshot(origin: Place, name: str) -> list[str]:
    """One that nobody can write to, active now; no boot activates it."""
    active = ["--setactivationskip", "y", "--activate", "y", "--ignoreactivationskip"]
    return [*_create(name), "--snapshot", "--permission", "r", *active, "--", str(origin)]


def activate(places: Sequence[Place]) -> list[str]:
    """Volumes of one group, also those that a boot skips."""
    names = [str(place) for place in places]
    return ["lvchange", "--activate", "y", "--ignoreactivationskip", "--", *names]


def thick_snapshot(origin: Place, name: str, size: int) -> list[str]:
    """One that is active as long as its origin is."""
    return [*_create(name), "--snapshot", "--permission", "r", "--size", f"{size}b", "--", str(origin)]


def thin_clone(snapshot: Place, name: str) -> list[str]:
    """One that can be written to, and is active after a boot."""
    options = ["--snapshot", "--permission", "rw", "--setactivationskip", "n", "--activate", "y"]
    return [*_create(name), *options, "--", str(snapshot)]


def plain_volume(group: str, name: str, size: int) -> list[str]:
    """One with any content."""
    return [*_create(name), "--wipesignatures", "n", "--zero", "n", "--size", f"{size}b", "--", group]


def extend(place: Place, size: int) -> list[str]:
    """A larger size."""
    return ["lvextend", "--size", f"{size}b", "--", str(place)]


def merge(snapshot: Place) -> list[str]:
    """Into its origin; a process that it leaves behind removes the snapshot at the end."""
    return ["lvconvert", "--yes", "--merge", "--background", "--interval", "1", "--", str(snapshot)]


def refresh(origin: Place) -> list[str]:
    """Begin a merge that was deferred, and have a process watch it."""
    return ["lvchange", "--refresh", "--", str(origin)]


def rename(place: Place, name: str) -> list[str]:
    """Another name in the same group."""
    return ["lvrename", "--", place.group, place.volume, name]


def remove(group: str, uuid: str) -> list[str]:
    """The volume with this UUID, whatever its name; none that has thick snapshots, which would go with it."""
    return ["lvremove", "--yes", "--select", f'lv_uuid="{uuid}" && lv_role!={{thickorigin}}', "--", group]


def _create(name: str) -> list[str]:
    return ["lvcreate", "--yes", "--name", name]


# --- sizes ------------------------------------------------------------------------------------------------------------


def require_setting(setting: str) -> "re.Match[str]":
    """The parts of a setting of :func:`thick_size`; ``UsageError`` where it is none."""
    found = _THICK.fullmatch(setting)
    if found is None:
        raise UsageError(
            f"{printable(setting)} is no size of a thick LVM snapshot",
            hint="use a share of the disk, as 20%, or a size, as 500M, 10G or 1T",
        )
    return found


def thick_size(setting: str, origin: int, extent: int) -> int:
    """Bytes of a thick snapshot, in whole extents; never more than it could use.

    Args:
        setting: ``20%`` of what the origin has, or ``500M``, ``10G``, ``1T``.
        origin: the origin's bytes.
        extent: the group's.
    """
    found = require_setting(setting)
    chunks = -(-origin // _CHUNK)
    whole = (chunks + -(-chunks // _MAPPED) + 2) * _CHUNK
    wanted = whole * int(found[1]) // 100 if found[1] else int(found[2]) * _SUFFIX[found[3]]
    return -(-min(wanted, whole) // extent) * extent


# --- what they answer -------------------------------------------------------------------------------------------------


def last_line(stderr: bytes) -> str:
    """What a program said of its failure, without the warnings before it."""
    lines = [line.strip() for line in stderr.decode("utf-8", "backslashreplace").splitlines()]
    said = [line for line in lines if line and not line.startswith("WARNING:")]
    return printable(said[-1]) if said else "it does not say why"


def ours(volumes: Mapping[str, LogicalVolume], machine: str) -> list[tuple[VolumeName, LogicalVolume]]:
    """The snapshots and clones of a machine, by their names; parts as well."""
    named = ((VolumeName.parse(name.removesuffix(PART)), volume) for name, volume in sorted(volumes.items()))
    return [(name, volume) for name, volume in named if name and name.machine == machine.replace("-", "")]
