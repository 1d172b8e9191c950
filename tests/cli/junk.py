"""What no qmpsnap has written in each column and file of a home: every verb ends as an error of ours, or not at all.

``python -m tests.cli.junk HOME EVERY FROM`` takes every so many-th case; it prints what is not so.
"""

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from qmpsnap.model.home import Home
from tests.cli import forked

SPEC = "name: a\nmemory: 16M\nagent: false\nnics: none\ndisks:\n  - {name: vda, size: 1M}\n"
VALUES: tuple[object, ...] = (
    b"\xff\xfe\x00junk",
    "junk \x00 \x1b[31m",
    -1,
    2**62,
    1e308,
    '{"a": [1, {"b": null}]}',
    "[" * 5000,
    "null",
    "",
    "../../../etc/passwd",
    None,
)
"""What is put into a column, as far as that takes it."""
BYTES = (b"", b"\x00" * 600, b"\xff" * 600, b"junk\n", b'{"name": 5}\n', b"[" * 100_000, b'{"a":' * 9000)
"""What is put into a file."""
VERBS = (
    ["list"],
    ["show", "a"],
    ["snapshot", "list", "a"],
    ["chain", "a"],
    ["log", "a"],
    ["check", "a", "--deep"],
    ["doctor"],
    ["snapshot", "create", "a", "new"],
    ["snapshot", "delete", "a", "s1"],
    ["revert", "a", "s1", "--discard"],
    ["recover", "a"],
    ["relocate", "--dry-run"],
    ["check", "--rebuild", "--dry-run"],
    ["undefine", "a", "--keep-disks"],
)
FAMILIES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}


def told(words: list[str]) -> tuple[int, str]:
    return forked.served(json.dumps({"words": words, "streams": {"1": "/dev/null"}}))


def columns(store: Path) -> Iterator[tuple[str, str]]:
    """Every column of every table."""
    with sqlite3.connect(store) as sql:
        tables = [name for (name,) in sql.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        for table in tables:
            if not table.startswith("sqlite_"):
                yield from ((table, row[1]) for row in sql.execute(f"PRAGMA table_info({table})"))


def put(store: Path, table: str, column: str, value: object) -> None:
    """Into one row, without SQLite's checks."""
    with sqlite3.connect(store, isolation_level=None) as sql:
        sql.execute("PRAGMA ignore_check_constraints = 1")
        sql.execute("PRAGMA foreign_keys = 0")
        row = f"(SELECT max(rowid) FROM {table})"  # noqa: S608
        try:
            sql.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = {row}", (value,))  # noqa: S608
        except sqlite3.Error:
            return


def cases(home: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is put where, and how."""
    store = home / "qmpsnap.db"
    for table, column in list(columns(store)):
        for value in VALUES:
            yield f"{table}.{column} = {value!r:.60}", partial(put, store, table, column, value)
    files = [path for path in sorted(home.rglob("*")) if path.is_file() and path.stat().st_size < 1 << 22]
    for path in files:
        for said in BYTES:
            yield f"{path.name} holds {said[:12]!r}...", partial(path.write_bytes, said)


def kept(home: Path, to: Path, *, back: bool = False) -> None:
    """Every file's bytes put aside, or written back into the same file."""
    for source in sorted((to if back else home).rglob("*")):
        target = (home if back else to) / source.relative_to(to if back else home)
        if source.is_dir():
            target.mkdir(exist_ok=True, mode=0o700)
        elif source.is_file():
            if not target.exists():
                shutil.copy2(source, target)
            target.write_bytes(source.read_bytes())
            status = source.stat()
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    if back:
        for path in home.rglob("*"):
            if path.is_file() and not (to / path.relative_to(home)).exists():
                path.unlink()


def wrong(home: Path, aside: Path, every: int, first: int) -> Iterator[str]:
    """What is not as it should be."""
    for number, (what, change) in enumerate(islice(cases(home), first, None, every)):
        words = VERBS[number % len(VERBS)]
        change()
        code, said = told(words)
        if code not in FAMILIES or "Traceback" in said or "Error:" in said:
            yield f"{what}: {words} ends with {code}: {said[-900:]}"
        kept(home, aside, back=True)


if __name__ == "__main__":
    forked.load()
    place = Path(sys.argv[1])
    (place / "spec.yaml").write_text(SPEC)
    told(["define", str(place / "spec.yaml")])
    for name in ("s1", "s2"):
        told(["snapshot", "create", "a", name])
    at = Home.from_environment(dict(os.environ), uid=os.geteuid()).data
    told(["list"])  # which takes what lies in the write-ahead log over
    put_aside = place.with_name(f"{place.name}-kept")
    put_aside.mkdir()
    kept(at, put_aside)
    for line in wrong(at, put_aside, int(sys.argv[2]), int(sys.argv[3])):
        sys.stdout.write(f"{line}\n")
