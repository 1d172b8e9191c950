"""How long a command takes to load its modules, by whose they are: what Python's ``-X importtime`` counts."""

import re
import statistics
import subprocess
from collections.abc import Mapping

from tests.bench.program import PYTHON, fail

OTHERS = "the rest of Python's own"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qmpsnap": ("qmpsnap",),
    "anyio": ("anyio", "sniffio", "idna"),
    "asyncio and OpenSSL": ("asyncio", "ssl", "_ssl", "concurrent", "selectors", "socket", "_socket"),
    "msgspec": ("msgspec", "typing_extensions", "inspect"),
    "qemu.qmp": ("qemu",),
    "SQLite, JSON, argparse": ("sqlite3", "_sqlite3", "json", "_json", "argparse", "gettext"),
}
"""Names of packages by group; what is loaded first, and by whom, decides nothing, as each module counts alone."""
COMMAND = ("snapshot", "create", "nothing", "s")
"""It loads what a snapshot needs, and finds then that there is no such machine."""
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def table(rounds: int) -> str:
    """Medians as the page has them, in milliseconds."""
    samples = [_sample() for _ in range(rounds + 1)][1:]
    took = {group: statistics.median(sample[group] for sample in samples) for group in (*GROUPS, OTHERS)}
    rows = [(group, f"{took[group]:.1f}") for group in sorted(took, key=took.__getitem__, reverse=True)]
    rows = [
        ("modules that `snapshot create` loads", "ms"),
        ("---", "---"),
        *rows,
        ("together", f"{sum(took.values()):.1f}"),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _sample() -> dict[str, float]:
    argv = (PYTHON, "-X", "importtime", "-m", "qmpsnap", *COMMAND)
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if "no machine" not in done.stderr:
        fail(argv, done.returncode, done.stderr)
    took = dict.fromkeys((*GROUPS, OTHERS), 0.0)
    for found in LINE.finditer(done.stderr):
        took[group(found[2])] += int(found[1]) / 1000
    return took


def group(module: str) -> str:
    """Whose a module is."""
    package = module.partition(".")[0]
    return next((name for name, packages in GROUPS.items() if package in packages), OTHERS)
