"""The programs that are timed, and how they are run."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "bin" / "python"
QMPSNAP = ROOT / ".venv" / "bin" / "qmpsnap"
TIMED = Path(__file__).with_name("timed.py")
QEMU = os.environ.get("QMPSNAP_QEMU", "qemu-system-x86_64")
QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img")

Sample = Mapping[str, float]
"""What one run took, by quantity: ``wall``, ``cpu`` and ``pause`` in milliseconds, ``memory`` in MB."""


def run(*argv: str | Path) -> Sample:
    """Run a program to its end: wall time, processor time with that of its children, and the largest memory.

    Its output is dropped; when it fails, what it wrote to stderr is raised.
    """
    wall, cpu, memory = map(float, printed(PYTHON, "-I", "-S", TIMED, *argv).split())
    return {"wall": wall * 1000, "cpu": cpu * 1000, "memory": memory * 1024 / 1e6}


def typed(*words: str, by: Sequence[str] = ()) -> str:
    """Type one command of qmpsnap; returns what it printed.

    Args:
        words: of the command.
        by: a command that runs it.
    """
    return printed(*by, QMPSNAP, *words)


def printed(*argv: str | Path) -> str:
    """Run a program; returns what it printed."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        fail(argv, done.returncode, done.stderr)
    return done.stdout


def fail(argv: Sequence[str | Path], code: int, output: str) -> NoReturn:
    """End the measurement because a program did not do what it was to."""
    raise ProgramFailed(f"{' '.join(map(str, argv))}: exit {code}\n{output}")


class ProgramFailed(Exception):
    """A program that was to be timed, or to set up what is timed, has failed."""


def in_turns(ways: Sequence[str], number: int) -> Sequence[str]:
    """The ways in the order of this round: none always has the warmer cache."""
    return ways if number % 2 else ways[::-1]


def fill(path: Path, mib: int) -> None:
    """Random bytes, so that nothing on the way can be left out as zeroes."""
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))


def say(text: str) -> None:
    """A line on stderr about what is being done."""
    print(text, file=sys.stderr, flush=True)
