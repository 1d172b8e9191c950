"""Random calls, cancelled at random awaits in one process: nothing of them is left, and nothing is on stderr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUMBER = int(os.environ.get("QMPSNAP_CANCELS", "150"))
"""Calls; the long form is ``QMPSNAP_CANCELS=5000 scripts/test tests/live/test_cancelled.py``."""
SEED = int(os.environ.get("QMPSNAP_SEED", "1"))


@pytest.mark.timeout(120 + NUMBER * 2)
def test_nothing_is_left_of_cancelled_calls(home: Path) -> None:
    argv = [sys.executable, "-X", "dev", "-W", "error", "-m", "tests.live.cancels", str(NUMBER), str(SEED)]
    done = subprocess.run(
        argv, env={**os.environ, "QMPSNAP_HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr[-8000:]
    found = json.loads(done.stdout)
    assert found["ended"]["cancelled"] > NUMBER // 5, found["ended"]
    assert found["after"]["tasks"] == []
    assert found["after"] == found["before"]
    assert found["most descriptors"] <= sum(found["before"]["descriptors"].values()) + 2, found
    assert (found["jobs"], found["open"], found["findings"], found["qemus"]) == ([], [], [], 1), found
