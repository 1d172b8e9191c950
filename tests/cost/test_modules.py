"""The modules that a cold process of a verb loads: 0.2 ms each, some of Python's own ten times that.

``modules.txt`` has them all but those of the floor, that is of a Python that has loaded what no verb can do without.
``QMPSNAP_GOLDEN=write`` writes it anew, and fails all the same. Another Python may need fewer of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpsnap.model.home import Home
from tests.cli import seeded

GOLDEN = Path(__file__).with_name("modules.txt")
FLOOR = "import re, sqlite3"
"""``re`` is loaded by the console script that pip makes."""
ONLY_LATE = ("signal",)
"""Loaded to end a helper process whose storage has not answered in time."""
VERBS = ("list", "list -o json", "snapshot list web", "snapshot list web -o json", "tree lab")
CHANGING = ("snapshot create web x --dry-run", "commit web vda --dry-run", "start web")
"""Of these only our own modules are counted: asyncio's and its like differ from one Python to the next."""
COUNTED = """
import sys
{floor}
before = set(sys.modules)
from qmpsnap.cli.main import main
main({words})
loaded = sorted(set(sys.modules) - before)
import json
print("\\n" + json.dumps(loaded), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    found = Home.from_environment({"QMPSNAP_HOME": str(tmp_path_factory.mktemp("home"))}, uid=os.geteuid())
    seeded.fill(found)
    return found


def loaded_by(verb: str, home: Home) -> list[str]:
    """What the process of a verb has loaded by its end; what its helper processes load is not counted."""
    program = COUNTED.format(floor=FLOOR, words=verb.split())
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={**os.environ, "QMPSNAP_HOME": str(home.data)},
        capture_output=True,
        text=True,
    )
    found: list[str] = json.loads(done.stderr.splitlines()[-1])
    if verb in CHANGING:
        found = [name for name in found if name.startswith("qmpsnap")]
    found = [name for name in found if name not in ONLY_LATE]
    assert "qmpsnap.cli.main" in found
    return found


def golden() -> dict[str, list[str]]:
    """For each verb a line with their number, and below it their names."""
    found: dict[str, list[str]] = {}
    verb = ""
    for line in GOLDEN.read_text().splitlines():
        if line.startswith(" "):
            found[verb].append(line.strip())
        else:
            verb, _, _ = line.rpartition(": ")
            found[verb] = []
    return found


def test_no_verb_loads_another_module(home: Home) -> None:
    found = {verb: loaded_by(verb, home) for verb in (*VERBS, *CHANGING)}
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        lines = ([f"{verb}: {len(names)}", *(f"    {name}" for name in names)] for verb, names in found.items())
        GOLDEN.write_text("".join(f"{line}\n" for part in lines for line in part))
        pytest.fail("written")
    known = golden()
    assert found.keys() == known.keys()
    for verb, names in found.items():
        assert [name for name in names if name not in known[verb]] == [], f"{verb} loads more"
        assert [name for name in known[verb] if name.startswith("qmpsnap") and name not in names] == [], "loads less"


def test_none_of_the_slow_ones_is_among_them() -> None:
    slow = {
        "argparse",
        "asyncio",
        "ctypes",
        "inspect",
        "msgspec",
        "pathlib",
        "socket",
        "subprocess",
        "threading",
        "typing",
    }
    for verb in VERBS:
        assert slow.isdisjoint(golden()[verb]), verb
