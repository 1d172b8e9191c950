"""What each command costs, counted: a change is a line of the golden file.

``QMPSNAP_GOLDEN=write`` writes it anew, and fails all the same. It is what a QEMU 7.2 under TCG is asked.
"""

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cost import counted
from tests.cost.counted import Cost
from tests.harness import failing
from tests.harness.processes import kill_qemus

pytestmark = pytest.mark.live

GOLDEN = Path(__file__).with_name("golden")
QEMU = os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64"
SPEC = """\
name: {name}
accel: tcg
memory: 16M
agent: false
disks:
- {{name: vda, size: 16M}}
- {{name: vdb, size: 16M, format: raw}}
"""
COMMANDS = (
    "define {folder}/still.yaml",
    "start still --paused",
    "list",
    "snapshot create still s1",
    "snapshot create still s2",
    "snapshot list still",
    "tree still",
    "check still",
    "commit still vda --top s2 --consume",
    "snapshot delete still s1",
    "stream still vda",
    "snapshot create still inner --kind internal",
    "snapshot revert still inner --discard",
    "snapshot create still memory --kind full",
    "snapshot revert still memory --discard --paused",
)
"""In this order, on one machine, which runs from the first revert on."""
POLLED = ("query-jobs", "query-migrate")
"""Asked once for each event or interval until QEMU is done: how often depends on the host, and counts as once."""
TITLES = {
    "qmp": "QMP commands",
    "sql": "SQL statements",
    "processes": "processes started",
    "fsyncs": "fsyncs",
    "blocks": "blocks of 4 KiB written",
}


def test_the_commands_cost_what_the_golden_file_says(folder: Path) -> None:
    version = subprocess.run([QEMU, "--version"], check=True, capture_output=True, text=True).stdout
    if "version 7.2." not in version:
        pytest.skip(f"the golden file is of QEMU 7.2, this is {version.splitlines()[0]}")
    shim = failing.built(folder)
    for name in ("first", "still"):
        (folder / f"{name}.yaml").write_text(SPEC.format(name=name))
    # The store and what is known of this QEMU are made once.
    counted.cost(["define", str(folder / "first.yaml")], folder=folder, shim=shim)
    found = ""
    for command in COMMANDS:
        cost = counted.cost(command.format(folder=folder).split(), folder=folder, shim=shim)
        found += _text(command.replace("{folder}/", ""), cost)
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        GOLDEN.write_text(found)
        pytest.fail(f"wrote {GOLDEN}: read the difference, then run without QMPSNAP_GOLDEN")
    assert found == GOLDEN.read_text(), "the costs have changed; QMPSNAP_GOLDEN=write records them"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="qs-"))
    (made / "home").mkdir()
    try:
        yield made
    finally:
        kill_qemus(made)
        shutil.rmtree(made)


def _text(command: str, cost: Cost) -> str:
    """One command's costs, a line for each kind."""
    lines = [f"  {title} {_counts(getattr(cost, field))}\n" for field, title in TITLES.items()]
    return f"{command}\n{''.join(lines)}"


def _counts(found: Counter[str]) -> str:
    each = [name if count == 1 or name in POLLED else f"{name} {count}" for name, count in sorted(found.items())]
    total = sum(1 if name in POLLED else count for name, count in found.items())
    return f"{total}: {', '.join(each)}" if each else "0"
