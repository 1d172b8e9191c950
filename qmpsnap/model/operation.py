"""Operations: our journalled units of work, and the change each makes to the record when it settles."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from qmpsnap.model.chain import Layer
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.nbd import NbdExport
from qmpsnap.model.snapshot import Snapshot

OperationState = Literal["planned", "running", "settled", "failed", "unknown"]
"""``planned``: durable, nothing done. ``running``: past its first irrevocable step. ``settled``: done and recorded.
``failed``: undone, with its error. ``unknown``: we stopped looking before the end; ``recover`` asks."""

OPEN_STATES: tuple[OperationState, ...] = ("planned", "running", "unknown")


class Change(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one operation does to the record, applied in one SQL transaction.

    Attributes:
        define: the machine to add.
        layers: layers to add, or to replace where the id is known.
        active: for each disk named, its new active layer.
        snapshots: snapshots to add, or to replace where the name is known.
        renamed: old name to new name of snapshots, done after ``snapshots``.
        removed_snapshots: names of snapshots to remove; snapshots that grew from one grow from its parent then.
        removed_layers: layers to remove; nobody may need them any more.
        current: the machine's new current snapshot; unset leaves it.
    """

    define: Machine | None = None
    layers: tuple[Layer, ...] = ()
    active: dict[str, LayerId] = {}
    snapshots: tuple[Snapshot, ...] = ()
    renamed: dict[str, str] = {}
    removed_snapshots: tuple[str, ...] = ()
    removed_layers: tuple[LayerId, ...] = ()
    current: str | UnsetType | None = UNSET


class Overlay(Struct, frozen=True, kw_only=True):
    """A new empty layer for one disk.

    Attributes:
        part: a name of ours that the file has, too, until the operation settles, where a user has chosen its place:
            what is at that place is ours only if it is the same file. None in the machine's own folder.
    """

    disk: str
    layer: Layer
    backing: Layer
    part: str | None = None


class DefinePlan(Struct, frozen=True, kw_only=True, tag="define"):
    """Create a machine: its folder and image files first, then its row.

    Attributes:
        images: new images without backing.
        overlays: new overlays on images that existed before.
        variables: where the UEFI variable store is copied to, if there is one.
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


class CreatePlan(Struct, frozen=True, kw_only=True, tag="create"):
    """Take a disk snapshot: every overlay in one transaction.

    Attributes:
        live: a QEMU runs; the transaction is sent to it.
        overlays: the new active layers.
    """

    machine: str
    live: bool
    overlays: tuple[Overlay, ...]
    change: Change


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
    """Layers that nobody needs: first the store forgets them, then their files go."""

    disk: str
    removed: tuple[Layer, ...]
    change: Change


class MergePlan(Struct, frozen=True, kw_only=True, tag="merge"):
    """``commit``, ``stream`` and ``delete``: what is true at once, then jobs one after the other.

    Attributes:
        verb: as the user called it.
        opening: applied with the journal row, before any job starts.
        undo: takes ``opening`` back; applied only when it is certain that no job has started.
        steps: in this order.
    """

    verb: Literal["commit", "stream", "delete"]
    machine: str
    opening: Change
    undo: Change
    steps: tuple[Merge | Removal, ...]


class Unwritten(Struct, frozen=True, kw_only=True):
    """What a revert does instead, should nothing have been written since the last one or since the last snapshot.

    Attributes:
        layers: the old active layers; once QEMU has ended each must prove empty, and then they go.
        change: what becomes true then.
    """

    layers: tuple[Layer, ...]
    change: Change


class RevertPlan(Struct, frozen=True, kw_only=True, tag="revert"):
    """Go back to a snapshot: new overlays on its points become active while no QEMU runs.

    Attributes:
        snapshot: its name.
        live: a QEMU runs; it ends before anything changes.
        overlays: the new active layers.
        removed: layers of ours that nobody needs after ``change``; their files go.
        restart: the machine is started on the new layers.
        paused: it is started with its vCPUs stopped.
        change: what becomes true.
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


class MirrorPlan(Struct, frozen=True, kw_only=True, tag="mirror"):
    """Copy a disk to another image; the machine goes on with the copy (``pivot``) or with what it has (``finish``).

    Attributes:
        target: the copy; with ``nbd`` its path is the export's URI.
        made: we make the file; else it is the user's, to be overwritten.
        shallow: only what the active layer holds; the copy reads the rest from the active layer's backing.
        write_blocking: the guest's writes wait for the copy, so that it cannot be outrun.
        live: the job runs in the machine's own QEMU; else in a helper QEMU that runs no guest.
        chain: the live chain, base first.
        moves: bytes to move, at most.
        removed: layers nobody needs after a pivot.
        change: what a pivot makes true, but for the target's identity; of a finish the store keeps nothing.
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


Plan = DefinePlan | CreatePlan | MergePlan | RevertPlan | MirrorPlan


def verb_of(plan: Plan) -> str:
    """What the journal calls a plan."""
    return plan.verb if isinstance(plan, MergePlan) else str(plan.__struct_config__.tag)


class Operation(Struct, frozen=True, kw_only=True):
    """A row of the journal.

    Attributes:
        step: name of the last step that is durable; each verb has its own.
        started: seconds since the epoch, UTC.
        pid: the controller that opened it.
        error: one sentence, when it failed.
    """

    id: OperationId
    machine: str
    verb: str
    state: OperationState
    step: str
    plan: Plan
    started: float
    updated: float
    pid: int
    error: str | None = None
