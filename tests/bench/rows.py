"""The rows of the comparison, as data: what is measured, against what, and what is to be reached."""

from dataclasses import dataclass

QMPSNAP, LIBRARY = "qmpsnap", "library"
SNAPSHOT_LIST = ("virsh", "virsh snapshot-list")

UNITS = {"wall": "ms", "cpu": "ms CPU", "pause": "ms pause", "memory": "MB"}


@dataclass(frozen=True)
class Row:
    """One line: the median of one way of a measure, beside that of another."""

    measure: str
    """What ``--only`` chooses it by."""
    what: str
    way: str = QMPSNAP
    against: tuple[str, str] | None = None
    """The other way, and what it is in words; ``other measure/way`` where it belongs to another one."""
    ratio: float | None = None
    """What this way may take at most, as a part of what the other takes."""
    most: float | None = None
    """What it may take at most, in the quantity's unit."""
    quantity: str = "wall"

    @property
    def other(self) -> tuple[str, str] | None:
        """Measure and way of what it is compared with."""
        if self.against is None:
            return None
        measure, _, way = self.against[0].rpartition("/")
        return measure or self.measure, way


_FLOOR = 55 / 40
"""The goal is 55 ms where the interpreter alone takes 40; on another host both are other."""


def _reading(measure: str, command: str) -> tuple[Row, ...]:
    large, small = "in a store of 10,000 snapshots", ("qmpsnap", "with 10 snapshots")
    ratio, most = _LARGE.get(measure, (None, None))
    return (
        Row(measure, f"`{command}`", against=SNAPSHOT_LIST, ratio=2.5),
        Row(measure, f"`{command}`", against=("floor/python", "the interpreter alone"), ratio=_FLOOR, quantity="cpu"),
        Row(measure, f"`{command}` {large}", way="large", against=small, ratio=ratio, most=most),
        Row(measure, f"`{command}` {large}", way="large", against=small, most=60, quantity="memory"),
    )


_LARGE: dict[str, tuple[float | None, float | None]] = {"list": (1.5, None), "tree": (None, 100)}
"""What is to be reached in a large store: a ratio, or milliseconds."""
_BARE_LOAD = ("bare", "bare `snapshot-load`")
_BARE_BOTH = ("bare", "bare `snapshot-save`, `snapshot-load`")
_COMMIT, _PULL = ("virsh", "virsh blockcommit --wait"), ("virsh", "virsh blockpull --wait")

ROWS = (
    *_reading("list", "list"),
    *_reading("snapshot-list", "snapshot list"),
    *_reading("tree", "tree"),
    Row("create", "`snapshot create`", against=("virsh", "virsh snapshot-create-as --disk-only --atomic"), ratio=2.5),
    *(
        Row(f"create-depth-{depth}", f"the same by the library, depth {depth}", LIBRARY, ("bare", "bare script"), 1.3)
        for depth in (1, 5, 10, 100, 200)
    ),
    Row("create-large-store", "the same, stopped, in a store of 10,000", "large", ("empty", "in an empty store"), 1.2),
    Row("commit", "`commit` of 64 KiB", against=_COMMIT, ratio=2.5),
    Row("commit", "the same by the library", LIBRARY, _COMMIT, 0.6),
    Row("stream", "`stream` of 64 KiB", against=_PULL, ratio=2.5),
    Row("stream", "the same by the library", LIBRARY, _PULL, 0.6),
    Row("commit-1g", "`commit` of 1 GiB", against=("bare", "bare script"), ratio=1.02),
    Row("commit-1g", "`commit` of 1 GiB", against=_COMMIT, ratio=1.02),
    Row("stream-1g", "`stream` of 1 GiB", against=("bare", "bare script"), ratio=1.02),
    Row("stream-1g", "`stream` of 1 GiB", against=_PULL, ratio=1.02),
    Row(
        "full", "`snapshot create --kind full`", against=("virsh", "virsh snapshot-create-as --memspec --live"), ratio=1
    ),
    Row("full", "its pause", against=("virsh", "virsh"), quantity="pause"),
    Row("revert", "`snapshot revert` until the agent answers", against=("virsh", "virsh restore, likewise"), ratio=0.9),
    Row("load", "revert to an internal one, library", LIBRARY, _BARE_LOAD, 1.2),
    Row("load-kept", "the same, keeping the present", LIBRARY, _BARE_BOTH, 1.2),
    Row("fifty", "snapshots of 50 machines at once, library", LIBRARY, ("bare", "50 scripts, one process"), 1.3),
    Row("fifty", "snapshots of 50 machines at once, library", LIBRARY, ("processes", "50 processes"), 1.3),
    Row("start", "start under -S, library", LIBRARY, ("bare", "QEMU until its greeting"), 1.5),
    Row("start", "start under -S, library", LIBRARY, ("answer", "QEMU until it answers"), 1.5),
)
