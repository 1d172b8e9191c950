"""The store's own calls, watched by the name of the step they make durable."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytest

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations import steps
from qmpsnap.model.operations.operation import Change, Operation, OperationState, Plan, verb_of
from qmpsnap.model.operations.undefine import UndefinePlan
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.store import Removal

When = Literal["before", "after"]
WHEN: tuple[When, ...] = ("before", "after")

Hook = Callable[[str, str, When], None]
"""Told the operation's verb, the step's name, and whether that is about to become durable or just has."""


@contextmanager
def watching(hook: Hook) -> Iterator[None]:
    """Call ``hook``, in the thread that writes, around every step; an end without a step is named for its state."""
    real_open, real_mark, real_settle = SqliteStore.open_operation, SqliteStore.mark, SqliteStore.settle
    real_forget = SqliteStore.forget

    def open_operation(store: SqliteStore, plan: Plan, basis: Basis, **numbers: Any) -> Operation:
        hook(verb_of(plan), steps.PLANNED, "before")
        operation = real_open(store, plan, basis, **numbers)
        hook(operation.verb, steps.PLANNED, "after")
        return operation

    def forget(store: SqliteStore, machine: str, *, removal: Removal | None = None) -> tuple[Layer, ...]:
        def make(gone: Sequence[Layer]) -> UndefinePlan:
            assert removal
            hook("undefine", steps.PLANNED, "before")
            return removal(gone)

        layers = real_forget(store, machine, removal=make if removal else None)
        if removal:
            hook("undefine", steps.PLANNED, "after")
        return layers

    def around(store: SqliteStore, operation: OperationId, name: str, call: Callable[[], None]) -> None:
        verb = _verb(store, operation)
        hook(verb, name, "before")
        call()
        hook(verb, name, "after")

    def mark(
        store: SqliteStore, operation: OperationId, state: OperationState, *, step: str | None = None, **rest: Any
    ) -> None:
        name = steps.name_of(step) if step else f"({state})"
        around(store, operation, name, lambda: real_mark(store, operation, state, step=step, **rest))

    def settle(
        store: SqliteStore,
        operation: OperationId,
        machine: str,
        change: Change,
        *,
        step: str | None = None,
        **rest: Any,
    ) -> None:
        name = steps.name_of(step or steps.SETTLED)
        around(store, operation, name, lambda: real_settle(store, operation, machine, change, step=step, **rest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SqliteStore, "open_operation", open_operation)
        patch.setattr(SqliteStore, "forget", forget)
        patch.setattr(SqliteStore, "mark", mark)
        patch.setattr(SqliteStore, "settle", settle)
        yield


def _verb(store: SqliteStore, operation: OperationId) -> str:
    with store._database.reading() as sql:
        return str(sql.execute("SELECT verb FROM operation WHERE id = ?", (operation,)).fetchone()[0])
