"""Verbs that put a machine, a home or an operation right, as scenarios; and all that there are together."""

from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.verbs import VERBS

ALL: dict[str, Scenario] = {name: found for name, found in SCENARIOS.items() if not found.ends} | VERBS
