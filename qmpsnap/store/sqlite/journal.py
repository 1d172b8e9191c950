"""The journal: what is about to be done is durable before it is done.

These functions run inside the store's transactions; only :mod:`qmpsnap.store.sqlite.backend` calls them.
"""

import os
import sqlite3
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from qmpsnap.errors import NotFoundError, NumberTaken, OperationPending, StateError
from qmpsnap.hint import call
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations import outcome, steps
from qmpsnap.model.operations.operation import OPEN_STATES, Operation, OperationState, P, Plan, verb_of
from qmpsnap.model.operations.outcome import Recorded
from qmpsnap.model.planning import sharing
from qmpsnap.model.planning.sharing import Name
from qmpsnap.store.sqlite import frozen_files, pruning, queries
from qmpsnap.store.sqlite.json_values import decoded

_FIELDS = Operation.__struct_fields__
_PLAN = _FIELDS.index("plan")
_COLUMNS = ", ".join(_FIELDS)


def require_next(connection: sqlite3.Connection, machine: str, serial: OperationId) -> None:
    """Make sure that an operation of the machine can be opened under the number that it was planned with."""
    if pending := select(connection, machine, only_open=True):
        raise OperationPending(
            f"operation {pending[0].id} ({pending[0].verb}) on machine {machine} is still open",
            hint=call("recover", machine),
            machine=machine,
            operation=str(pending[0].id),
        )
    if serial < next_serial(connection):
        raise NumberTaken(
            f"the number {serial} planned for an operation on machine {machine} was given to another operation",
            hint="try again",
            machine=machine,
        )


def insert(
    connection: sqlite3.Connection, plan: P, names: Iterable[Name], *, serial: OperationId, serials: int
) -> Operation[P]:
    """Record a plan as ``planned``, under the number that it was made with; ``names`` are those of its files."""
    connection.execute("UPDATE serial SET last = ?", (serial + serials - 1,))
    now = time.time()
    operation = Operation(
        id=serial, machine=plan.machine, verb=verb_of(plan), state="planned", step=steps.PLANNED, plan=plan,
        started=now, updated=now, pid=os.getpid(),
    )  # fmt: skip
    of, before = operation, _content(connection, plan.machine)
    connection.execute(
        f"INSERT INTO operation ({_COLUMNS}, before, claimed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
        (
            of.id, of.machine, of.verb, of.state, of.step, msgspec.json.encode(plan).decode(),
            of.started, of.updated, of.pid, of.error, of.effect, of.outcome, msgspec.json.encode(before).decode(),
        ),
    )  # fmt: skip
    claims = [(_claim(name), serial) for name in names]
    connection.executemany("INSERT INTO claim (name, operation) VALUES (?, ?)", claims)
    frozen_files.drop(connection, sharing.opened(plan))
    return operation


def next_serial(connection: sqlite3.Connection) -> int:
    """The serial number the next operation will get."""
    return int(connection.execute("SELECT last + 1 FROM serial").fetchone()[0])


def skip_to(connection: sqlite3.Connection, serial: OperationId) -> None:
    """Let the next operation have this number, if it would have a lower one."""
    connection.execute("UPDATE serial SET last = max(last, ?)", (serial - 1,))


def is_unsettled(connection: sqlite3.Connection, operation: int) -> bool:
    """Whether an operation is known and has not settled: it is open, or was undone."""
    found = connection.execute("SELECT state FROM operation WHERE id = ?", (operation,)).fetchone()
    return found is not None and found[0] != "settled"


def mark(
    connection: sqlite3.Connection,
    operation: OperationId,
    state: OperationState,
    *,
    step: str | None = None,
    error: str | None = None,
    writes: Iterable[LayerId] = (),
) -> None:
    """Record an open operation's state, its step and error where given, and the frozen layers it begins to write to."""
    found = connection.execute("SELECT verb, state FROM operation WHERE id = ?", (operation,)).fetchone()
    if found is None:
        raise NotFoundError(f"there is no operation {operation}")
    verb, then = found
    if step is not None:
        steps.require_known(verb, step)
    if then not in OPEN_STATES:
        raise StateError(f"operation {operation} has ended already ({then})")
    connection.execute(
        "UPDATE operation SET state = ?, step = coalesce(?, step), error = coalesce(?, error), updated = ?,"
        " version = version + 1 WHERE id = ?",
        (state, step, error, time.time(), operation),
    )
    frozen_files.drop(connection, writes)
    if state not in OPEN_STATES:
        _record_outcome(connection, operation, settled=state == "settled")
        frozen_files.drop_claimed(connection, operation)
        connection.execute("DELETE FROM claim WHERE operation = ?", (operation,))
        pruning.prune(connection, now=time.time())


