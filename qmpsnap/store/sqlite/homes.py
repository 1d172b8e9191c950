"""Which home a store belongs to: its id, its path, and the one transaction by which it lies elsewhere.

Layers in the machines' folder are recorded by a relative path; what else names the home (specs, open plans, images
that lie in it beside that folder) is a text, and all of them change at once.
"""

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from qmpsnap.model.operations.rename import RenamePlan
from qmpsnap.model.relocation import HomeRecord, Relocation, carried, carried_all
from qmpsnap.store.records import Records
from qmpsnap.store.sqlite import journal, queries
from qmpsnap.store.sqlite.database import Database
from qmpsnap.store.sqlite.json_values import decoded
from qmpsnap.store.sqlite.queries import signed, unsigned

Ids = Mapping[tuple[int, int], tuple[int, int, int]]
"""Device and inode of a file to those of its copy, with the copy's birth."""


class HomeTable:
    """The home's row of a store, and what is written down of it beside the store."""

    def __init__(self, database: Database, records: Records, *, machines: Path) -> None:
        self._database = database
        self._records = records
        self._machines = machines
        self._first: HomeRecord | None = None

    def record(self) -> HomeRecord | None:
        """What is recorded; None in a store that nothing was changed in since there are such records."""
        with self._database.reading() as sql:
            return _read(sql)

    def note(self, home: HomeRecord) -> None:
        """Record a home's id and path."""
        with self._database.writing() as sql:
            _write(sql, home)

    def look(self) -> None:
        """Find out what :meth:`born` is to record before the store is locked, as storage may hang."""
        import uuid

        if self._first is None and self.record() is None:
            self._first = self._records.home() or HomeRecord(uuid.uuid4().hex, str(self._machines.parent))

    def born(self, sql: sqlite3.Connection) -> None:
        """With the first change, record that the home lies where it does."""
        if self._first and not _read(sql):
            _write(sql, self._first)

    def begin(self, record: HomeRecord, relocation: Relocation) -> None:
        """Make durable what was agreed to of a home with that record, before a header is rewritten."""
        with self._database.writing() as sql:
            sql.execute("DELETE FROM stamp")  # of copies, and of headers that are rewritten
            _write(sql, HomeRecord(record.id, record.path, relocation))

    def finish(self, relocation: Relocation) -> None:
        """Record the home as lying where it is, and its files as those that are there."""
        home = HomeRecord(relocation.id, relocation.now)
        with self._database.writing() as sql:
            ids = self._ids(sql, relocation)
            self._layers(sql, relocation)
            self._texts(sql, relocation, ids)
            journal.unclaim(sql)
            sql.execute("DELETE FROM stamp")
            sql.execute("UPDATE machine SET generation = generation + 1")  # no record of before names this place
            if relocation.foreign_process:
                sql.execute("DELETE FROM process")
            _write(sql, home)

    def rename(self, plan: RenamePlan) -> None:
        """Record the new name of a machine, whose folder and headers have it already; its journal goes along."""
        with self._database.writing() as sql:
            sql.execute("UPDATE machine SET name = ? WHERE name = ?", (plan.new, plan.machine))
            self._rename_paths(sql, plan)
            sql.execute(
                "UPDATE machine SET origin = json_set(origin, '$.machine', ?1), generation = generation + 1"
                " WHERE json_extract(origin, '$.machine') = ?2"
                " AND json_extract(origin, '$.uuid') = (SELECT uuid FROM machine WHERE name = ?1)",
                (plan.new, plan.machine),
            )
            for name in (plan.new, *plan.others):  # the records beside the images have the old paths
                sql.execute("UPDATE machine SET generation = generation + 1 WHERE name = ?", (name,))
            sql.execute("UPDATE operation SET machine = ? WHERE machine = ?", (plan.new, plan.machine))
            sql.execute("UPDATE OR REPLACE pruned SET machine = ? WHERE machine = ?", (plan.new, plan.machine))
            journal.unclaim(sql)

    def _rename_paths(self, sql: sqlite3.Connection, plan: RenamePlan) -> None:
        """Of layers and the files of snapshots, and the name in specs; paths in the machines' folder are relative."""
        old, new = f"{plan.machine}/", f"{plan.new}/"

        def text(value: Any) -> Any:
            return carried_all(value, (plan.folder,), plan.new_folder)

        def state(value: Any) -> Any:
            return value | {"path": new + path.removeprefix(old)} if (path := value["path"]).startswith(old) else value

        within = (new, len(old) + 1, old, f"{plan.machine}0")
        sql.execute(
            "UPDATE layer SET path = ? || substr(path, ?), version = version + 1"
            " WHERE pool = 'machines' AND path >= ? AND path < ?",
            within,
        )
        sql.execute(
            "UPDATE snapshot SET variables = ? || substr(variables, ?), version = version + 1"
            " WHERE variables >= ? AND variables < ?",
            within,
        )
        _rewrite(sql, "snapshot", "vmstate", state)
        for column in ("spec", "past", "consent"):
            _rewrite(sql, "machine", column, text)
        own = f" AND name = '{plan.new}'"  # a name has no quote in it
        _rewrite(sql, "machine", "spec", lambda spec: spec | {"name": plan.new}, where=own)
        _rewrite(
            sql,
            "machine",
            "past",
            lambda past: [each | {"spec": each["spec"] | {"name": plan.new}} for each in past],
            where=own,
        )

    def _ids(self, sql: sqlite3.Connection, to: Relocation) -> Ids:
        found: dict[tuple[int, int], tuple[int, int, int]] = {}
        for layer in to.layers:
            row = sql.execute("SELECT device, inode FROM layer WHERE id = ?", (layer.id,)).fetchone()
            if row and row[1]:
                found[unsigned(row[0]), unsigned(row[1])] = (layer.device, layer.inode, layer.birth)
        return found

    def _layers(self, sql: sqlite3.Connection, to: Relocation) -> None:
        for identity, path in sql.execute("SELECT id, path FROM layer WHERE pool <> 'machines'").fetchall():
            if (new := carried(f"/{path}", to.before, to.now)) != f"/{path}":
                sql.execute("UPDATE layer SET path = ? WHERE id = ?", (new.removeprefix("/"), identity))
        sql.executemany(
            "UPDATE layer SET device = ?, inode = ?, birth = ?, virtual_size = ?, version = version + 1 WHERE id = ?",
            [(signed(of.device), signed(of.inode), of.birth, of.virtual_size, of.id) for of in to.layers],
        )

    def _texts(self, sql: sqlite3.Connection, to: Relocation, ids: Ids) -> None:
        states = {state.path: state for state in to.states}

        def text(value: Any) -> Any:
            return _identified(carried_all(value, to.before, to.now), ids)

        def state(value: Any) -> Any:
            new = carried_all(value, to.before, to.now)
            if copy := states.get(str(self._machines / new["path"])):
                new |= {"device": copy.device, "inode": copy.inode, "birth": copy.birth}
            return new

        _rewrite(sql, "machine", "spec", text)
        _rewrite(sql, "machine", "adopted", text)
        _rewrite(sql, "machine", "consent", text)
        _rewrite(sql, "machine", "origin", text)
        _rewrite(sql, "machine", "past", text)
        _rewrite(sql, "snapshot", "vmstate", state)
        _rewrite(sql, "snapshot", "inside", text)
        _rewrite(sql, "operation", "plan", text, where=f" AND {queries.PENDING}")


