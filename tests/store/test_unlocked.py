"""The records lie beside the images, on storage that may hang: nobody touches them while the store is locked."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.model.operations.operation import Change
from qmpsnap.store.records import Records
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.store.samples import MACHINES, created, defined, layer, opened


@pytest.mark.parametrize("name", ["read", "write", "forget", "names"])
def test_another_process_can_change_the_store_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, path, seen = getattr(Records, name), tmp_path / "store.db", []

    def touched(*arguments: Any, **named: Any) -> Any:
        seen.append(arguments)
        with sqlite3.connect(path, timeout=0, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        other.close()
        return real(*arguments, **named)

    with SqliteStore(path, machines=MACHINES) as store:
        monkeypatch.setattr(Records, name, touched)
        base = layer("vda-1")
        defined(store, "web", base)
        created(store, "s", base)
        store.apply("web", Change(renamed={"s": "t"}))
        store.mark(opened(store).id, "failed")
        store.records.lost()
        store.forget("web")
    assert seen
