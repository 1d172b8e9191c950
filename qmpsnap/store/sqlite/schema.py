"""The store's tables and how an older file becomes a newer one.

Each migration and the number that records it share one SQL transaction; before any is applied to a file with
content, a copy is kept beside it. A file from a newer qmpsnap is refused, never guessed at.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3

from qmpsnap.errors import HostCannot, StoreMismatch, StoreTooNew
from qmpsnap.host import files

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpsnap.host.files import Name

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE serial (last INTEGER NOT NULL) STRICT;
    INSERT INTO serial VALUES (0);
    CREATE TABLE machine (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, uuid TEXT NOT NULL UNIQUE, host TEXT NOT NULL,
        spec TEXT NOT NULL, created REAL NOT NULL,
        current INTEGER REFERENCES snapshot (id) DEFERRABLE INITIALLY DEFERRED,
        version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE TABLE process (
        machine INTEGER PRIMARY KEY REFERENCES machine (id) ON DELETE CASCADE, pid INTEGER NOT NULL,
        start_ticks INTEGER NOT NULL, boot_id TEXT NOT NULL, started REAL NOT NULL, accel TEXT NOT NULL,
        qemu_version TEXT NOT NULL, version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE TABLE layer (
        id TEXT PRIMARY KEY, pool TEXT NOT NULL, path TEXT NOT NULL, format TEXT NOT NULL,
        backing TEXT REFERENCES layer (id) DEFERRABLE INITIALLY DEFERRED, virtual_size INTEGER NOT NULL,
        device INTEGER NOT NULL, inode INTEGER NOT NULL, owned INTEGER NOT NULL, state TEXT NOT NULL,
        version INTEGER NOT NULL DEFAULT 1, UNIQUE (pool, path)
    ) STRICT;
    CREATE INDEX layer_backing ON layer (backing);
    CREATE TABLE disk (
        machine INTEGER NOT NULL REFERENCES machine (id) ON DELETE CASCADE, name TEXT NOT NULL,
        position INTEGER NOT NULL, active TEXT NOT NULL REFERENCES layer (id) DEFERRABLE INITIALLY DEFERRED,
        version INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (machine, name)
    ) STRICT;
    CREATE TABLE snapshot (
        id INTEGER PRIMARY KEY, machine INTEGER NOT NULL REFERENCES machine (id) ON DELETE CASCADE,
        name TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
        parent INTEGER REFERENCES snapshot (id) DEFERRABLE INITIALLY DEFERRED, created REAL NOT NULL,
        description TEXT NOT NULL, mode TEXT NOT NULL, pause_ms REAL, operation INTEGER NOT NULL,
        version INTEGER NOT NULL DEFAULT 1, UNIQUE (machine, name)
    ) STRICT;
    CREATE TABLE point (
        snapshot INTEGER NOT NULL REFERENCES snapshot (id) ON DELETE CASCADE, disk TEXT NOT NULL,
        position INTEGER NOT NULL, layer TEXT NOT NULL REFERENCES layer (id) DEFERRABLE INITIALLY DEFERRED, tag TEXT,
        PRIMARY KEY (snapshot, disk)
    ) STRICT;
    CREATE INDEX point_layer ON point (layer);
    CREATE TABLE operation (
        id INTEGER PRIMARY KEY, machine TEXT NOT NULL, verb TEXT NOT NULL, state TEXT NOT NULL, step TEXT NOT NULL,
        plan TEXT NOT NULL, started REAL NOT NULL, updated REAL NOT NULL, pid INTEGER NOT NULL, error TEXT,
        version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    CREATE INDEX operation_open ON operation (machine, state);
    """,
    """
    ALTER TABLE machine ADD COLUMN adopted TEXT;
    """,
    """
    ALTER TABLE snapshot ADD COLUMN vmstate TEXT;
    ALTER TABLE snapshot ADD COLUMN inside TEXT;
    ALTER TABLE snapshot ADD COLUMN variables TEXT;
    """,
    """
    ALTER TABLE snapshot ADD COLUMN level TEXT NOT NULL DEFAULT 'crash';
    ALTER TABLE snapshot ADD COLUMN unquiesced TEXT NOT NULL DEFAULT '';
    UPDATE snapshot SET level = 'ram' WHERE vmstate IS NOT NULL OR inside IS NOT NULL;
    """,
    """
    ALTER TABLE operation ADD COLUMN before TEXT;
    ALTER TABLE operation ADD COLUMN effect TEXT;
    ALTER TABLE operation ADD COLUMN outcome TEXT;
    """,
    """
    ALTER TABLE layer ADD COLUMN birth INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE home (
        one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL, path TEXT NOT NULL, moving TEXT,
        version INTEGER NOT NULL DEFAULT 1
    ) STRICT;
    """,
    """
    ALTER TABLE snapshot ADD COLUMN pushed INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE snapshot ADD COLUMN frozen_ms REAL;
    ALTER TABLE snapshot ADD COLUMN max_pause_ms REAL;
    """,
    """
    CREATE TABLE frozen (layer TEXT PRIMARY KEY, mtime_ns INTEGER NOT NULL, size INTEGER NOT NULL) STRICT;
    """,
    """
    CREATE TABLE committed (id INTEGER PRIMARY KEY, number INTEGER NOT NULL) STRICT;
    """,
    """
    ALTER TABLE machine ADD COLUMN consent TEXT;
    UPDATE machine SET consent = json_object('extra', json_extract(spec, '$.extra'))
        WHERE CASE WHEN json_valid(spec) THEN json_array_length(spec, '$.extra') END > 0;
    """,
    """
    CREATE TABLE pruned (machine TEXT PRIMARY KEY, count INTEGER NOT NULL, until REAL NOT NULL) STRICT;
    CREATE INDEX operation_ended ON operation (updated) WHERE state IN ('settled', 'failed');
    """,
    """
    CREATE TABLE stamp (
        layer TEXT NOT NULL, since INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, size INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (layer, since)
    ) STRICT;
    INSERT INTO stamp SELECT layer, 0, mtime_ns, size, 0, '' FROM frozen;
    DROP TABLE frozen;
    """,
    """
    ALTER TABLE machine ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE INDEX disk_active ON disk (active);
    CREATE INDEX layer_file ON layer (inode, device);
    CREATE INDEX snapshot_parent ON snapshot (parent);
    CREATE INDEX snapshot_operation ON snapshot (operation);
    CREATE INDEX machine_current ON machine (current);
    ALTER TABLE operation ADD COLUMN claimed INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX operation_pending ON operation (claimed, id) WHERE state IN ('planned', 'running', 'unknown');
    ALTER TABLE serial ADD COLUMN pruned REAL NOT NULL DEFAULT 0;
    CREATE TABLE claim (
        name TEXT NOT NULL, operation INTEGER NOT NULL REFERENCES operation (id) ON DELETE CASCADE,
        PRIMARY KEY (name, operation)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX claim_operation ON claim (operation);
    DELETE FROM stamp WHERE layer NOT IN (SELECT id FROM layer);
    """,
    """
    ALTER TABLE machine ADD COLUMN origin TEXT;
    CREATE INDEX machine_ephemeral ON machine (name) WHERE json_extract(origin, '$.ephemeral');
    """,
    """
    ALTER TABLE machine ADD COLUMN past TEXT;
    """,
    """
    ALTER TABLE layer ADD COLUMN storage TEXT NOT NULL DEFAULT 'file';
    ALTER TABLE layer ADD COLUMN identity TEXT NOT NULL DEFAULT '';
    CREATE INDEX layer_identity ON layer (identity) WHERE identity <> '';
    """,
    """
    ALTER TABLE snapshot ADD COLUMN tags TEXT;
    """,
    """
    ALTER TABLE process ADD COLUMN nodes TEXT NOT NULL DEFAULT '{}';
    """,
    """
    ALTER TABLE machine ADD COLUMN vmgenid TEXT;
    """,
)


