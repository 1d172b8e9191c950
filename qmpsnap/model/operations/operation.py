"""Operations: our journalled units of work, and the change each makes to the record when it settles."""

from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from msgspec import Struct

from qmpsnap.effect import Effect
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.layers.snapshot import Quiesce
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.nbd import NbdExport
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.by import By, DeleteBy, LoadBy, MirrorBy, SaveBy
from qmpsnap.model.operations.change import Change as Change  # noqa: PLC0414 - others have it from here
from qmpsnap.model.operations.change import Overlay as Overlay  # noqa: PLC0414
from qmpsnap.model.operations.copies import Copy, VolumeCopy, VolumeMerge
from qmpsnap.model.operations.devices import AttachNicPlan, AttachPlan, DetachNicPlan, DetachPlan
from qmpsnap.model.operations.flatten import FlattenPlan
from qmpsnap.model.operations.memory import Memory
from qmpsnap.model.operations.rename import RenamePlan
from qmpsnap.model.operations.undefine import UndefinePlan

if TYPE_CHECKING:
    import typing_extensions

OperationState = Literal["planned", "running", "settled", "failed", "unknown"]
"""``planned``: durable, nothing done. ``running``: past its first irrevocable step. ``settled``: done and recorded.
``failed``: undone, with its error. ``unknown``: we stopped looking before the end; ``recover`` asks."""

Ended = Literal["settled", "failed"]

OPEN_STATES: tuple[OperationState, ...] = ("planned", "running", "unknown")


class DefinePlan(Struct, frozen=True, kw_only=True, tag="define"):
    """Create a machine: its folder and image files first, then its row.

    ``images`` have no backing, ``overlays`` lie on images from before; the UEFI variables are copied to ``variables``.
    """

    machine: str
    images: tuple[Layer, ...]
    overlays: tuple[Overlay, ...]
    change: Change
    variables: str | None = None

    @property
    def created(self) -> tuple[Layer, ...]:
        """Every layer whose file this plan makes."""
        return (*self.images, *(overlay.layer for overlay in self.overlays))


class ForkPlan(DefinePlan, frozen=True, kw_only=True, tag="fork"):
    """Create a machine that goes on from another one's full snapshot: define it on the snapshot's points, then load.

    Attributes:
        parent: the machine whose snapshot it is.
        snapshot: its name.
        paused: its vCPUs stay stopped.
        fresh: its guest gets an identity of its own.
        bake: there was no template of the snapshot's memory when this was planned.
    """

    parent: str
    snapshot: str
    paused: bool = False
    fresh: bool = False
    bake: bool = False


class CreatePlan(Struct, frozen=True, kw_only=True, tag="create"):
    """Take a snapshot: every overlay in one transaction, for a full one with the guest's memory.

    Attributes:
        live: a QEMU runs; the transaction is sent to it.
        memory: how the memory is saved; None for the disks alone.
        quiesce: the guest's file systems may have been frozen for it; with ``require`` they must have been.
        variables: the UEFI variable store and where its copy goes.
        hold: the guest is paused for that copy and the transaction, because it keeps writing to its variables.
        volumes: snapshots that the storage makes of the quiet images, once the overlays are active.
        by: the action of the transaction.
    """

    machine: str
    live: bool
    overlays: tuple[Overlay, ...]
    change: Change
    memory: Memory | None = None
    quiesce: Quiesce = "skip"
    variables: tuple[str, str] | None = None
    hold: bool = False
    volumes: tuple[VolumeCopy, ...] = ()
    by: By = "blockdev-snapshot"

    @property
    def new(self) -> tuple[Overlay | VolumeCopy, ...]:
        """The new layers."""
        return (*self.overlays, *self.volumes)


class InternalPlan(Struct, frozen=True, kw_only=True, tag="internal"):
    """Take a snapshot inside the images: one tag in each disk's active layer.

    Attributes:
        layers: the active layer of each disk, by the disk's name.
        vmstate: the layer that takes the memory, too; None for the disks alone.
        variables: the UEFI variable store and where its copy goes.
        resume: the guest ran before and is paused meanwhile.
        change: the change to the store, without the size of the memory.
        quiesce: as in :class:`CreatePlan`.
        by: the command that saves the memory; with ``savevm`` QEMU chooses which layer takes it.
    """

    machine: str
    tag: str
    live: bool
    layers: dict[str, Layer]
    vmstate: LayerId | None
    variables: tuple[str, str] | None
    resume: bool
    change: Change
    quiesce: Quiesce = "skip"
    by: SaveBy = "snapshot-save"


