"""The effect of an operation is what the store finds when it ends; of an older one nothing is known."""

from pathlib import Path

import pytest

from qmpsnap.model.operations.operation import Change
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.store.samples import MACHINES, created, defined, layer, opened

CHANGES = {
    "nothing": (Change(), "none", None),
    "a name that went": (Change(removed_snapshots=("s1",)), "applied", "snapshot s1 is gone"),
    "a new layer": (Change(layers=(layer("vda-9"),), active={"vda": layer("vda-9").id}), "applied", "vda-9"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_undone_has_the_effect_of_what_stays(tmp_path: Path, what: str) -> None:
    change, effect, outcome = CHANGES[what]
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", base := layer("vda-1"))
        created(store, "s1", base)
        operation = opened(store)
        assert operation.effect is None
        store.apply("web", change)
        store.mark(operation.id, "failed", error="it could not be done")
        found = store.operations("web")[-1]
        assert found.effect == effect
        assert (outcome in (found.outcome or "")) if outcome else found.outcome is None


def test_what_has_settled_was_done(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        store.settle(opened(store).id, "web", Change())
        assert store.operations("web")[-1].effect == "applied"


def test_of_an_operation_of_before_there_was_a_record_nothing_is_known(tmp_path: Path) -> None:
    with SqliteStore(tmp_path / "store.db", machines=MACHINES) as store:
        defined(store, "web", layer("vda-1"))
        operation = opened(store)
        with store._database.writing() as sql:
            sql.execute("UPDATE operation SET before = NULL WHERE id = ?", (operation.id,))
        store.mark(operation.id, "failed")
        assert store.operations("web")[-1].effect is None
