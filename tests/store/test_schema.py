"""The store's file: who may read it, what becomes of an older, a newer, a damaged and a full one."""

import hashlib
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from qmpsnap.errors import HostCannot, StoreMismatch, StoreTooNew
from qmpsnap.model.layers.snapshot import Point, Snapshot
from qmpsnap.model.machines.record import Consent, Machine, Process
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change
from qmpsnap.store.sqlite import schema
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.sqlite.schema import MIGRATIONS
from tests.store.samples import MACHINES, PROCESS, created, defined, everything, layer, machine, opened, settled

V1 = Path(__file__).parent / "v1.sql"
NEXT = "ALTER TABLE machine ADD COLUMN note TEXT NOT NULL DEFAULT 'new'; CREATE TABLE extra (n INTEGER) STRICT"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.db"


@pytest.fixture
def old(path: Path) -> Path:
    """A store as version 1 has written it."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(V1.read_text())
    return path


@pytest.fixture
def careless_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def ask(path: Path, question: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(question).fetchall()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- a fresh file ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("careless_umask")
def test_file_and_folder_are_the_users_alone_whatever_the_umask(path: Path) -> None:
    with SqliteStore(path, machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        assert {found.name: mode(found) for found in path.parent.iterdir()} == {
            "store.db": 0o600,
            "store.db-wal": 0o600,
            "store.db-shm": 0o600,
        }
        assert {found.name: mode(found) for found in (MACHINES / "web").iterdir()} == {"record.json": 0o600}
    assert {mode(folder) for folder in (MACHINES.parent, MACHINES, MACHINES / "web")} == {0o700}
    assert mode(path.parent) == 0o700


def test_a_commit_is_on_the_disk_and_a_reference_to_nothing_is_refused(path: Path) -> None:
    with closing(schema.connect(path)) as connection:
        settings = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "foreign_keys")
        }
        assert settings == {"journal_mode": "wal", "foreign_keys": 1}
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_every_table_is_strict(path: Path) -> None:
    with closing(schema.connect(path)) as connection:
        tables = connection.execute("SELECT name, strict FROM pragma_table_list WHERE type = 'table'").fetchall()
    ours = {name: strict for name, strict in tables if not name.startswith("sqlite_")}
    assert ours.keys() >= {"machine", "layer", "snapshot", "operation"}
    assert set(ours.values()) == {1}


def test_a_second_opening_in_this_process_leaves_the_first_its_locks(path: Path) -> None:
    """A store that has lost them would have its -wal file removed by any other process that comes and goes."""
    with SqliteStore(path, machines=MACHINES) as first:
        defined(first, "web", layer("vda-1"))
        with SqliteStore(path, machines=MACHINES):
            pass
        look = "print(sqlite3.connect(sys.argv[1]).execute('SELECT name FROM machine').fetchall())"
        said = subprocess.run(
            [sys.executable, "-c", f"import sqlite3, sys; {look}", path], capture_output=True, check=True, timeout=30
        )
        assert said.stdout == b"[('web',)]\n"
        assert path.with_name("store.db-wal").exists()
        defined(first, "more", layer("vda-2"))
    assert ask(path, "SELECT name FROM machine ORDER BY name") == [("more",), ("web",)]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_the_version_of_a_row_grows_with_every_change_of_it(path: Path) -> None:
    with SqliteStore(path, machines=MACHINES) as store:
        base = layer("vda-1")
        defined(store, "web", base)
        created(store, "first", base)
        store.set_process("web", PROCESS)
        tables = ("machine", "layer", "disk", "snapshot", "process", "operation")

        def versions() -> dict[str, object]:
            return {table: ask(path, f"SELECT max(version) FROM {table}")[0][0] for table in tables}  # noqa: S608 - ours

        before = versions()
        store.set_process("web", Process(pid=1, start_ticks=1, boot_id="x", started=1, accel="", qemu_version=""))
        pending = opened(store)
        store.mark(pending.id, "running")
        change = Change(
            layers=(base,), active={"vda": LayerId("vda-2")}, snapshots=store.snapshots("web"), current="first"
        )
        store.settle(pending.id, "web", change)
        after = versions()
    assert {table for table in tables if int(str(after[table])) > int(str(before[table]))} == set(tables)


def test_layers_of_the_machines_folder_move_with_it_and_others_are_this_hosts(tmp_path: Path, path: Path) -> None:
    inside = layer("vda-1", path=f"{tmp_path}/here/web/vda-1.qcow2")
    outside = layer("vdb-1", path="/images/base.qcow2", owned=False)
    with SqliteStore(path, machines=tmp_path / "here") as store:
        defined(store, "web", inside, outside)
    assert ask(path, "SELECT pool, path FROM layer ORDER BY id") == [
        ("machines", "web/vda-1.qcow2"),
        (f"host:{os.uname().nodename}", "images/base.qcow2"),
    ]
    with SqliteStore(path, machines=tmp_path / "there") as store:
        assert store.layer(inside.id).path == f"{tmp_path}/there/web/vda-1.qcow2"
        assert store.layer(outside.id).path == outside.path


# --- an older file --------------------------------------------------------------------------------------------------


def test_a_store_of_version_1_reads_right_today(old: Path) -> None:
    with SqliteStore(old, machines=MACHINES) as store:
        spec = MachineSpec(name="web", machine="pc-q35-7.2", disks=(DiskSpec(name="vda", size=1 << 20),))
        process = Process(
            pid=4242, start_ticks=123456, boot_id="b0071d", started=1700000002.5, accel="tcg", qemu_version="7.2.22"
        )
        assert store.machines() == (
            Machine(
                name="web",
                uuid="6a8c0f2e-5d1b-4c3a-9e7f-0123456789ab",
                host="oldhost",
                spec=spec,
                created=1700000000.25,
                current="before",
                process=process,
            ),
        )
        (chain,) = store.chains("web")
        assert [(found.id, found.path, found.backing, found.owned) for found in chain.layers] == [
            ("vda-1", f"{MACHINES}/web/vda-1.qcow2", None, True),
            ("vda-2", f"{MACHINES}/web/vda-2.qcow2", "vda-1", True),
        ]
        assert store.snapshots("web") == (
            Snapshot(
                name="before",
                kind="disk",
                state="ok",
                parent=None,
                created=1700000001.5,
                description="a note",
                mode="live",
                points=(Point(disk="vda", layer=LayerId("vda-1")),),
                operation=OperationId(2),
                pause_ms=3.75,
            ),
        )
        assert [(found.id, found.verb, found.state) for found in store.operations("web")] == [
            (1, "define", "settled"),
            (2, "create", "settled"),
        ]
        assert store.next_serial() == 3


def test_what_an_older_snapshot_has_reached_is_told_by_its_memory(path: Path) -> None:
    schema.connect(path, migrations=MIGRATIONS[:3]).close()
    kinds = {"disk": (None, None), "full": ("{}", None), "inside": (None, "{}"), "inside-disks": (None, None)}
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "INSERT INTO machine (id, name, uuid, host, spec, created) VALUES (1, 'w', 'u', 'h', '{}', 1)"
        )
        for name, memory in kinds.items():
            connection.execute(
                "INSERT INTO snapshot (machine, name, kind, state, created, description, mode, operation, vmstate,"
                " inside) VALUES (1, ?, 'disk', 'ok', 1, '', 'live', 1, ?, ?)",
                (name, *memory),
            )
        connection.commit()
    schema.connect(path).close()
    assert ask(path, "SELECT name, level FROM snapshot ORDER BY id") == [
        ("disk", "crash"),
        ("full", "ram"),
        ("inside", "ram"),
        ("inside-disks", "crash"),
    ]
    assert path.with_name("store.db.v3").exists()


def test_the_frozen_version_1_has_the_schema_that_the_first_migration_makes(old: Path, tmp_path: Path) -> None:
    with closing(schema.connect(tmp_path / "fresh.db", migrations=MIGRATIONS[:1])):
        pass
    question = "SELECT type, name, sql FROM sqlite_schema ORDER BY name"
    assert ask(old, question) == ask(tmp_path / "fresh.db", question)


@pytest.mark.usefixtures("careless_umask")
def test_an_older_store_is_migrated_and_a_private_copy_of_it_kept_that_still_opens(old: Path) -> None:
    with closing(schema.connect(old, migrations=(*MIGRATIONS, NEXT))) as connection:
        assert connection.execute("SELECT name, note FROM machine").fetchall() == [("web", "new")]
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
    copy = old.with_name("store.db.v1")
    assert mode(copy) == 0o600
    with closing(schema.connect(copy)) as connection:
        assert connection.execute("SELECT name FROM machine").fetchall() == [("web",)]
    with pytest.raises(StoreTooNew):
        schema.connect(old)


def test_a_store_is_migrated_once(old: Path) -> None:
    schema.connect(old, migrations=(*MIGRATIONS, NEXT)).close()
    copy = old.with_name("store.db.v1")
    copy.unlink()
    schema.connect(old, migrations=(*MIGRATIONS, NEXT)).close()
    assert not copy.exists()


def test_a_fresh_store_takes_every_migration_and_keeps_no_copy(path: Path) -> None:
    with closing(schema.connect(path, migrations=(*MIGRATIONS, NEXT))) as connection:
        assert connection.execute("SELECT count(*) FROM extra").fetchone() == (0,)
    assert [found.name for found in path.parent.iterdir()] == ["store.db"]


def test_a_migration_that_fails_half_way_leaves_the_store_as_it_was(old: Path) -> None:
    with SqliteStore(old, machines=MACHINES) as store:
        before = everything(store)
    content = sorted(map(str, ask(old, "SELECT * FROM sqlite_schema")))
    half = f"{NEXT}; DROP TABLE nowhere"
    with pytest.raises(HostCannot, match="no such table"):
        schema.connect(old, migrations=(*MIGRATIONS, half))
    assert sorted(map(str, ask(old, "SELECT * FROM sqlite_schema"))) == content
    assert ask(old, "PRAGMA user_version") == [(len(MIGRATIONS),)]
    with SqliteStore(old, machines=MACHINES) as store:
        assert everything(store) == before


def test_where_no_copy_can_be_kept_nothing_is_migrated(old: Path) -> None:
    old.with_name("store.db.v1").mkdir()
    with pytest.raises(HostCannot):
        schema.connect(old, migrations=(*MIGRATIONS, NEXT))
    assert ask(old, "PRAGMA user_version") == [(1,)]


# --- files that are not for us --------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_newer_store_is_refused_and_stays_byte_for_byte(path: Path, journal: str) -> None:
    schema.connect(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    before = digest(path)
    with pytest.raises(StoreTooNew, match="nothing was changed") as caught:
        SqliteStore(path, machines=MACHINES)
    assert (caught.value.exit_code, caught.value.effect) == (7, "none")
    assert digest(path) == before
    assert [found.name for found in path.parent.iterdir()] == ["store.db"]


def test_another_programs_database_is_refused_and_stays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    before = digest(path)
    with pytest.raises(StoreMismatch, match="another program"):
        SqliteStore(path, machines=MACHINES)
    assert digest(path) == before


def test_a_file_that_is_no_database_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"This is no database. " * 100)
    before = digest(path)
    with pytest.raises(StoreMismatch, match="damaged") as caught:
        SqliteStore(path, machines=MACHINES)
    assert caught.value.exit_code == 7
    assert digest(path) == before


def test_damage_that_is_found_later_is_a_mismatch_too(old: Path) -> None:
    SqliteStore(old, machines=MACHINES).close()  # a migration would meet it at once
    (page_of_machine,) = ask(old, "SELECT rootpage FROM sqlite_schema WHERE name = 'machine'")[0]
    (size,) = ask(old, "PRAGMA page_size")[0]
    with old.open("r+b") as file:
        file.seek((int(str(page_of_machine)) - 1) * int(str(size)))
        file.write(b"\xee" * int(str(size)))
    with SqliteStore(old, machines=MACHINES) as store, pytest.raises(StoreMismatch, match="damaged"):
        store.machines()


def test_where_a_folder_cannot_be_made_the_host_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostCannot, match=r"cannot be written: .*; nothing was changed") as caught:
        SqliteStore(tmp_path / "file" / "below" / "store.db", machines=MACHINES)
    assert (caught.value.exit_code, caught.value.hint) == (9, f"check the permissions of {tmp_path} and its contents")


@pytest.mark.parametrize(
    "spec", ['{"name":"web","extra":["-device","a,b=\\"\u00e4;\\""]}', '{"name":"web"}', "no spec"]
)
def test_whoever_had_further_arguments_before_has_agreed_to_these(old: Path, spec: str) -> None:
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("UPDATE machine SET spec = ? WHERE name = 'web'", (spec,))
        connection.commit()
    schema.connect(old).close()
    ((found,),) = ask(old, "SELECT consent FROM machine WHERE name = 'web'")
    assert (found is None) == ("extra" not in spec)
    if found:
        assert msgspec.json.decode(str(found), type=Consent) == Consent(extra=("-device", 'a,b="\u00e4;"'))


# --- one that can only be read ---------------------------------------------------------------------------------------


def refused(number: int) -> HostCannot:
    """As opening it for writing has failed."""
    error = HostCannot("the store cannot be written")
    error.__cause__ = sqlite3.OperationalError("said by SQLite")
    error.__cause__.sqlite_errorcode = number
    return error


def test_a_store_is_read_as_its_file_has_it_only_where_that_is_all(path: Path) -> None:
    full = refused(sqlite3.SQLITE_IOERR)
    with SqliteStore(path, machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        assert path.with_name("store.db-wal").stat().st_size
        assert schema.readable(path, full) is None, "what was changed last stands in the -wal file alone"
    reading = schema.readable(path, full)
    assert reading
    with closing(reading):
        assert reading.execute("SELECT name FROM machine").fetchall() == [("web",)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reading.execute("DELETE FROM machine")
    assert schema.readable(path, refused(sqlite3.SQLITE_BUSY)) is None, "others work with it"


def test_an_older_store_is_not_read_without_its_migrations(old: Path) -> None:
    assert schema.readable(old, refused(sqlite3.SQLITE_FULL)) is None


# --- no space -------------------------------------------------------------------------------------------------------


def fill(store: SqliteStore) -> None:
    """No page more for this connection, as on a full disk."""
    (pages,) = store._database.connection.execute("PRAGMA page_count").fetchone()
    store._database.connection.execute(f"PRAGMA max_page_count={pages}")


def large() -> Change:
    """More than fits into what the pages at hand have left."""
    return Change(
        layers=tuple(layer(f"vda-{number}", path=f"/images/{number}-{'x' * 200}") for number in range(10, 200))
    )


@pytest.mark.parametrize(
    "attempt",
    [
        lambda store, number: store.settle(number, "web", large()),
        lambda store, number: store.mark(number, "failed", error="x" * 100_000),
    ],
    ids=["settle", "mark"],
)
def test_on_a_full_disk_a_change_is_refused_and_nothing_recorded(
    path: Path, attempt: Callable[[SqliteStore, OperationId], None]
) -> None:
    with SqliteStore(path, machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        pending = opened(store)
        before = everything(store)
        fill(store)
        with pytest.raises(HostCannot, match="full; nothing was changed") as caught:
            attempt(store, pending.id)
        assert (caught.value.exit_code, caught.value.effect) == (9, "none")
        assert everything(store) == before
        assert store.operations("web", only_open=True) == (pending,)
        store._database.connection.execute("PRAGMA max_page_count=100000")
        attempt(store, pending.id)  # with space again it goes on as if nothing had been
        assert store.operations("web", only_open=True) == ()


def test_a_locked_store_is_the_hosts_trouble_not_a_crash(path: Path) -> None:
    with SqliteStore(path, machines=MACHINES) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        defined(store, "web", layer("vda-1"))
        store._database.connection.execute("PRAGMA busy_timeout=10")
        other.execute("BEGIN IMMEDIATE")
        assert store.machines() == (machine("web"),)  # readers go on
        with pytest.raises(HostCannot, match="locked"):
            store.set_process("web", PROCESS)
        other.execute("ROLLBACK")
        settled(store, Change())