class LoadPlan(Struct, frozen=True, kw_only=True, tag="load"):
    """Revert to a snapshot inside the active layers in the running QEMU.

    Attributes:
        tag: its name inside the images.
        layers: the active layer of each disk, by the disk's name.
        vmstate: the layer that holds the memory.
        resume: the guest ran before, and is resumed if this fails.
        kept: how the present state is kept first; None if it is discarded.
        variables: the UEFI variable store and its replacement, in case the guest has to boot instead.
        by: the command for it; ``loadvm`` leaves no job behind that tells how it ended.
    """

    machine: str
    snapshot: str
    tag: str
    layers: dict[str, Layer]
    vmstate: LayerId
    paused: bool
    resume: bool = True
    kept: InternalPlan | None = None
    variables: tuple[str, str] | None = None
    change: Change
    by: LoadBy = "snapshot-load"


class Merge(Struct, frozen=True, kw_only=True, tag="merge"):
    """One block job that makes one layer out of several neighbours.

    Attributes:
        kind: ``commit`` writes what lies above into ``into``; ``stream`` writes what lies below into it.
        into: the layer that is written to and stays.
        top: the highest layer whose content moves; for a stream ``into`` itself.
        base: for a stream, the backing of ``into`` afterwards.
        root: the highest layer of the chain the job runs in: the live chain's active layer, or ``top``.
        live: the job runs in the machine's own QEMU; else in a helper QEMU that runs no guest.
        chain: layers of the chain the job runs in, base first, as before the job.
        moves: bytes to move, at most.
        rebased: layers outside that chain that read ``top`` and read ``into`` afterwards.
        removed: layers whose files go afterwards; nobody needs them.
        change: what becomes true when the job has made its change to the graph.
    """

    kind: Literal["commit", "stream"]
    disk: str
    into: Layer
    top: Layer
    base: Layer | None
    root: LayerId
    live: bool
    chain: tuple[Layer, ...]
    moves: int
    rebased: tuple[Layer, ...] = ()
    removed: tuple[Layer, ...] = ()
    change: Change


class Removal(Struct, frozen=True, kw_only=True, tag="removal"):
    """Layers that nothing needs: the store forgets them first, then their files are removed.

    ``states``, ``variables``: files of deleted snapshots. ``tags``: (disk, layer, tag) in active layers; by ``by``.
    """

    disk: str
    removed: tuple[Layer, ...]
    change: Change
    states: tuple[Vmstate, ...] = ()
    variables: tuple[str, ...] = ()
    tags: tuple[tuple[str, LayerId, str], ...] = ()
    by: DeleteBy = "blockdev-snapshot-delete-internal-sync"


class MergePlan(Struct, frozen=True, kw_only=True, tag="merge"):
    """``commit``, ``stream`` and ``delete``: what is true at once, then jobs one after the other.

    Attributes:
        verb: as the user called it.
        opening: applied with the journal row, before any job starts.
        undo: takes ``opening`` back; applied only when it is certain that no job has started.
        steps: in this order.
        bandwidth: bytes per second that each job copies at most; 0 is without limit.
    """

    verb: Literal["commit", "stream", "delete"]
    machine: str
    opening: Change
    undo: Change
    steps: tuple[Merge | Removal, ...]
    bandwidth: int = 0


class Unwritten(Struct, frozen=True, kw_only=True):
    """What a revert does instead, should nothing have been written since the last one or since the last snapshot.

    Attributes:
        layers: the old active layers; once QEMU has ended each must prove empty, and then they go.
        change: what becomes true then.
        variables: copies of the UEFI variable store; where the revert replaces that, it must read like one of them.
    """

    layers: tuple[Layer, ...]
    change: Change
    variables: tuple[str, ...] = ()


