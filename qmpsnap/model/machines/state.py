"""What a machine does, as its handle tells it."""

from enum import StrEnum


class State(StrEnum):
    """The run state of a machine: QEMU's own word for it (QAPI ``RunState``), or one of qmpsnap's.

    A state is equal to its text, as in ``state == "running"``. A word that a later QEMU has and that is not listed here
    is a state of that text.
    """

    RUNNING = "running"
    PAUSED = "paused"
    NO_SPACE = "paused: no space"
    """QEMU has paused the guest because a write found no space."""
    IO_ERROR = "paused: I/O error"
    """QEMU has paused the guest because another request to a disk failed."""
    SUSPENDED = "suspended"
    """The guest has put itself to sleep (ACPI S3)."""
    STOPPED = "stopped"
    """There is no QEMU."""
    UNKNOWN = "unknown"
    """A QEMU may run that this process cannot see, or it does not answer."""
    PRELAUNCH = "prelaunch"
    """Started with its vCPUs stopped."""
    SHUTDOWN = "shutdown"
    """The guest has ended and QEMU has not."""
    INTERNAL_ERROR = "internal-error"
    GUEST_PANICKED = "guest-panicked"
    WATCHDOG = "watchdog"
    DEBUG = "debug"
    COLO = "colo"
    INMIGRATE = "inmigrate"
    POSTMIGRATE = "postmigrate"
    FINISH_MIGRATE = "finish-migrate"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"

    @classmethod
    def _missing_(cls, value: object) -> "State | None":
        if not isinstance(value, str):
            return None
        later = str.__new__(cls, value)
        later._name_, later._value_ = value, value
        return later

    @property
    def has_qemu(self) -> bool:
        """Whether a QEMU that can be seen from here runs for the machine."""
        return self not in (State.STOPPED, State.UNKNOWN)

    @property
    def guest_runs(self) -> bool:
        """Whether the guest's vCPUs run."""
        return self is State.RUNNING

    @property
    def disk_failed(self) -> bool:
        """Whether QEMU has paused the guest over a request to a disk; ``resume()`` tries it again."""
        return self in (State.NO_SPACE, State.IO_ERROR)
