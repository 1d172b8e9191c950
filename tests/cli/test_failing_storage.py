"""Storage that fails below a command: what is said of the outcome is so, and recovery ends with a sound store."""

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import failing


def test_what_is_said_is_so(tmp_path: Path) -> None:
    shim, home = failing.built(tmp_path), tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "QMPSNAP_HOME": str(home), "LD_PRELOAD": str(shim)}
    argv = [sys.executable, "-m", "tests.cli.sweep", str(home)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout
