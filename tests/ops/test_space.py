"""How much room an operation needs: added up for each file system, step after step."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.errors import HostCannot
from qmpsnap.model.operations.operation import Change, Merge, Removal
from qmpsnap.model.planning.state import CLUSTER, Situation
from qmpsnap.ops.base import free_space
from qmpsnap.ops.base.free_space import Need, Room
from qmpsnap.ops.session.planning_state import require_space
from tests.ops.bench import MIB, chain
from tests.ops.test_mirror_plan import situation

STORE = Path("/store")


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Room]:
    """The file systems there are: ``/a`` and ``/b`` on one, ``/c`` and the store on another."""
    found = {"/a": Room(1, 10), "/b": Room(1, 10), "/c": Room(2, MIB), "/store": Room(2, MIB)}
    monkeypatch.setattr(free_space, "room", lambda folder: found[str(folder)])
    return found


def test_needs_on_one_file_system_are_added_up(rooms: dict[str, Room]) -> None:
    free_space.require([Need("/a", 6, "one"), Need("/b", 4, "two"), Need("/c", 10, "three")], machine="web")
    with pytest.raises(HostCannot) as refused:
        free_space.require([Need("/c", 10, "three"), Need("/a", 6, "one"), Need("/b", 5, "two")], machine="web")
    said = "one and two may need 11 bytes, but only 10 are free at /a"
    assert (refused.value.message, refused.value.exit_code, refused.value.effect) == (said, 9, "none")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostCannot, match="is not writable: No such file") as refused:
        free_space.require([Need(str(tmp_path / "no"), 0, "it")], machine="web")
    assert refused.value.hint == "create the folder"


def test_an_image_has_tables_besides_its_data() -> None:
    assert free_space.of_image(1 << 40) == 4 * CLUSTER + 8 * 2048
    assert 100 * MIB < free_space.of_image(1 << 30, 100 * MIB) < 101 * MIB


def merge(moves: int, at: Situation, **named: object) -> Merge:
    """A commit of the middle layer into the base, on ``/a``."""
    base, top, _ = (replace(layer, path=f"/a/{layer.id}", virtual_size=100) for layer in at.live["vda"].layers)
    step = Merge(
        kind="commit", disk="vda", into=base, top=top, base=None, root=top.id, live=True, chain=(), moves=moves,
        change=Change(),
    )  # fmt: skip
    return replace(step, **named)


def test_steps_of_one_file_system_are_added_up_and_what_one_frees_counts(rooms: dict[str, Room]) -> None:
    at = replace(situation(chain("vda", 1, 2, 3)), bytes={layer.id: 4 for layer in chain("vda", 1, 2, 3).layers})
    gone = tuple(replace(layer, path="/b/gone") for layer in at.live["vda"].layers[1:2])
    require_space(at, (merge(6, at), merge(4, at)), STORE)
    with pytest.raises(HostCannot, match="layer vda-1 may grow by 5 bytes, but only 4 are free at /a"):
        require_space(at, (merge(6, at), merge(5, at)), STORE)
    require_space(at, (merge(6, at, removed=gone), merge(8, at)), STORE)
    rooms["/store"] = Room(2, 0)
    with pytest.raises(HostCannot, match="the store may need"):
        require_space(at, (merge(1, at),), STORE)
    require_space(at, (Removal(disk="vda", removed=gone, change=Change()),), STORE)  # it only makes room
