"""The journal does not grow for ever: what has ended long ago goes, and is told by its number."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qmpsnap.model.operations.operation import Change
from qmpsnap.store.sqlite import pruning
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.store.samples import MACHINES, created, defined, layer, opened, settled, snapshot

DAY = 24 * 3600.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(path, machines=MACHINES) as found:
        defined(found, "web", layer("vda-1"))
        yield found


def change(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


def age(path: Path, days: float, *operations: int) -> None:
    for operation in operations:
        change(path, "UPDATE operation SET updated = ? WHERE id = ?", time.time() - days * DAY, operation)


def numbers(store: SqliteStore, machine: str = "web") -> list[int]:
    return [operation.id for operation in store.operations(machine)]


def test_what_ended_more_than_90_days_ago_goes_when_the_next_one_ends(store: SqliteStore, path: Path) -> None:
    for _ in range(3):
        settled(store, Change())
    age(path, 91, 2, 3)
    age(path, 89, 4)
    assert (numbers(store), store.pruned.of("web")) == ([1, 2, 3, 4], None)
    operation = opened(store)
    assert numbers(store) == [1, 2, 3, 4, 5]
    store.mark(operation.id, "failed", error="no space")
    assert numbers(store) == [1, 4, 5]
    found = store.pruned.of("web")
    assert found is not None
    assert found.count == 2
    assert abs(time.time() - 91 * DAY - found.until) < DAY
    assert store.pruned.of("another") is None
    assert opened(store).id == 6  # a number is no other operation's, ever


def test_of_all_machines_at_once_and_each_told_apart(store: SqliteStore, path: Path) -> None:
    defined(store, "lab", layer("lab-1", path="/pool/machines/lab/lab-1.qcow2"))
    age(path, 91, 1, 2)
    settled(store, Change())
    assert [(one.count if (one := store.pruned.of(name)) else 0) for name in ("web", "lab")] == [1, 1]
    assert numbers(store) + numbers(store, "lab") == [3]


def test_one_that_is_open_unknown_or_made_a_snapshot_stays(store: SqliteStore, path: Path) -> None:
    created(store, "s1", layer("vda-1"))  # the sample's snapshot says that operation 1 made it
    unknown = opened(store).id
    store.mark(unknown, "failed", error="who knows")
    change(path, "UPDATE operation SET effect = 'unknown' WHERE id = ?", unknown)
    defined(store, "lab", layer("lab-1", path="/pool/machines/lab/lab-1.qcow2"))
    undecided = opened(store, "lab").id
    store.mark(undecided, "unknown")
    age(path, 400, *range(1, 10))
    settled(store, Change())
    assert numbers(store) == [1, unknown, 6]
    assert numbers(store, "lab") == [undecided]
    store.apply("web", Change(removed_snapshots=("s1",)))
    settled(store, Change())
    assert numbers(store) == [unknown, 6, 7]


def test_beyond_10000_the_oldest_go_a_bounded_number_at_a_time(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "KEPT", 5)
    monkeypatch.setattr(pruning, "AT_ONCE", 2)
    change(
        path,
        "INSERT INTO operation (machine, verb, state, step, plan, started, updated, pid, effect)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9)"
        " SELECT machine, verb, state, step, plan, started, updated - 10 + i / 10.0, pid, effect FROM operation, n",
    )
    change(path, "UPDATE serial SET last = 10")
    left = []
    for _ in range(5):
        settled(store, Change())
        left.append(len(numbers(store)))
    assert left == [9, 8, 7, 6, 5]  # two go for each that comes
    assert numbers(store) == [11, 12, 13, 14, 15]
    settled(store, Change())
    assert numbers(store) == [12, 13, 14, 15, 16]
    found = store.pruned.of("web")
    assert found is not None
    assert found.count == 11


def test_a_full_journal_costs_a_settle_next_to_nothing(store: SqliteStore, path: Path) -> None:
    change(
        path,
        "INSERT INTO operation (machine, verb, state, step, plan, started, updated, pid, effect)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
        " SELECT machine, verb, state, step, ?, started, updated, pid, effect FROM operation, n",
        pruning.KEPT,
        '{"type": "define", "text": "' + 2000 * "x" + '"}',
    )
    with closing(sqlite3.connect(path)) as connection:
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(count, 1000)
        pruning.prune(connection, now=time.time())
        connection.rollback()
    assert steps < 2, steps  # some hundred of SQLite's own instructions


def test_old_ones_that_stay_do_not_keep_others_and_are_passed_over(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most operations of a large store made a snapshot, and stay as long as that."""
    monkeypatch.setattr(pruning, "LOOKED", 10)
    store.apply("web", Change(snapshots=tuple(snapshot(f"s{number}", layer("vda-1")) for number in range(25))))
    change(path, "UPDATE snapshot SET operation = 100 + id")
    change(
        path,
        "INSERT INTO operation (id, machine, verb, state, step, plan, started, updated, pid, effect)"
        " SELECT snapshot.operation, one.machine, verb, one.state, step, plan, started, snapshot.id, pid, effect"
        " FROM (SELECT * FROM operation LIMIT 1) one, snapshot",
    )
    change(path, "UPDATE operation SET updated = 26 WHERE id = 1")
    change(path, "UPDATE serial SET last = 200")
    for _ in range(2):
        settled(store, Change())
        assert 1 in numbers(store)
    settled(store, Change())
    assert len(numbers(store)) == 28
    assert 1 not in numbers(store)
    change(path, "UPDATE snapshot SET operation = 0 WHERE operation = 101")
    settled(store, Change())  # from the beginning, once all were looked at
    assert 101 not in numbers(store)
