"""The harness finds what it looks for: with a mistake in the product it reports violations, without it none."""

import os
import re
import sys
from pathlib import Path

import anyio
import pytest

from tests.faults.mutants import MUTANTS, VARIABLE
from tests.faults.report import Tally

ROOT = Path(__file__).parents[2]
LOOKED_AT = {
    "a removed fsync": ["test_powerloss.py::test_files_are_durable_before_the_journal_counts_on_them[create, paused]"],
    "a removed flush": ["test_powerloss.py::test_the_power_goes[stream, paused-N:finalizing-after-None]"],
    "swapped steps of a snapshot": ["test_kill.py::test_killed[create, paused-transaction-before-controller]"],
    "swapped steps of a merge": [
        "test_kill.py::test_killed[commit of a middle layer, paused-N:finalizing-before-controller]"
    ],
    "auto-dismiss on": ["test_undisturbed.py::test_undisturbed[stream, paused]"],
    "removal without a look": ["test_outsider.py::test_somebody_else[undefine, removing-replaces-active-there before]"],
    "names not looked at": [
        "test_outsider.py::test_somebody_else[commit of a middle layer, paused-replaces-frozen-there before]"
    ],
    "the reference check off": ["test_shared.py::test_another_branch_reads_it[commit-paused]"],
}


async def _run(cases: list[str], *, mutant: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QMPSNAP_FA"))}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/faults/{case}" for case in cases)]
    done = await anyio.run_process(argv, cwd=ROOT, env=environment | {VARIABLE: mutant}, check=False)
    return done.returncode, done.stdout.decode()


@pytest.mark.short
@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_mistake_is_found(mutant: str) -> None:
    code, said = await _run(LOOKED_AT[mutant], mutant=mutant)
    assert code == pytest.ExitCode.TESTS_FAILED, said
    assert re.search(r"^all .* [1-9]\d*$", said, re.MULTILINE), said


@pytest.mark.short
async def test_without_a_mistake_the_same_cases_pass() -> None:
    code, said = await _run([case for cases in LOOKED_AT.values() for case in cases], mutant="")
    assert code == pytest.ExitCode.OK, said
    assert re.search(r"^all .* 0$", said, re.MULTILINE), said


def test_a_step_without_a_case_is_told() -> None:
    tally = Tally()
    assert "mirror: made:FILE" in tally.uncovered()
    case = [("fault", "kill"), ("verb", "mirror"), ("step", "mirror/made:FILE")]
    tally.add(case, violated=False)
    tally.add(case, violated=True)
    tally.add([*case, ("too late", "")], violated=False)
    assert "mirror: made:FILE" not in tally.uncovered()
    assert "mirror: started:FILE" in tally.uncovered()
    assert tally.table().splitlines() == [
        "fault  mirror  cases  violations",
        "kill      2/1      2           1",
        "all       2/1      2           1",
    ]
