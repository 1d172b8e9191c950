"""The journal's steps: for every kind of operation, what is durable at each step and how recovery ends it from there.

The store refuses a step that is not listed here, and ``scripts/faults`` kills qmpsnap at every step that is, so no step
goes untested. Steps of a merge contain the number of their job (``0:started``), those of a mirror the identity of its
file (``made:64769:1234``), both sometimes a note (``:running``, or the state of the file that will be written to); here
they are ``N:started`` and ``made:FILE``.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

PLANNED: Final = "planned"
SETTLED: Final = "settled"
# create
TRANSACTION: Final = "transaction"
SAVING: Final = "saving"
CLONING: Final = "cloning"
LOST: Final = "memory lost"
ENDING: Final = "ending"
# internal; of merges and mirrors these are phases, see :func:`of_job` and :func:`of_file`
STARTED: Final = "started"
RECORDED: Final = "recorded"
# fork
BAKING: Final = "baking"
# load
KEEPING: Final = "keeping"
LOADING: Final = "loading"
LOADED: Final = "loaded"
# revert
STOPPING: Final = "stopping"
MERGING: Final = "merging"
SWITCHED: Final = "switched"
STARTING: Final = "starting"
# resize
RESIZING: Final = "resizing"
# flatten
COPYING: Final = "copying"
# disk-attach
PLUGGING: Final = "plugging"
# disk-detach
UNPLUGGING: Final = "unplugging"
# rename
MOVING: Final = "moving"
# phases of a block job
MADE: Final = "made"
FINALIZING: Final = "finalizing"
# merge
UNDONE: Final = "undone"


class Step(Struct, frozen=True):
    """One step; ``means`` says which facts hold once it is durable, and what recovery does from there."""

    name: str
    means: str


_MERGE: Final = (
    Step(PLANNED, "the operation is recorded and no job has started: roll back"),
    Step("N:started", "the job may have written, the vCPUs may be paused; its source is still valid: roll back"),
    Step(
        "N:finalizing",
        "both sides are equal, the vCPUs may be paused: roll forward, or rewrite headers if QEMU is gone",
    ),
    Step("N:settled", "the change is recorded: dismiss the job, close nodes, remove files; later jobs only on request"),
    Step(UNDONE, "the changes recorded at its opening are reverted: roll back"),
    Step(SETTLED, "nothing is left to do"),
)
_MERGE_ALONE: Final = tuple(step for step in _MERGE if step.name != UNDONE)
"""For verbs whose opening records nothing that can be reverted: a stream, and a delete, whose names are gone."""

STEPS: Final[dict[str, tuple[Step, ...]]] = {
    "define": (
        Step(PLANNED, "unused files may exist: roll back"),
        Step(SETTLED, "the machine exists"),
    ),
    "fork": (
        Step(PLANNED, "unused overlays may exist: roll back"),
        Step(BAKING, "a template is being made, perhaps by a QEMU without a guest: end that, remove it, roll back"),
        Step(
            STARTING,
            "the machine exists, and its QEMU may be starting: roll forward; one that has loaded its memory keeps"
            " running, an ephemeral one without a QEMU is removed",
        ),
        Step(SETTLED, "the machine exists"),
    ),
    "undefine": (
        Step(PLANNED, "the machine is undefined; some of its files may be left: roll forward"),
        Step(SETTLED, "the files are removed, or the reason is noted"),
    ),
    "create": (
        Step(PLANNED, "overlays may exist and be open; the guest does not write to them: roll back"),
        Step(
            TRANSACTION, "QEMU may write to the overlays, or a chosen path may be the file's only name: QEMU is asked"
        ),
        Step(SAVING, "the memory is captured and being written while the guest runs: roll forward if it is complete"),
        Step(
            CLONING,
            "the storage makes snapshots of the images below the overlays: roll forward if all are complete, else they"
            " are removed; disks stay on their overlays",
        ),
        Step(
            LOST, "the disks are on their overlays; memory or UEFI variables are lost: keep layers, drop the snapshot"
        ),
        Step(ENDING, "the snapshot exists; QEMU still has to end: roll forward"),
        Step(SETTLED, "the snapshot exists"),
    ),
    "internal": (
        Step(PLANNED, "QEMU is not involved yet: roll back"),
        Step(STARTED, "images may have tags: roll forward if all have, else the tags are deleted"),
        Step(RECORDED, "the snapshot exists, and QEMU's job may exist: roll forward"),
        Step(SETTLED, "nothing is left to do"),
    ),
    "load": (
        Step(PLANNED, "QEMU is not involved yet: roll back"),
        Step(KEEPING, "the guest may be paused and its state tagged: delete the tags, resume the guest: roll back"),
        Step(LOADING, "disks and memory may be the snapshot's: roll forward if the job was started"),
        Step(LOADED, "the machine is at the snapshot; its guest may still be paused: roll forward"),
        Step(SETTLED, "nothing is left to do"),
    ),
    "commit": _MERGE,
    "stream": _MERGE_ALONE,
    "delete": _MERGE_ALONE,
    "mirror": (
        Step(PLANNED, "the file may exist under a temporary name: roll back"),
        Step("made:FILE", "the file is qmpsnap's under its final name, too; QEMU may have it open: roll back"),
        Step(
            "started:FILE",
            "the job may have written to the copy, the vCPUs may be paused; the old active layer is valid: roll back",
        ),
        Step("finalizing:FILE", "both sides are equal, the vCPUs may be paused: roll forward"),
        Step("settled:FILE", "the change is recorded: dismiss the job, close nodes, remove files"),
        Step(SETTLED, "nothing is left to do"),
    ),
    "resize": (
        Step(PLANNED, "the image is untouched: roll back"),
        Step(RESIZING, "the image may have its new size: roll forward if its header has it, otherwise roll back"),
        Step(SETTLED, "the new size is recorded"),
    ),
    "flatten": (
        Step(PLANNED, "no clone is touched: roll back"),
        Step(
            COPYING,
            "clones may have got data of their own, which they read as before: roll forward if none has a parent any"
            " more, otherwise roll back; another flatten copies only the rest",
        ),
        Step(SETTLED, "the clones have no parents"),
    ),
    "disk-attach": (
        Step(PLANNED, "an unused image may exist: roll back"),
        Step(
            PLUGGING,
            "QEMU may have the nodes and the device: roll back if it runs and lacks the device, otherwise forward",
        ),
        Step(SETTLED, "the machine has the disk"),
    ),
    "disk-detach": (
        Step(PLANNED, "nothing is changed: roll back"),
        Step(UNPLUGGING, "the guest may have let go of the disk: roll forward if QEMU has it no more, otherwise back"),
        Step(SETTLED, "the machine has the disk no more; its files stay"),
    ),
    "nic-attach": (
        Step(PLANNED, "nothing is changed: roll back"),
        Step(PLUGGING, "QEMU may have the card: roll back if it runs without it, otherwise forward"),
        Step(SETTLED, "the machine has the network card"),
    ),
    "nic-detach": (
        Step(PLANNED, "nothing is changed: roll back"),
        Step(UNPLUGGING, "the guest may have let go of the card: roll forward if QEMU has it no more, otherwise back"),
        Step(SETTLED, "the machine has the network card no more"),
    ),
    "rename": (
        Step(PLANNED, "nothing has another name: roll back"),
        Step(
            MOVING,
            "folder, headers and store may have the new name: roll forward if the folder has it, otherwise roll back",
        ),
        Step(SETTLED, "the machine has its new name"),
    ),
    "revert": (
        Step(PLANNED, "new layers may exist; the guest is untouched: roll back"),
        Step(STOPPING, "QEMU may have ended: roll forward and leave the machine stopped"),
        Step(
            MERGING,
            "volumes may have got the content of their snapshots, which may lack: merge the rest, take these anew and"
            " roll forward",
        ),
        Step(SWITCHED, "the machine is at the snapshot; unneeded files may be left: roll forward"),
        Step(STARTING, "QEMU may be starting: roll forward; a QEMU that has loaded its memory keeps running"),
        Step(SETTLED, "nothing is left to do"),
    ),
}
"""By the operation's verb, in order."""


