"""Fixtures of the faults, and the choice of the short form."""

import pytest

from tests.faults import claims, mutants
from tests.faults.report import Fault
from tests.faults.reporting import FORM
from tests.live.conftest import home, place, q

__all__ = ["fault", "home", "place", "q"]

SAMPLE = 6
"""Every how-manieth case of the short form is in the sample."""

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
        chosen = [item for item in ours if item.get_closest_marker("short")][:: SAMPLE if FORM == "sample" else 1]
        left_out = {id(item) for item in ours} - {id(item) for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]
