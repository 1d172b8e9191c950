"""Junk in each column of the store and in each file of a home: every verb says so, and none ends in a traceback."""

import os
import subprocess
import sys
from pathlib import Path

EVERY = int(os.environ.get("QMPSNAP_JUNK", "19"))
"""Of how many cases one is taken; the long form is ``QMPSNAP_JUNK=1``."""


def test_no_junk_is_a_traceback(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    argv = [sys.executable, "-m", "tests.cli.junk", str(home), str(EVERY), "0"]
    environment = {**os.environ, "QMPSNAP_HOME": str(home)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
