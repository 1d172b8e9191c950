"""The record beside a machine's images: written before the store settles, durably, and what it says of a store."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, NotFoundError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.record import Consent
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.store.records import Record, Records
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.sqlite.database import Database
from tests.store.samples import (
    MACHINES,
    PROCESS,
    created,
    defined,
    everything,
    layer,
    machine,
    opened,
    settled,
    snapshot,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def at(path: Path) -> SqliteStore:
    return SqliteStore(path, machines=MACHINES)


def written(name: str = "web") -> Record:
    found = Records(MACHINES).read(name)
    assert found
    return found


def grown(store: SqliteStore) -> Layer:
    """A machine with a consumed snapshot and one that was renamed, on layers here and elsewhere; the active layer."""
    base = layer("vda-0", path="/images/base", owned=False)
    top = layer("vda-1", base)
    defined(store, "web", base, top)
    top = created(store, "old", top)
    settled(store, Change(snapshots=(replace(store.snapshots("web")[0], state="consumed", description="Ünder"),)))
    mine = layer("vda-9", top, path="/elsewhere/mine")
    taken = snapshot("young", top, parent="old")
    settled(store, Change(layers=(mine,), active={"vda": mine.id}, snapshots=(taken,), current="young"))
    store.apply("web", Change(renamed={"young": "new"}, consent=Consent(extra=("-S",))))
    store.set_process("web", PROCESS)
    return mine


def test_it_has_all_but_what_passes(path: Path) -> None:
    with at(path) as store:
        top = grown(store)
        record = written()
        assert record.machine == replace(store.machine("web"), process=None, consent=None)
        assert (record.snapshots, record.active) == (store.snapshots("web"), {"vda": top.id})
        assert record.layers == store.chains("web")[0].layers
        assert store.records.is_current("web")
    assert stat.S_IMODE((MACHINES / "web" / "record.json").stat().st_mode) == 0o600


def test_a_store_is_made_again_from_it(path: Path, tmp_path: Path) -> None:
    with at(path) as store:
        grown(store)
        before, serial = everything(store), store.next_serial()
        store.apply("web", Change(consent=Consent(extra=("-S",))))
    with at(tmp_path / "other.db") as store:
        store.restore(written(), PROCESS)
        assert store.next_serial() == serial
        assert store.machine("web").consent is None
        store.apply("web", Change(consent=Consent(extra=("-S",))))
        assert everything(store) == before


def test_it_is_there_before_the_store_settles(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        operation = opened(store)

        def dying(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Database, "writing", dying)
        with pytest.raises(KeyboardInterrupt):
            store.settle(operation.id, "web", Change(layers=(layer("vda-3"),), active={"vda": LayerId("vda-3")}))
        monkeypatch.undo()
        assert written().active == {"vda": "vda-3"}
        assert store.chains("web")[0].active.id == "vda-1"
        assert not store.records.behind("web"), "the operation is open here"
        store.mark(operation.id, "failed", error="undone")
        assert written().active == {"vda": "vda-1"}


def test_what_cannot_be_written_is_not_settled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(HostCannot, match=r"record\.json\.part|cannot be written"):
            settled(store, Change(layers=(layer("vda-3"),)))
        with pytest.raises(NotFoundError):
            store.layer(LayerId("vda-3"))


def test_what_needs_no_operation_is_made_and_written_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        top = created(store, "one", layer("vda-1"))
        monkeypatch.setattr(Records, "write", refusing)
        store.apply("web", Change(renamed={"one": "two"}))
        assert not store.records.is_current("web")
        monkeypatch.undo()
        assert not store.records.behind("web")
        created(store, "three", top)
        assert [found.name for found in written().snapshots] == ["two", "three"]


def refusing(*_: object) -> None:
    raise HostCannot("the disk is full")


def test_an_operation_goes_on_only_with_a_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        operation = opened(store)
        (MACHINES / "web" / "record.json").unlink()
        monkeypatch.setattr(Records, "write", refusing)
        with pytest.raises(HostCannot):
            store.mark(operation.id, "running", step="0:started")
        assert store.operations("web")[-1].step == "planned"
        monkeypatch.undo()
        store.mark(operation.id, "unknown")
        assert written().machine.uuid == "uuid-of-web"


def another(store: SqliteStore) -> None:
    store.forget("web")
    settled(store, Change(define=replace(machine("web"), uuid="other"), layers=(layer("vda-1"),)))


LATER: dict[str, Callable[[SqliteStore], object]] = {
    "an operation": lambda store: created(store, "later", layer("vda-1")),
    "a new name": lambda store: store.apply("web", Change(renamed={"one": "two"})),
    "another machine of that name": another,
}


@pytest.mark.parametrize("what", LATER)
def test_an_old_copy_of_the_store_is_behind(path: Path, what: str) -> None:
    copy = path.with_name("copy.db")
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        created(store, "one", layer("vda-1"))
    shutil.copy2(path, copy)
    with at(path) as store:
        LATER[what](store)
        assert not store.records.behind("web")
    with at(copy) as store:
        assert store.records.behind("web")


def test_a_copy_that_was_made_in_the_middle_of_an_operation_goes_by_it(path: Path) -> None:
    copy = path.with_name("copy.db")
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        operation = opened(store)
        with at(path):  # whoever closes last writes the log into the file
            pass
    shutil.copy2(path, copy)
    with at(path) as store:
        store.settle(operation.id, "web", Change(layers=(layer("vda-3"),)))
    with at(copy) as store:
        assert not store.records.behind("web"), "its recovery asks the files"
    with at(path) as store:
        settled(store, Change(layers=(layer("vda-4"),)))
    with at(copy) as store:
        assert store.records.behind("web")


@pytest.mark.parametrize("junk", [b"", b"no json", b"[]", b'{"machine": 1}', b"\xff" * 100])
def test_one_that_says_nothing_is_written_again(path: Path, junk: bytes) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        (MACHINES / "web" / "record.json").write_bytes(junk)
        assert not store.records.behind("web")
        assert not store.records.is_current("web")
        created(store, "one", layer("vda-1"))
        assert store.records.is_current("web")


@pytest.mark.parametrize("name", ["record.json", "active.env", "active.json"])
def test_what_a_write_has_left_unfinished_goes_although_the_record_is_current(path: Path, name: str) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        part = MACHINES / "web" / f"{name}.part"
        part.write_bytes(b"{")
        assert store.records.is_current("web")
        store.records.keep("web")
        assert not part.exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a link"])
def test_what_is_no_file_is_replaced(path: Path, make: Callable[[Path], object]) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        (record := MACHINES / "web" / "record.json").unlink()
        make(record)
        assert not store.records.is_current("web")
        store.records.keep("web")
        assert record.is_file()
        assert store.records.is_current("web")


def test_a_machine_that_has_a_record_is_lost_to_a_store_without_it(path: Path) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        assert store.records.lost() == ()
    path.unlink()
    with at(path) as store:
        assert store.records.lost() == store.records.lost(wait=False) == ("web",)
        store.records.take_back(replace(machine("web"), uuid="another"))
        assert store.records.lost() == ("web",)
        defined(store, "db", layer("vda-2"))
        opened(store, "web")
        assert store.records.lost() == (), "what is being defined is no lost machine"


def test_a_machine_whose_forgetting_was_broken_off_is_there_or_gone_and_never_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at(path) as store:
        defined(store, "web", layer("vda-1"))
        forget = Records.forget

        def dying(records: Records, name: str) -> None:
            forget(records, name)
            raise KeyboardInterrupt

        monkeypatch.setattr(Records, "forget", dying)
        with pytest.raises(KeyboardInterrupt):
            store.forget("web")
        assert not store.records.is_current("web"), "which check finds and repairs"
        assert store.records.lost() == ()


def test_what_an_earlier_release_has_written_down_is_taken_over(path: Path) -> None:
    earlier = MACHINES.parent / "records"
    with at(path) as store:
        here = replace(machine("web"), host=os.uname().nodename)
        settled(store, Change(define=here, layers=(layer("vda-1"),), active={"vda": LayerId("vda-1")}))
    (MACHINES / "web" / "record.json").unlink()
    earlier.mkdir()
    for found in (here, replace(machine("gone"), name="gone")):
        said = msgspec.to_builtins(found) | {"home": {"id": "that", "path": "/there"}}
        (earlier / f"{found.name}.json").write_text(json.dumps(said))
    (earlier / "web.places").write_text("")
    assert Records(MACHINES).home()
    with at(path) as store:
        assert store.records.is_current("web")
        assert store.records.lost() == ("gone",)
        assert [found.name for found in earlier.iterdir()] == ["gone.json"]
        assert written("gone").generation < 0