_UNWRITABLE = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
)


def connect(path: Name, *, migrations: Sequence[str] = MIGRATIONS) -> sqlite3.Connection:
    """Open the store's file, making or migrating it as needed.

    Where it cannot be opened or written (``HostCannot``: rights, full disk) :func:`readable` may still read it.
    """
    try:
        files.make_folder(os.path.dirname(path))  # noqa: PTH120
        _make_private(path)
        connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.OperationalError) as error:
        raise _cannot(path, error) from error
    try:
        connection.execute("PRAGMA busy_timeout=5000")
        connection.execute("BEGIN")
        _refuse_foreign(connection, path, len(migrations))
        connection.execute("COMMIT")
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        migrate(connection, path, migrations)
    except (OSError, sqlite3.OperationalError) as error:
        connection.close()
        raise _cannot(path, error) from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise damaged(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def damaged(path: Name, error: sqlite3.Error) -> StoreMismatch:
    """The error for a file that SQLite cannot read."""
    from qmpsnap.hint import call

    return StoreMismatch(
        f"the store {path} is damaged: {error}",
        hint="put a copy of it back, or rebuild it: " + call("rebuild"),
    )


def nowhere() -> sqlite3.Connection:
    """An empty store without a file: what there is where no store was ever made."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for migration in MIGRATIONS:
        connection.executescript(migration)
    return connection


def readable(path: Name, why: HostCannot) -> sqlite3.Connection | None:
    """The store as its file alone has it, where that is all of it: nothing is written, not even by SQLite.

    Good for one transaction: what others write meanwhile would not be noticed. None where it has to be written to
    before it can be read, or others work with it.
    """
    if not _keeps_from_writing(why.__cause__) or _size(f"{path}-wal") or not _size(path):
        return None
    from pathlib import Path

    try:
        connection = sqlite3.connect(
            f"{Path(path).absolute().as_uri()}?immutable=1", uri=True, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error:
        return None
    try:
        if _version(connection) == len(MIGRATIONS):
            return connection
    except sqlite3.Error:
        pass
    connection.close()
    return None


def _cannot(path: Name, error: OSError | sqlite3.OperationalError) -> HostCannot:
    if not _keeps_from_writing(error):
        busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
        hint = "another command uses it: try again" if busy else ""
        return HostCannot(f"the store {path} cannot be used: {error}", hint=hint)
    from pathlib import Path

    from qmpsnap.host import write_errors

    what, remedy = write_errors.reason(Path(path).parent, error)
    return HostCannot(f"the store {path} cannot be written: {what}", hint=remedy)


def _keeps_from_writing(error: BaseException | None) -> bool:
    """Whether it is about the disk or rights, and not about what others do or what the file says."""
    return isinstance(error, OSError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNWRITABLE


def _size(path: Name) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:
        return 0


def migrate(connection: sqlite3.Connection, path: Name, migrations: Sequence[str]) -> None:
    """Apply the migrations the file lacks; see the module for what is kept and refused."""
    if _version(connection) == len(migrations):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = _version(connection)  # again under the lock: another process may have migrated meanwhile
        _refuse_foreign(connection, path, len(migrations))
        if found:
            _keep_copy(path, f"{path}.v{found}")
        for migration in migrations[found:]:
            for statement in filter(str.strip, migration.split(";")):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version={len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _make_private(path: Name) -> None:
    """Make the file before SQLite does: SQLite would give it the umask's mode, and its -wal file copies ours.

    Without opening it: closing any descriptor of a database drops the locks of every other connection in this process.
    """
    with contextlib.suppress(FileExistsError):
        os.mknod(path, 0o600)
        os.chmod(path, 0o600)  # noqa: PTH101 - a strange umask may have taken our own rights away


def _refuse_foreign(connection: sqlite3.Connection, path: Name, known: int) -> None:
    """Refuse, before anything is written to it, a file of a newer qmpsnap or of another program."""
    found = _version(connection)
    if found == 0 and connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
        raise StoreMismatch(
            f"{path} is a database of another program, not a store",
            hint="move it away, or set QMPSNAP_HOME to another folder",
        )
    if found > known:
        raise StoreTooNew(
            f"the store {path} has schema {found}; this version knows up to {known}",
            hint="use the version of qmpsnap that wrote it, or a newer one",
        )


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _keep_copy(path: Name, copy: Name) -> None:
    # A connection of its own: SQLite's backup cannot read through the one that holds the write lock.
    _make_private(copy)
    source, target = sqlite3.connect(path), sqlite3.connect(copy)
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
