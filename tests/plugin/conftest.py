"""A pytest run of a user's suite, from outside: where it works, and what it must not leave."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qmpsnap.model.home import Home

CACHE = Home.from_environment(os.environ, uid=os.geteuid()).cache
"""Where the small guest is; `pytester` gives the inner run another HOME."""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> Iterator[Path]:
    """What the inner run takes for /tmp: afterwards it must be empty, and nothing may work in it."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error")
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE.parent))
    monkeypatch.setenv("QMPSNAP_TEMPLATES", str(folder / "templates"))
    yield folder
    left = working_in(folder)
    for process in left:
        process.kill()
    assert not left
    assert not [*folder.glob("qmpsnap-*"), *folder.glob("templates/*")]


@pytest.fixture
def reaped(temporary: Path) -> Iterator[Path]:
    """The same for an inner run that is killed: what it leaves is removed by another process, soon."""
    yield temporary
    end = time.monotonic() + 60
    while working_in(temporary) or any(temporary.glob("qmpsnap-*")) or any(temporary.glob("templates/*")):
        assert time.monotonic() < end, "it is not removed"
        time.sleep(0.05)


def working_in(folder: Path) -> list[psutil.Process]:
    """The processes whose working folder is below that one."""
    return [found for found in psutil.process_iter() if _works_in(found, folder)]


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd().startswith(f"{folder}/")
    except psutil.Error:
        return False