def of_job(number: int, phase: str, *, running: bool = False, state: Iterable[int] = ()) -> str:
    """The step of a plan's ``number``-th job, as ``2:started`` or ``0:finalizing:running``.

    ``state`` is that of the file it writes to, from before: ``0:started:TIME:TIME:SIZE``.
    """
    return ":".join([str(number), phase, *(["running"] if running else []), *map(str, state)])


def of_file(phase: str, device: int, inode: int, *, birth: int = 0, running: bool = False) -> str:
    """The step of a mirror whose target is that file, as ``started:64769:1234:born:1764381600000000000:running``."""
    return f"{phase}:{device}:{inode}{f':born:{birth}' if birth else ''}{':running' if running else ''}"


def on_device(step: str, numbers: Mapping[int, int]) -> str:
    """The step with the number that its file's device has now, by old ones; one that carries no file stays as it is."""
    match step.split(":"):
        case [phase, device, inode, *more] if device.isdigit() and inode.isdigit():
            return ":".join([phase, str(numbers.get(int(device), device)), inode, *more])
        case _:
            return step


def name_of(step: str) -> str:
    """A step's name in the registry, without what it carries."""
    match step.split(":"):
        case [number, phase, *_] if number.isdigit():
            return f"N:{phase}"
        case [phase, device, inode, *_] if device.isdigit() and inode.isdigit():
            return f"{phase}:FILE"
        case _:
            return step


def require_known(verb: str, step: str) -> None:
    """Raise ``ValueError`` for a step that an operation of this verb does not have: it is missing in this module."""
    if name_of(step) not in {known.name for known in STEPS[verb]}:
        raise ValueError(f"an operation {verb!r} has no step {step!r}: add it to qmpsnap/model/operations/steps.py")
