"""What the file of a frozen image was: a write to it changes one of these, whatever a clock says."""

from __future__ import annotations

from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpsnap.model.names import OperationId


class Stamp(Value):
    """A frozen image's file as it was recorded, or as it is.

    ``ctime_ns``: another one says nothing by itself, and has the digest compared; 0 where it was not recorded.
    ``digest``: of the header and the upper tables; empty where nobody has read them. ``since``: it counts for snapshots
    that were taken by this operation or a later one.
    """

    mtime_ns: int
    size: int
    ctime_ns: int = 0
    digest: str = ""
    since: int = 0


History = tuple[Stamp, ...]
"""Of one layer, oldest first: each but the first was another program's doing, and was told."""


def baseline(history: Iterable[Stamp], operation: OperationId) -> Stamp | None:
    """What a layer's file was when that operation took a snapshot that reads it; None where nobody knows."""
    return next((stamp for stamp in reversed(tuple(history)) if stamp.since <= operation), None)
