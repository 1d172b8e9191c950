"""Programs that are not killed: a cancelled caller waits, one that takes too long is left to itself."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from qmpsnap.errors import StorageHangs
from qmpsnap.host import outstanding
from qmpsnap.host.programs import uninterrupted

SLOW = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1], "go").exists():
    time.sleep(0.01)
pathlib.Path(sys.argv[1], "done").touch()
"""


def slow(folder: Path) -> list[str]:
    return [sys.executable, "-c", SLOW, str(folder)]


async def test_code_and_both_streams_are_returned() -> None:
    argv = [
        sys.executable,
        "-c",
        "import os, sys; print('x' * 200_000); sys.stderr.write(os.environ['A']); sys.exit(5)",
    ]
    done = await uninterrupted(argv, seconds=60, environment={"A": "b"})
    assert (done.returncode, done.stdout, done.stderr) == (5, b"x" * 200_000 + b"\n", b"b")


async def test_a_program_that_cannot_be_run_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        await uninterrupted(["no-such-program"], seconds=60, environment=os.environ)


async def test_a_cancelled_caller_waits_for_its_end(tmp_path: Path) -> None:
    task = asyncio.create_task(uninterrupted(slow(tmp_path), seconds=60, environment=os.environ))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()
    (tmp_path / "go").touch()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (tmp_path / "done").exists()


async def test_one_that_takes_too_long_is_left_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(StorageHangs) as late:
        await uninterrupted(slow(tmp_path), seconds=0.2, environment=os.environ)
    assert late.value.effect == "unknown"
    assert outstanding.helpers()
    (tmp_path / "go").touch()
    while not (tmp_path / "done").exists():
        await asyncio.sleep(0.01)
    while outstanding.helpers():
        await asyncio.sleep(0.01)
