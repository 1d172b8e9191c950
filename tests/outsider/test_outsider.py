"""The short form of scripts/outsider: so many steps of fixed seeds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

STEPS = "20"
FORBIDDEN = ("qmpsnap.", "tests.live", "tests.faults", "tests.ops")
ALLOWED = ("qmpsnap.cli import main", "qmpsnap.cli.main import run")
"""The command line itself."""


@pytest.mark.parametrize("seed", ["15", "16"])
def test_a_tester_of_its_own_finds_nothing(seed: str) -> None:
    tool = os.environ.get("QMPSNAP_QEMU", "qemu-system-x86_64")
    if not shutil.which(tool):
        assert not os.environ.get("CI"), f"{tool} is missing, and in CI a live test does not skip"
        pytest.skip(f"{tool} is missing: scripts/setup installs it")
    argv = [sys.executable, "-m", "tests.outsider", "--seed", seed, "--steps", STEPS]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_it_is_not_of_the_house() -> None:
    for file in Path(__file__).parent.glob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and not any(line.endswith(allowed) for allowed in ALLOWED):
                assert not words[1].startswith(FORBIDDEN), f"{file.name}: {line}"
