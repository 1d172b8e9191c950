"""What is written down beside the store: before it settles, durably, and readable after a crash in the middle."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, NotFoundError
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.store import records as written
from qmpsnap.store.records import Place, Records
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.store.samples import MACHINES, PROCESS, defined, layer, machine, opened, settled


def places(store: SqliteStore, machine: str) -> list[str]:
    return [found.path for found in store.places(machine)]


def test_a_machine_is_read_as_it_was_defined_without_what_passes(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    records.write(replace(machine("web"), process=PROCESS, current="s1"))
    assert records.machines() == (machine("web"),)
    assert records.has(replace(machine("web"), current="s2"))
    assert not records.has(replace(machine("web"), uuid="another"))


def test_a_line_that_a_crash_has_cut_harms_no_other(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    first, second = (Place(layer=layer(name, path=f"/elsewhere/{name}")) for name in ("vda-1", "vda-2"))
    records.add("web", [first])
    with (tmp_path / "records" / "web.places").open("ab") as file:
        file.write(b'{"layer": {"id": "vda-')
    records.add("web", [second])
    assert records.places("web") == (first, second)


def test_notes_that_cannot_be_read_are_not_none(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    assert records.places("web") == ()
    (tmp_path / "records" / "web.places").mkdir(parents=True)
    with pytest.raises(HostCannot, match=r"web\.places cannot be read: Is a directory"):
        records.places("web")


def test_only_what_nobody_would_find_is_noted(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        base = layer("vda-1", path="/images/base", owned=False)
        defined(store, "web", base, layer("vda-2", base))
        settled(store, Change(layers=(layer("vda-3", path="/elsewhere/mine"),)))
        settled(store, Change(layers=(layer("vda-4", path=f"{MACHINES}/web/mine.qcow2"),)))
        assert places(store, "web") == ["/images/base", "/elsewhere/mine", f"{MACHINES}/web/mine.qcow2"]
        assert store.remembered("web")
        store.forget("web")
        assert (store.places("web"), store.remembered("web")) == ((), None)


def test_what_cannot_be_written_down_is_not_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))

        def full(descriptor: int) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(HostCannot, match="No space"):
            settled(store, Change(layers=(layer("vda-3", path="/elsewhere/mine"),)))
        with pytest.raises(NotFoundError):
            store.layer(LayerId("vda-3"))


def test_a_machine_that_another_store_wrote_down_is_lost_to_this_one(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        assert store.lost() == ()
    (tmp_path / "store.db").unlink()
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        assert store.lost() == ("web",)
        store.undescribe(replace(machine("web"), uuid="another"))
        assert store.lost() == ("web",)
        defined(store, "db", layer("vda-2"))
        opened(store, "web")
        assert store.lost() == (), "what is being defined is no lost machine"


def test_what_was_removed_is_no_place_any_more(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        mine = layer("vda-3", path="/elsewhere/mine")
        settled(store, Change(layers=(mine,)))
        settled(store, Change(removed_layers=(mine.id,)))
        assert store.places("web") == ()
        settled(store, Change(layers=(mine,)))
        assert places(store, "web") == ["/elsewhere/mine"]


@pytest.mark.parametrize("how", ["removed", "forgotten"])
def test_what_another_machine_removed_is_no_place_any_more(tmp_path: Path, how: str) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        base = layer("vda-1")
        defined(store, "web", base)
        mine = layer("vda-3", base, path="/elsewhere/mine")
        settled(store, Change(layers=(mine,)))
        defined(store, "clone", layer("vda-4", mine))
        if how == "forgotten":
            assert [gone.id for gone in store.forget("clone")] == ["vda-4", "vda-3"]
        else:
            settled(store, Change(layers=(layer("vda-4", base),), removed_layers=(mine.id,)), "clone")
        assert store.places("web") == ()


def test_a_machine_whose_forgetting_was_broken_off_is_there_or_gone_and_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        forget = Records.forget

        def dying(records: Records, name: str) -> None:
            forget(records, name)
            raise KeyboardInterrupt

        monkeypatch.setattr(Records, "forget", dying)
        with pytest.raises(KeyboardInterrupt):
            store.forget("web")
        assert not store.is_described(store.machine("web")), "which check finds and repairs"
        assert store.lost() == ()


def test_places_that_are_gone_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "LARGE", 2000)
    found = Records(tmp_path / "records")
    stays, away, left = (
        Place(layer=layer("vda-1", path=str(tmp_path / "stays"))),
        Place(layer=layer("vda-2", path=str(tmp_path / "unmounted" / "away")), gone=True),
        Place(layer=layer("vda-3", path=str(tmp_path / "left")), gone=True),
    )
    (tmp_path / "left").touch()  # the store has it no more, and it must not be taken for a layer of a lost store
    found.add("web", [stays, away, left])
    sizes = []
    for number in range(4, 100):
        passing = layer(f"vda-{number}", path=str(tmp_path / f"{number}"))
        found.add("web", [Place(layer=passing)])
        found.add("web", [Place(layer=passing, gone=True)])
        sizes.append(found.places_file("web").stat().st_size)
    assert max(sizes) < 4000
    assert found.places("web")[:3] == (stays, away, left)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["web.places"]
