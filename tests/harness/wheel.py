"""This checkout as others install it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def installed(folder: Path) -> Path:
    """A folder below an empty one, with the wheel of this checkout in it, and nothing else."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    install = [*pip, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, stdin=subprocess.DEVNULL)
    return target