def _rewrite(
    sql: sqlite3.Connection, table: str, column: str, change: Callable[[Any], Any], *, where: str = ""
) -> None:
    wanted = f"SELECT id, {column} FROM {table} WHERE {column} IS NOT NULL{where}"
    for number, text in sql.execute(wanted).fetchall():
        new = msgspec.json.encode(change(decoded(text))).decode()
        if new == text:
            continue
        sql.execute(f"UPDATE {table} SET {column} = ?, version = version + 1 WHERE id = ?", (new, number))


def _identified(value: Any, ids: Ids) -> Any:
    """A recorded value with the identities of the copies: a file's is always a device beside an inode."""
    if isinstance(value, list):
        return [_identified(each, ids) for each in value]
    if not isinstance(value, dict):
        return value
    new = {key: _identified(each, ids) for key, each in value.items()}
    if copy := ids.get((new.get("device", 0), new.get("inode", 0))):
        new |= dict(zip(("device", "inode", "birth"), copy, strict=True))
    return new


def _read(sql: sqlite3.Connection) -> HomeRecord | None:
    row = sql.execute("SELECT id, path, moving FROM home").fetchone()
    if row is None:
        return None
    return HomeRecord(row[0], row[1], decoded(row[2], Relocation) if row[2] else None)


def _write(sql: sqlite3.Connection, home: HomeRecord) -> None:
    moving = msgspec.json.encode(home.moving).decode() if home.moving else None
    sql.execute(queries.PUT_HOME, (1, home.id, home.path, moving))
