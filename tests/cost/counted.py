"""Runs one command line of qmpsnap and counts what it costs, as far as that does not depend on the host.

``python -m tests.cost.counted LOG WORD...`` runs with the shim of :mod:`tests.harness.failing` and writes a line to LOG
for each QMP command, SQL statement and process, and for each fsync and write to a file below ``QMPSNAP_HOME``. Its
forks are included, the programs that it starts are not.
"""

import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from msgspec import Struct

from tests.harness import failing

ROOT = Path(__file__).parents[2]
BLOCK = 4096
"""Bytes that a write is rounded up to: a number that has a digit more is not a cost."""


class Cost(Struct, frozen=True):
    """What one command costs: how often, by name."""

    qmp: Counter[str]
    sql: Counter[str]
    processes: Counter[str]
    fsyncs: Counter[str]
    blocks: Counter[str]


def cost(words: Sequence[str], *, folder: Path, shim: Path) -> Cost:
    """What a command of qmpsnap costs, which must succeed; ``folder`` is its home."""
    return counted([sys.executable, "-m", __name__], words, folder=folder, shim=shim)


def counted(program: Sequence[str], words: Sequence[str], *, folder: Path, shim: Path) -> Cost:
    """The same of a program that counts itself by :func:`count`."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    told = {"QMPSNAP_HOME": str(folder / "home"), "LD_PRELOAD": str(shim), "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
    subprocess.run([*program, str(log), *words], cwd=ROOT, env={**os.environ, **told}, check=True)
    return read(log, below=folder / "home")


def read(log: Path, *, below: Path) -> Cost:
    """What was counted."""
    found: Mapping[str, Counter[str]] = {name: Counter() for name in Cost.__struct_fields__}
    for line in log.read_text().splitlines():
        call, what, *rest = line.split("\t")
        match call:
            case "fsync" | "fdatasync":
                found["fsyncs"][kind(what, below)] += 1
            case "write" | "pwrite" if not what.endswith("-shm"):  # memory that SQLite's users share
                found["blocks"][kind(what, below)] += -(-int(rest[1]) // BLOCK)
            case "qmp" | "sql" | "processes":
                found[call][what] += 1
    return Cost(**found)


def kind(path: str, below: Path) -> str:
    """What a file is: its place, without the numbers in its name; the cache's are named after the host's QEMU."""
    found = str(Path(path).relative_to(below))
    return "cache" if found.startswith("cache/") else re.sub(r"-\d+", "-N", found)


# --- in the process that is counted -----------------------------------------------------------------------------------


def count(log: Path, *, below: Path) -> None:
    """Count from now on, in this process and its forks."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(call: str, what: str) -> None:
        os.write(descriptor, f"{call}\t{what}\n".encode())

    _count_processes(note)
    _count_sql(note)
    _count_qmp(note)
    failing.log(log, below=str(below))


def _count_processes(note: Any) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            words = [str(word) for word in arguments[1]]
            scripts = [Path(word).name for word in words if word.endswith(".py")]
            note("processes", Path(words[0]).name if not scripts else scripts[0])
        elif event in ("os.fork", "os.posix_spawn"):
            note("processes", event)

    sys.addaudithook(hook)


def _count_sql(note: Any) -> None:
    real = sqlite3.connect

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        made: sqlite3.Connection = real(*arguments, **options)
        made.set_trace_callback(lambda statement: note("sql", statement.split(maxsplit=1)[0].upper()))
        return made

    sqlite3.connect = connect  # type: ignore[assignment]


def _count_qmp(note: Any) -> None:
    from qmpsnap.qmp.session import Session

    real = Session.execute

    async def execute(session: Session, command: str, *arguments: Any, **options: Any) -> Any:
        note("qmp", command)
        return await real(session, command, *arguments, **options)

    Session.execute = execute  # type: ignore[method-assign,assignment]


def _run() -> NoReturn:
    from qmpsnap.cli.main import run

    count(Path(sys.argv[1]), below=Path(os.environ["QMPSNAP_HOME"]))
    sys.argv[:] = ["qmpsnap", *sys.argv[2:]]
    run()


if __name__ == "__main__":
    _run()
