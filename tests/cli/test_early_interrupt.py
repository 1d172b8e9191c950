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
        if name in left:
            left.remove(name)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
left, sys.argv = sys.argv[1:], ["qmpsnap", "snapshot", "delete", "web", "s"]
from qmpsnap.cli.start import run
sys.meta_path.insert(0, At())
run()
"""
BEFORE = ("qmpsnap.cli.main", "qmpsnap.errors", "qmpsnap.cli.output")
LATER = ("qmpsnap.cli.snapshot_verbs.snapshot", "qmpsnap.api.controller", "anyio", "qmpsnap.ops.snapshot.delete")
"""Modules that are loaded when the command is known, some of them while it works in a process of its own."""
IN_THE_REPORT = ("-", "qmpsnap.cli.interrupted", "qmpsnap.cli.common", "sqlite3")


@pytest.mark.parametrize("second", IN_THE_REPORT)
@pytest.mark.parametrize("first", [*BEFORE, *LATER])
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
    assert (done.stdout, "Traceback" in done.stderr) == ("", False), done.stderr
    if done.returncode == 3:  # it came when the answer was there
        assert (first in LATER, "no machine 'web'" in done.stderr) == (True, True), done
    elif done.returncode != -signal.SIGINT:
        assert (done.returncode, "interrupted" in done.stderr) == (128 + signal.SIGINT, True), done
