"""Every error qmpsnap raises, and the exit code each family owns.

::

    QmpsnapError                    1  anything without a family of its own
     ├── UsageError                 2  the request itself is wrong
     │    ├── NameRefused           2  a name outside [a-z0-9][a-z0-9._-]{0,62}
     │    ├── SpecError             2  a machine spec, with file:line:column
     │    └── ImageRefused          2  an image of another format than declared, or not allowed
     ├── NotFoundError              3  no such machine, snapshot, disk or layer
     ├── StateError                 4  understood, but not in this state
     │    ├── NameTaken             4
     │    ├── NumberTaken           4  another operation got the number that a plan was made with
     │    ├── ImageInUse            4  another program has an image open
     │    ├── LockHeld              4  another controller works on the machine
     │    ├── JobCancelled          4  the program cancelled the job that it waits for
     │    └── ForeignHost           4  the machine belongs to another host
     ├── QemuGone                   5  QEMU or its monitor is not there (any more)
     ├── DeadlinePassed             6  our wait ended; the effect may be unknown
     │    └── StorageHangs          6  a request to a file has not been answered
     ├── StoreMismatch              7  store, QEMU and disk disagree
     │    ├── StoreTooNew           7  written by a newer qmpsnap
     │    └── LayersCircular        7  recorded layers that read one another in a circle
     ├── OperationPending           8  an earlier operation has to be recovered first
     ├── HostCannot                 9  a program, a right or space is missing
     │    └── HomeUntrusted         9  another user can write to the home
     ├── Interrupted              130  by Ctrl-C, at the command line only
     └── QmpError                   1  QEMU refused a command (carries QEMU's class)
          └── ProcessError          1  a command in the guest ended with another exit status than 0

``message`` says what failed, ``effect`` whether anything changed (``none``, ``applied`` or ``unknown``), ``left`` what
is otherwise now, and ``hint`` what to do next. No message speaks of the effect: ``sentence`` adds it, but for the two
families that say of themselves that nothing was begun, usage and not found. ``str(error)`` adds the hint, with the
calls of the Python API; other front ends write its verbs as their users type them (:mod:`qmpsnap.hint`).
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from typing import ClassVar

    from qmpsnap.effect import Effect


class QmpsnapError(Exception):
    """The root: catch this to catch everything qmpsnap raises on purpose.

    Attributes:
        message: what failed.
        effect: whether the failed call changed anything.
        left: what is otherwise now, where it is not only what was asked for; empty unless something is.
        hint: what to do next, a :class:`~qmpsnap.hint.Hint` where that is a verb; empty if nothing helps.
        machine: the machine's name, where the error is about one.
        operation: the id of the journalled operation, where there was one.
        qmp_class: QEMU's error class, where QEMU said no.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"
    _untouched: ClassVar[str] = "nothing was changed"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        effect: Effect = "none",
        machine: str | None = None,
        operation: str | None = None,
        qmp_class: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.effect: Effect = effect
        self.left = ""
        self.machine = machine
        self.operation = operation
        self.qmp_class = qmp_class

    def __str__(self) -> str:
        """The sentence, and the hint on a line of its own."""
        return f"{self.sentence}\nhint: {self.hint}" if self.hint else self.sentence

    @property
    def sentence(self) -> str:
        """The message and its outcome, in one sentence."""
        said = {"none": self._untouched, "applied": self.left, "unknown": ""}[self.effect]
        return f"{self.message}; {said}" if said else self.message

    def claim(self, effect: Effect, left: str = "") -> None:
        """Set the outcome, as it was found; an outcome set before is replaced.

        Args:
            effect: whether anything was changed.
            left: what else has changed, beyond the request itself.
        """
        self.effect, self.left = effect, left

    def add(self, also: str) -> None:
        """Say one thing more of what failed."""
        self.message = f"{self.message}; {also}"

    def as_dict(self) -> dict[str, str | None]:
        """The error as a service may answer it, with the sentence as its message."""
        return {
            "code": self.code,
            "message": self.sentence,
            "hint": str(self.hint),
            "effect": self.effect,
            "machine": self.machine,
            "operation": self.operation,
            "qmp_class": self.qmp_class,
        }


