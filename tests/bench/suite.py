"""``bench suite``: what a test of examples/pytest-suite takes with a fork, beside a load and a boot for each test."""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.program import ROOT, ProgramFailed

WAYS = ("fork", "load", "boot")
KINDS = ("files", "kernel", "daemons", "disk")
READY = re.compile(r", (\d+) times; ready after ([\d.]+) s \(p99 ([\d.]+) s\)$", re.MULTILINE)
"""The plugin's line about a machine."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--tests", type=int, default=200, metavar="N", help="tests of the suite, with forks (200)")
    parser.add_argument("--others", type=int, default=12, metavar="N", help="tests, with a load and with a boot (12)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="workers of pytest-xdist (2)")


def run(folder: Path, given: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    print(f"{'':6} {'tests':>5} {'s per test':>10} {'ready':>7} {'p99':>7}")
    for way in WAYS:
        count = given.tests if way == "fork" else given.others
        since = time.monotonic()
        said = _tested(folder, way, count, given.workers)
        took = time.monotonic() - since
        found = READY.search(said)
        if not found or int(found[1]) != count:
            raise ProgramFailed(f"the suite did not say how its tests were made ready:\n{said}")
        print(f"{way:6} {count:5} {took / count:10.2f} {found[2]:>7} {found[3]:>7}", flush=True)
    return 0


def _tested(folder: Path, way: str, count: int, workers: int) -> str:
    """What pytest says of the first tests of the suite, of each kind as many."""
    tests = [f"test_dirt.py::test_nobody_sees_it[{KINDS[at % 4]}-{at // 4 + 1}]" for at in range(count)]
    argv = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider", f"--qmpsnap-by={way}"]
    environment = os.environ | {"TMPDIR": str(folder), "SEED": "1"}
    suite = ROOT / "examples" / "pytest-suite"
    done = subprocess.run([*argv, *tests], check=False, stdout=-1, text=True, cwd=suite, env=environment)
    if done.returncode:
        raise ProgramFailed(f"pytest ended with {done.returncode}:\n{done.stdout}")
    if left := sorted(folder.glob("qmpsnap-*")):
        raise ProgramFailed(f"the suite has left {', '.join(map(str, left))}")
    return done.stdout
