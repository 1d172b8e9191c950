"""Why a guest does not run although nobody has paused it, in words, and what helps."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Iterable

IO_ERROR = "io-error"
"""QAPI ``RunState``: a request of the guest failed in a way that QEMU pauses for (``werror``, ``rerror``)."""

SUSPENDED = "suspended"
"""QAPI ``RunState``: the guest has put itself to sleep (ACPI S3); ``system_wakeup`` or an alarm of its own wakes it."""

NO_SPACE = "paused: no space"
FAILED = "paused: I/O error"


def worded(status: str, io: Iterable[str]) -> str:
    """The run state as we call it, by QAPI ``RunState`` and the ``BlockDeviceIoStatus`` of every drive."""
    if status != IO_ERROR:
        return status
    return NO_SPACE if "nospace" in io else FAILED


def remedy(state: str, machine: str) -> str:
    """What lets a guest in this state run on, for a hint; empty for a state that is nobody's fault."""
    if state not in (NO_SPACE, FAILED, SUSPENDED):
        return ""
    from qmpsnap.hint import call

    if state == NO_SPACE:
        return "free some space for the disks' active layers, then " + call("resume", machine)
    if state == FAILED:
        return "repair the storage of the disks' active layers, then " + call("resume", machine)
    return call("wakeup", machine)
