"""Ctrl-C while the command line is still being loaded, once or twice: no traceback, and nothing was begun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import os, signal, sys

class At:
    def find_spec(self, name, path=None, target=None):
        if name in (first, second):
            os.kill(os.getpid(), signal.SIGINT)

first, second, sys.argv = sys.argv[1], sys.argv[2], ["qmpsnap", "snapshot", "delete", "web", "s"]
from qmpsnap.cli.start import run
sys.meta_path.insert(0, At())
run()
"""
LOADED = (
    "qmpsnap.cli.main",
    "qmpsnap.errors",
    "qmpsnap.cli.output",
    "argparse",
    "qmpsnap.cli.common",
    "msgspec",
    "sqlite3",
)
IN_THE_REPORT = ("-", "qmpsnap.cli.interrupted", "qmpsnap.cli.common", "sqlite3")


@pytest.mark.parametrize("second", IN_THE_REPORT)
@pytest.mark.parametrize("first", LOADED)
def test_no_traceback(first: str, second: str, tmp_path: Path) -> None:
    environment = {**os.environ, "QMPSNAP_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, first, second],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in {-signal.SIGINT, 128 + signal.SIGINT}, done
    assert (done.stdout, "Traceback" in done.stderr) == ("", False), done.stderr
    assert not (tmp_path / "home").exists()
