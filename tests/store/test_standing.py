"""A COMMIT that fails: what stands in the file decides, and it is on the disk before anything builds on it.

The C library's calls fail by a shim that GCC makes; where there is none these tests say that they did not run.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpsnap.errors import HostCannot
from qmpsnap.store.sqlite import durability
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.harness import failing
from tests.store.samples import MACHINES, skip_to

BEFORE = """
import os, sys
from pathlib import Path
from qmpsnap.errors import HostCannot, OperationPending
from qmpsnap.store.sqlite import durability
from qmpsnap.store.sqlite.backend import SqliteStore

from tests.harness import failing
from tests.store.samples import skip_to

def fail(times):
    failing.fail("fsync fdatasync", times=times)

path = Path(sys.argv[1])
def opened():
    return SqliteStore(path, machines=Path("/machines"))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return failing.built(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def run(shim: Path, tmp_path: Path) -> Callable[[str], str]:
    def run(code: str) -> str:
        environment = {**os.environ, "LD_PRELOAD": str(shim)}
        argv = [sys.executable, "-c", BEFORE + code, str(tmp_path / "store.db")]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_change_whose_commit_failed_is_one_or_none(run: Callable[[str], str], tmp_path: Path) -> None:
    said = run("""
with opened() as store, opened():  # beside another that keeps the frames where they are
    fail(1)
    try:
        skip_to(store, 40)
        print("done", store.next_serial())
    except HostCannot as error:
        print(error.effect, "nothing was changed" in str(error), store.next_serial())
""")
    assert said in {"done 40", "none True 1"}
    assert _serial(tmp_path) == int(said.split()[-1])


def test_what_stands_was_done(run: Callable[[str], str], tmp_path: Path) -> None:
    """As where another process has read the frames by the time that this one looks."""
    said = run("""
class Standing:
    def __init__(self, real): self.real = real
    def __getattr__(self, name): return getattr(self.real, name)
    def execute(self, text, *rest):
        found = self.real.execute(text, *rest)
        if text == "COMMIT":
            import sqlite3
            raise sqlite3.OperationalError("disk I/O error")
        return found

with opened() as store:
    store._database.connection = Standing(store._database.connection)
    skip_to(store, 40)
    print(store.next_serial())
""")
    assert said == "40"
    assert _serial(tmp_path) == 40


def test_until_the_disk_takes_it_the_outcome_is_unknown_and_nothing_is_read_or_changed(
    run: Callable[[str], str], tmp_path: Path
) -> None:
    said = run("""
def attempt(call):
    try:
        call()
    except HostCannot as error:
        return error.effect
    return "done"

with opened() as store:
    fail(1000)
    print(*(attempt(call) for call in (
        lambda: skip_to(store, 40), store.next_serial, store.machines, store.require_writable,
        lambda: skip_to(store, 50),
    )))
    fail(0)
    first = store.next_serial()
    skip_to(store, 60)
    print(first, store.next_serial())
""")
    first, second = said.splitlines()
    assert first == "unknown unknown unknown unknown unknown"
    assert second in {"1 60", "40 60"}
    assert _serial(tmp_path) == 60


def test_the_next_process_changes_nothing_before_what_it_found_is_on_the_disk(
    run: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("""
store = opened()
skip_to(store, 40)
os._exit(0)  # its frames stay, as those that no fsync has taken
""")
    store = tmp_path / "store.db"
    assert durability.has_frames(store)
    said = run("""
with opened() as store:
    fail(1000)
    try:
        store.require_writable()
    except HostCannot as error:
        print(error.effect, "nothing was changed" in str(error), store.next_serial(), flush=True)
    os._exit(0)
""")
    assert said == "none True 40"  # reading needs no such thing
    again: list[Path] = []
    monkeypatch.setattr(durability, "write_again", again.append)
    with SqliteStore(store, machines=MACHINES) as found:
        found.require_writable()
        skip_to(found, 60)
    assert list(map(Path, again)) == [store]


def test_frames_are_written_again_as_they_were(tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    with SqliteStore(store, machines=MACHINES) as found:
        skip_to(found, 40)
        file = Path(durability.frames(store))
        before, written = file.read_bytes(), file.stat().st_mtime_ns
        os.utime(file, ns=(0, 0))
        durability.write_again(store)
        assert file.read_bytes() == before
        assert file.stat().st_mtime_ns >= written
    with pytest.raises(FileNotFoundError):
        durability.write_again(tmp_path / "none" / "store.db")


def test_a_store_that_went_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with SqliteStore(path, machines=MACHINES) as store:
        store._database._doubt = OSError("no fsync")
        path.unlink()
        with pytest.raises(HostCannot) as caught:
            store.machines()
        assert caught.value.effect == "unknown"
        assert not path.exists()


def test_few_transactions_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability, "KEPT", 5)
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        for number in range(1, 20):
            skip_to(store, number)
        with store._database.reading() as sql:
            assert sql.execute("SELECT count(*) FROM committed").fetchone() == (5,)


def _serial(folder: Path) -> int:
    with SqliteStore(folder / "store.db", machines=MACHINES) as store:
        return store.next_serial()
