"""A file system gets full under a verb: that of everything, or the store's alone. Then: room is made, and recover."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpsnap
from tests.faults import site
from tests.faults.deaths import ends_by_itself
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ready
from tests.live.conftest import _kill_all_below

SIZE = "24m"
FREE = (0, 16, 48, 128, 256)
"""KiB that are left."""
APART = ("machines", "elsewhere", "run", "cache")
NAMES = [name for name, scenario in SCENARIOS.items() if scenario.warm is None or name.endswith(" a volume")]


@pytest.fixture
def mounted(home: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The home on a small file system of its own; with ``store`` the images, sockets and the rest on others."""
    if os.geteuid():
        pytest.skip("a small file system can only be mounted by root: this fault is not run")
    places = [home]
    mount(home)
    try:
        if request.param == "store":
            for name in APART:
                (home / name).mkdir(mode=0o700)
                mount(home / name)
                places.append(home / name)
        (home / "elsewhere").mkdir(exist_ok=True)
        yield home
    finally:
        _kill_all_below(home)
        for place in reversed(places):
            subprocess.run(["umount", "-l", place], check=True)


def mount(place: Path, size: str = SIZE) -> None:
    """Make it a file system of its own, in memory."""
    options = f"size={size},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "qmpsnap-faults", place], check=True)


def fill(folder: Path, *, free: int) -> Path:
    """Leave ``free`` bytes; returns the file that takes the rest."""
    ballast = folder / "ballast"
    found = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, found.f_bavail * found.f_frsize - free))
    return ballast


def _cases() -> list[object]:
    cases = [(kind, name, free) for kind in ("everything", "store") for name in NAMES for free in FREE]
    return [
        pytest.param(kind, name, free, id=f"{kind}-{name}-{free} KiB", marks=pytest.mark.short if at % 9 == 0 else ())
        for at, (kind, name, free) in enumerate(cases)
    ]


@pytest.mark.parametrize(("mounted", "name", "free"), _cases(), indirect=["mounted"])
async def test_no_space(mounted: Path, fault: Fault, request: pytest.FixtureRequest, name: str, free: int) -> None:
    scenario = SCENARIOS[name]
    kind = request.node.callspec.params["mounted"]
    fault.case(f"no space: {kind}", scenario.column)
    place = mounted / "elsewhere"
    async with qmpsnap.open() as q:
        vm = await ready(q, scenario, place)
        before = await site.look(vm)
        ballast = fill(mounted, free=free << 10)
        try:
            if not await ends_by_itself(lambda: scenario.act(vm, place)):
                fault.too_late()  # what is left is enough
        finally:
            ballast.unlink()
        await site.judge(vm, place, before, scenario.expected)
