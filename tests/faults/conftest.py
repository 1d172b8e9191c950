"""Fixtures of the faults, and the choice of the short form."""

import pytest

from tests.faults import claims, mutants
from tests.faults.report import Fault
from tests.faults.reporting import FORM
from tests.live.conftest import home, place, q
from tests.selection import GRID_AT

__all__ = ["fault", "home", "place", "q"]

SAMPLE = 8
"""Every how-manieth case of the short form is in the sample."""
MANY = 40
"""Cases of one module from which on CI takes a third of them."""

mutants.apply()


@pytest.fixture
def fault(record_property: object) -> Fault:
    """What the case tells about itself."""
    assert callable(record_property)
    found = Fault(record_property)
    claims.tell(found.claim)
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if "/faults/" in str(item.path)]
    for item in ours:
        item.add_marker(pytest.mark.live)
        item.add_marker(pytest.mark.timeout(400))
    if FORM in ("short", "sample"):
        chosen = _short(ours)[:: SAMPLE if FORM == "sample" else 1]
        left_out = {id(item) for item in ours} - {id(item) for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]


def _short(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases marked ``short``.

    In CI one of those with the same ``one_of``, and of a module with more than :data:`MANY` others every fourth; which,
    the commit's hash chooses.
    """
    marked = [(item, mark.kwargs.get("one_of")) for item in items if (mark := item.get_closest_marker("short"))]
    if not GRID_AT:
        return [item for item, _ in marked]
    groups: dict[tuple[object, object], list[pytest.Item]] = {}
    for item, group in marked:
        groups.setdefault((item.path, group), []).append(item)
    turn, chosen = int(GRID_AT), set[int]()
    for (_, group), found in groups.items():
        taken = [found[turn % len(found)]] if group else found[turn % 4 :: 4] if len(found) > MANY else found
        chosen |= {id(item) for item in taken}
    return [item for item, _ in marked if id(item) in chosen]
