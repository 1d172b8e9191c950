"""What merges, copies and deletions have done, as their callers need it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from qmpsnap.model.operations.operation import Merge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qmpsnap.model.names import LayerId
    from qmpsnap.model.operations.operation import MergePlan, MirrorPlan, Removal
    from qmpsnap.ops.snapshot.delete import DeletePlan


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a verb."""

    _plan: Any = field(repr=False, compare=False)

    if not TYPE_CHECKING:  # what a plan has is no attribute of these

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or not hasattr(self._plan, name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            warnings.warn(
                f"{type(self).__name__}.{name} is of the plan: plan_* methods return plans",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(self._plan, name)


@dataclass(frozen=True, kw_only=True)
class Committed(Outcome):
    """The result of a commit.

    Attributes:
        disk: the disk.
        into: the layer that holds everything now.
        removed: layers that are no longer there.
        overwritten: names of the snapshots that can no longer be read.
        bytes: bytes that were copied, at most.
    """

    disk: str
    into: LayerId
    removed: tuple[LayerId, ...]
    overwritten: tuple[str, ...]
    bytes: int

    @classmethod
    def of(cls, plan: MergePlan) -> Self:
        """By the plan that was carried out."""
        step = _merge(plan)
        return cls(
            _plan=plan,
            disk=step.disk,
            into=step.into.id,
            removed=_removed(plan.steps),
            overwritten=tuple(snapshot.name for snapshot in plan.opening.snapshots),
            bytes=step.moves,
        )


@dataclass(frozen=True, kw_only=True)
class Streamed(Outcome):
    """The result of a stream.

    Attributes:
        disk: the disk.
        into: the layer that holds everything now.
        removed: layers that are no longer there.
        bytes: bytes that were copied, at most.
    """

    disk: str
    into: LayerId
    removed: tuple[LayerId, ...]
    bytes: int

    @classmethod
    def of(cls, plan: MergePlan) -> Self:
        """By the plan that was carried out."""
        step = _merge(plan)
        return cls(_plan=plan, disk=step.disk, into=step.into.id, removed=_removed(plan.steps), bytes=step.moves)


@dataclass(frozen=True, kw_only=True)
class Mirrored(Outcome):
    """The result of a mirror.

    Attributes:
        disk: the disk.
        target: path of the copy, or the URI of the NBD export.
        layer: the copy as the disk's active layer; None where the disk did not switch to it.
        removed: layers that are no longer there.
        bytes: bytes that were copied, at most.
    """

    disk: str
    target: str
    layer: LayerId | None
    removed: tuple[LayerId, ...]
    bytes: int

    @classmethod
    def of(cls, plan: MirrorPlan) -> Self:
        """By the plan that was carried out."""
        return cls(
            _plan=plan,
            disk=plan.disk,
            target=plan.target.path,
            layer=plan.target.id if plan.mode == "pivot" else None,
            removed=tuple(layer.id for layer in plan.removed),
            bytes=plan.moves,
        )


@dataclass(frozen=True, kw_only=True)
class Deleted(Outcome):
    """The result of a deletion of snapshots.

    Attributes:
        names: the snapshots that were deleted.
        removed: layers that are no longer there.
        hidden: layers that stay without a name, because others read them.
        bytes: bytes that were copied, at most.
    """

    names: tuple[str, ...]
    removed: tuple[LayerId, ...]
    hidden: tuple[LayerId, ...]
    bytes: int

    @classmethod
    def of(cls, found: DeletePlan) -> Self:
        """By the plan that was carried out."""
        return cls(
            _plan=found,
            names=found.names,
            removed=_removed(found.plan.steps),
            hidden=tuple(layer.id for layer in found.kept),
            bytes=found.bytes,
        )


def _merge(plan: MergePlan) -> Merge:
    return next(step for step in plan.steps if isinstance(step, Merge))


def _removed(steps: Iterable[Merge | Removal]) -> tuple[LayerId, ...]:
    return tuple(layer.id for step in steps for layer in step.removed)
