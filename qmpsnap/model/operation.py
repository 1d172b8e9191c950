"""Operations: our journalled units of work, and the change each makes to the record when it settles."""

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from qmpsnap.model.chain import Layer
from qmpsnap.model.machine import Machine
from qmpsnap.model.names import LayerId, OperationId
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
    """A new empty layer for one disk."""

    disk: str
    layer: Layer
    backing: Layer


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


Plan = DefinePlan | CreatePlan


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