def _record_outcome(connection: sqlite3.Connection, operation: OperationId, *, settled: bool) -> None:
    """In the transaction that ends the operation: what it has come to is what differs from before it, and no opinion.

    Of one that an older qmpsnap has opened nothing is known.
    """
    machine, text = connection.execute("SELECT machine, before FROM operation WHERE id = ?", (operation,)).fetchone()
    if text is None:
        return
    before, after = decoded(text, Recorded), _content(connection, machine)
    connection.execute(
        "UPDATE operation SET effect = ?, outcome = ?, before = NULL WHERE id = ?",
        (outcome.effect(before, after, settled=settled), outcome.left(before, after) or None, operation),
    )


def select(connection: sqlite3.Connection, machine: str, *, only_open: bool) -> tuple[Operation, ...]:
    """The machine's operations, oldest first."""
    which = f"machine = ? AND {queries.PENDING}" if only_open else "machine = ?"
    return _read(connection.execute(f"SELECT {_COLUMNS} FROM operation WHERE {which} ORDER BY id", (machine,)))


def elsewhere(connection: sqlite3.Connection, machine: str, names: Iterable[Name]) -> tuple[Operation, ...]:
    """The open operations of other machines that concern one of these files, oldest first.

    Those not in the index of names are among them: an earlier release opened them, or their files were renamed.
    """
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM operation WHERE {queries.PENDING} AND machine <> ? AND id IN"
        f" (SELECT id FROM {queries.OPEN} AND claimed = 0 UNION SELECT operation FROM claim"
        " JOIN json_each(?) name ON name.value = claim.name) ORDER BY id",
        (machine, msgspec.json.encode([_claim(name) for name in names]).decode()),
    )
    return _read(rows)


def unclaim(connection: sqlite3.Connection) -> None:
    """Files are known by other names now: look at what is open whole, until it has ended."""
    connection.execute(f"UPDATE operation SET claimed = 0 WHERE {queries.PENDING}")


def _claim(name: Name) -> str:
    """A name of a file as the index has it; no id and no path reads like a device and inode."""
    return name if isinstance(name, str) else f"{name[0]}:{name[1]}"


def unborn(connection: sqlite3.Connection) -> tuple[str, ...]:
    """The names of open operations that no machine has, by name."""
    rows = connection.execute(
        f"SELECT DISTINCT machine FROM {queries.OPEN} AND machine NOT IN (SELECT name FROM machine) ORDER BY machine"
    )
    return tuple(name for (name,) in rows)


def _read(rows: Iterable[sqlite3.Row]) -> tuple[Operation, ...]:
    return tuple(
        Operation(**dict(zip(_FIELDS, (*row[:_PLAN], decoded(row[_PLAN], Plan), *row[_PLAN + 1 :]), strict=True)))
        for row in rows
    )


# --- what an outcome is derived from ---------------------------------------------------------------------------------

_SNAPSHOTS: Final = (
    "SELECT snapshot.name, snapshot.state FROM snapshot JOIN machine ON machine.id = snapshot.machine"
    " WHERE machine.name = ? ORDER BY snapshot.id"
)
_CURRENT: Final = (
    "SELECT snapshot.name FROM machine JOIN snapshot ON snapshot.id = machine.current WHERE machine.name = ?"
)
_LAYERS: Final = """
    WITH RECURSIVE chain (disk, position, id, depth) AS (
        SELECT disk.name, disk.position, disk.active, 0 FROM disk JOIN machine ON machine.id = disk.machine
        WHERE machine.name = ?
        UNION ALL
        SELECT chain.disk, chain.position, layer.backing, depth + 1 FROM chain JOIN layer ON layer.id = chain.id
        WHERE layer.backing IS NOT NULL
    )
    SELECT chain.disk, layer.id, layer.virtual_size FROM chain JOIN layer ON layer.id = chain.id
    ORDER BY chain.position, chain.disk, chain.depth DESC
"""


def _content(sql: sqlite3.Connection, machine: str) -> Recorded:
    """What the store has of a machine, from which an outcome is derived; empty if it does not exist."""
    current = sql.execute(_CURRENT, (machine,)).fetchone()
    disks: dict[str, list[tuple[str, int]]] = {}
    for disk, layer, size in sql.execute(_LAYERS, (machine,)):
        disks.setdefault(disk, []).append((layer, size))
    return Recorded(
        current=current[0] if current else None,
        snapshots=dict(sql.execute(_SNAPSHOTS, (machine,)).fetchall()),
        disks={disk: tuple(layers) for disk, layers in disks.items()},
        name=machine,
    )
