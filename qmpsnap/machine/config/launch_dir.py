"""Where the files lie that are no modules: inside the installed package, or beside it in a checkout."""

import subprocess
from pathlib import Path

from qmpsnap.errors import HostCannot

_PACKAGE = Path(__file__).parents[2]


def launch_dir() -> Path:
    """The folder with profiles, the small guest's recipe and the systemd unit."""
    return _shipped("launch")


def tour() -> Path:
    """The program that `qmpsnap demo` runs."""
    return _shipped("examples") / "tour.py"


def build_guest(folder: Path) -> None:
    """Build the small guest in a folder, unless it is there and current."""
    recipe = launch_dir() / "guest" / "build"
    done = subprocess.run([recipe, folder], check=False, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise HostCannot(f"the small guest cannot be built: {reason}", hint=f"{recipe} says what it needs")


def _shipped(name: str) -> Path:
    shipped = _PACKAGE / f"_{name}"
    return shipped if shipped.is_dir() else _PACKAGE.parent / name