class Interrupted(QmpsnapError):
    """Ctrl-C; the message says what became of the operation. A program gets its own cancellation instead."""

    exit_code = 130
    code = "interrupted"


class UsageError(QmpsnapError):
    """The request is wrong as it stands, whatever the machine's state."""

    exit_code = 2
    code = "usage"
    _untouched = ""


class NameRefused(UsageError):
    """A name that qmpsnap does not allow."""

    code = "bad-name"


class SpecError(UsageError):
    """A machine spec that cannot be used; the message starts with ``file:line:column:``."""

    code = "bad-spec"


class ImageRefused(UsageError):
    """An image whose header, size or place is not acceptable."""

    code = "bad-image"


class NotFoundError(QmpsnapError):
    """There is no machine, snapshot, disk or layer of that name."""

    exit_code = 3
    code = "not-found"
    _untouched = ""


class StateError(QmpsnapError):
    """A request that is fine in itself but refused in the present state."""

    exit_code = 4
    code = "refused"


class NameTaken(StateError):
    """The name is in use."""

    code = "name-taken"


class NumberTaken(StateError):
    """Another operation got the number that a plan was made with; told only where that went on and on."""

    code = "number-taken"


class ImageInUse(StateError):
    """Another program writes to an image, or reads one that would change; the message says which program."""

    code = "image-used"


class LockHeld(StateError):
    """Another controller holds the machine's lock; the message says who and since when."""

    code = "locked"


class JobCancelled(StateError):
    """``job.cancel()`` ended the job that is awaited; ``effect`` says whether its operation was undone."""

    code = "cancelled"


class ForeignHost(StateError):
    """The machine is another host's."""

    code = "foreign-host"


class QemuGone(QmpsnapError):
    """QEMU is not running, ended, or its monitor closed."""

    exit_code = 5
    code = "qemu-gone"


class DeadlinePassed(QmpsnapError):
    """We stopped waiting. If a command was under way, its effect is ``unknown``."""

    exit_code = 6
    code = "deadline"


class StorageHangs(DeadlinePassed):
    """A thread that waits for a file was abandoned; its machine stays locked until the thread returns.

    Attributes:
        path: the file, where that could be told.
    """

    code = "storage-hangs"

    def __init__(self, message: str, *, path: str = "", hint: str = "", effect: Effect = "none") -> None:
        super().__init__(message, hint=hint, effect=effect)
        self.path = path


class StoreMismatch(QmpsnapError):
    """Store, QEMU's graph and the headers on disk do not say the same."""

    exit_code = 7
    code = "mismatch"


class StoreTooNew(StoreMismatch):
    """The store's schema is newer than this qmpsnap."""

    code = "store-too-new"


class LayersCircular(StoreMismatch):
    """Layers are recorded to read one another in a circle, which no image can."""

    code = "store-circular"


class OperationPending(QmpsnapError):
    """An earlier operation did not settle and could not be recovered by itself."""

    exit_code = 8
    code = "pending"


class HostCannot(QmpsnapError):
    """The host lacks a program, a right, a device or space."""

    exit_code = 9
    code = "host"


class HomeUntrusted(HostCannot):
    """The home belongs to another user, or another can write to it, who could have QEMU run anything as this one."""

    code = "home-untrusted"


class QmpError(QmpsnapError):
    """QEMU, or the agent in its guest, said no, or a job has failed; ``effect`` says what that has changed."""

    code = "qmp"


class ProcessError(QmpError):
    """A command in the guest ended with another exit status than 0.

    Attributes:
        exit_status: its exit status, or 128 + the signal that killed it.
        stdout: what it wrote there, as text or bytes, as asked for.
        stderr: the same of stderr.
    """

    code = "process"

    def __init__(
        self, message: str, *, exit_status: int, stdout: str | bytes, stderr: str | bytes, machine: str | None = None
    ) -> None:
        super().__init__(message, effect="applied", machine=machine)
        self.exit_status = exit_status
        self.stdout = stdout
        self.stderr = stderr