class RevertPlan(Struct, frozen=True, kw_only=True, tag="revert"):
    """Go back to a snapshot: new overlays on its points become active while no QEMU runs.

    Attributes:
        live: a QEMU runs; it ends before anything changes.
        removed: qmpsnap's layers that nothing needs after ``change``; their files are removed.
        restart: the machine is started on the new layers, and with ``paused`` its vCPUs stay stopped.
        vmstate: the memory in a file that it goes on with.
        copies: new active layers that are copies, where the snapshot is inside an image.
        clones: new active layers that the storage clones, where the snapshot is one of the storage.
        merges: active layers that stay, and into which the storage merges the snapshot.
        inside: the copy, among those, with memory that it goes on with. With neither it boots.
        variables: the UEFI variable store and what it is replaced with.
        unwritten: what becomes true instead when the old active layers are empty; None where that does not matter.
    """

    machine: str
    snapshot: str
    live: bool
    overlays: tuple[Overlay, ...]
    removed: tuple[Layer, ...]
    restart: bool
    paused: bool
    change: Change
    unwritten: Unwritten | None = None
    vmstate: Vmstate | None = None
    copies: tuple[Copy, ...] = ()
    clones: tuple[VolumeCopy, ...] = ()
    merges: tuple[VolumeMerge, ...] = ()
    inside: LayerId | None = None
    variables: tuple[str, str] | None = None

    @property
    def new(self) -> tuple[Overlay | Copy | VolumeCopy, ...]:
        """The new active layers."""
        return (*self.overlays, *self.copies, *self.clones)

    @property
    def keeps(self) -> str | None:
        """Where the UEFI variable store is copied to before it is replaced; None where it stays, or is not kept."""
        return next((found.variables for found in self.change.snapshots if found.variables), None)


class MirrorPlan(Struct, frozen=True, kw_only=True, tag="mirror"):
    """Copy a disk to another image; the machine goes on with the copy (``pivot``) or with what it has (``finish``).

    Attributes:
        target: the copy; with ``nbd`` its path is the export's URI.
        made: we make the file; else it is the user's, to be overwritten.
        shallow: only what the active layer holds; the copy reads the rest from the active layer's backing.
        write_blocking: the guest's writes wait for the copy, so that it cannot be outrun.
        live: the job runs in the machine's own QEMU; else in a helper QEMU that runs no guest.
        chain: the live chain, base first.
        removed: layers nobody needs after a pivot.
        change: what a pivot makes true, but for the target's identity; of a finish the store keeps nothing.
        bandwidth: bytes per second that the job copies at most; 0 is without limit.
    """

    machine: str
    disk: str
    mode: Literal["pivot", "finish"]
    target: Layer
    made: bool
    shallow: bool
    write_blocking: bool
    live: bool
    chain: tuple[Layer, ...]
    moves: int
    removed: tuple[Layer, ...] = ()
    nbd: NbdExport | None = None
    change: Change = Change()
    bandwidth: int = 0
    by: MirrorBy = "blockdev-mirror"


class ResizePlan(Struct, frozen=True, kw_only=True, tag="resize"):
    """Give a disk's active layer more bytes; the layers below keep theirs.

    Attributes:
        size: bytes that the guest sees afterwards.
        live: a QEMU runs; it does it and tells the guest. Else a helper QEMU that runs no guest.
    """

    machine: str
    disk: str
    layer: Layer
    size: int
    live: bool
    change: Change


Plan = (
    DefinePlan | ForkPlan | UndefinePlan | ResizePlan | RenamePlan  # of machines
    | AttachPlan | DetachPlan | AttachNicPlan | DetachNicPlan  # of their devices
    | CreatePlan | InternalPlan | LoadPlan | RevertPlan | MergePlan | MirrorPlan | FlattenPlan  # of snapshots
)  # fmt: skip


def verb_of(plan: Plan) -> str:
    """What the journal calls a plan."""
    return plan.verb if isinstance(plan, MergePlan) else str(plan.__struct_config__.tag)


P = TypeVar("P", bound=Plan)

if TYPE_CHECKING:
    P_co = typing_extensions.TypeVar("P_co", bound=Plan, covariant=True, default=Plan)
else:  # Python 3.11 has no defaults
    P_co = TypeVar("P_co", covariant=True)


class Operation(Struct, Generic[P_co], frozen=True, kw_only=True):
    """A row of the journal: ``Operation[MergePlan]``, or of any plan.

    Attributes:
        step: name of the last step that is durable; each verb has its own.
        started: seconds since the epoch, UTC.
        pid: the controller that opened it.
        error: one sentence, when it failed.
        effect: whether it has changed what the store has of the machine, found when it ended; None before that.
        outcome: what is otherwise than before it, in words.
    """

    id: OperationId
    machine: str
    verb: str
    state: OperationState
    step: str
    plan: P_co
    started: float
    updated: float
    pid: int
    error: str | None = None
    effect: Effect | None = None
    outcome: str | None = None
