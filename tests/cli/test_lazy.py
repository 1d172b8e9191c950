"""Commands that only read the store answer at once: none of the slow libraries is loaded for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpsnap.model.home import Home
from tests.cli import seeded

SLOW = ("asyncio", "qemu", "anyio", "psutil", "yaml", "rich", "importlib.metadata")
QUICK = (
    ["snapshot", "list", "web", "-o", "json"],
    ["list"],
    ["tree", "lab"],
    ["snapshot", "show", "web", "fresh"],
    ["snapshot", "show", "web", "nothing"],
    ["snapshot", "list", "nobody", "-o", "json"],
    ["--version"],
    ["snapshot", "create", "--help"],
)
PROGRAM = """
import sys
from qmpsnap.cli.main import main
try:
    main(sys.argv[1:])
finally:
    import json
    print("\\n" + json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = str(tmp_path_factory.mktemp("home"))
    seeded.fill(Home.from_environment({"QMPSNAP_HOME": folder}, uid=os.geteuid()))
    return {**os.environ, "QMPSNAP_HOME": folder}


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_nothing_slow_is_loaded(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], check=True, env=environment, capture_output=True, text=True
    )
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert "qmpsnap.cli.main" in loaded
    assert [name for name in SLOW if name in loaded] == []


def test_the_console_script_loads_nothing_slow(environment: dict[str, str]) -> None:
    script = Path(sys.executable).parent / "qmpsnap"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, "snapshot", "list", "web", "-o", "json"],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["snapshots"][0]["name"] == "fresh"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "qmpsnap.cli.snapshot" in loaded
    assert [name for name in SLOW[:-1] if name in loaded] == []  # a console script itself may need its metadata
