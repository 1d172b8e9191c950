"""Ctrl-C while the command line is still being loaded, once or twice: no traceback, and nothing was begun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.cli.start import postponed

INTERRUPTED = """
import os, signal, sys

class At:
    def find_spec(self, name, path=None, target=None):
        if name in left:
            left.remove(name)
            os.kill(os.getpid(), number)

number = signal.Signals[sys.argv[1]]
if number != signal.SIGINT:
    signal.signal(number, signal.SIG_DFL)  # the tests themselves may run below nohup
left, sys.argv = sys.argv[2:], ["qmpsnap", "snapshot", "delete", "web", "s"]
from qmpsnap.cli.start import run
sys.meta_path.insert(0, At())
run()
"""
BEFORE = ("qmpsnap.cli.main", "qmpsnap.errors", "qmpsnap.cli.output")
LATER = (
    "qmpsnap.cli.snapshot_verbs.snapshot",
    "qmpsnap.api.controller",
    "anyio",
    "anyio._backends._asyncio",
    "qmpsnap.ops.snapshot.delete",
)
"""Modules that are loaded when the command is known, some of them while it works in a process of its own."""
IN_THE_REPORT = ("-", "qmpsnap.cli.interrupted", "qmpsnap.cli.common", "sqlite3")


@pytest.mark.parametrize("second", IN_THE_REPORT)
@pytest.mark.parametrize("first", [*BEFORE, *LATER])
def test_no_traceback(first: str, second: str, tmp_path: Path) -> None:
    hold_early(signal.SIGINT, first, second, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("first", [BEFORE[-1], *LATER])
def test_other_signals_are_heeded_as_sigint_is(number: signal.Signals, first: str, tmp_path: Path) -> None:
    hold_early(number, first, "-", tmp_path)


def hold_early(number: signal.Signals, first: str, second: str, tmp_path: Path) -> None:
    environment = {**os.environ, "QMPSNAP_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, number.name, first, second],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, "Traceback" in done.stderr) == ("", False), done.stderr
    if done.returncode == 3:  # it came when the answer was there
        assert (first in LATER, "no machine 'web'" in done.stderr) == (True, True), done
    elif done.returncode != -number:
        assert (done.returncode, "interrupted" in done.stderr) == (128 + signal.SIGINT, True), done


@pytest.mark.parametrize("file", ["/x/msgspec/_utils.py", "<frozen importlib._bootstrap>"])
def test_it_is_put_off_where_an_exception_would_crash(file: str) -> None:
    """A frame of that file is among those that were interrupted."""
    names: dict[str, Any] = {}
    exec(compile("def run(call):\n    return call()\n", file, "exec"), names)  # noqa: S102 - a frame of that name
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        assert not postponed(sys._getframe())
        assert names["run"](lambda: postponed(sys._getframe()))
        end = time.monotonic() + 30
        while not heard and time.monotonic() < end:
            time.sleep(0.001)
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert heard == [signal.SIGINT]
