"""A command loads what it needs: one that only reads the store none of the slow libraries, the others no other verb."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from qmpsnap.cli.command_line import NOUNS
from qmpsnap.later import Later
from qmpsnap.model.home import Home
from tests.cli import seeded

SLOW = ("asyncio", "qemu", "anyio", "psutil", "yaml", "rich", "subprocess", "hashlib", "importlib.metadata")
QUICK = (
    ["snapshot", "list", "web", "-o", "json"],
    ["list"],
    ["tree", "lab"],
    ["log", "web"],
    ["snapshot", "show", "web", "fresh"],
    ["snapshot", "show", "web", "nothing"],
    ["snapshot", "list", "nobody", "-o", "json"],
    ["--version"],
    ["snapshot", "create", "--help"],
)
VERBS = ("snapshot.create", "lifecycle.define", "mirror.mirror", "snapshot.delete", "revert.revert")
OTHERS = (
    "qmpsnap.api.controller",
    *(f"qmpsnap.ops.{verb}" for verb in VERBS),
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


def loaded_by(words: list[str], environment: dict[str, str]) -> list[str]:
    """The modules that a command line has loaded by its end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], check=True, env=environment, capture_output=True, text=True
    )
    loaded: list[str] = json.loads(done.stderr.splitlines()[-1])
    assert "qmpsnap.cli.main" in loaded
    return loaded


def test_a_create_loads_no_other_verb(environment: dict[str, str]) -> None:
    loaded = loaded_by(["snapshot", "create", "nobody"], environment)
    assert "qmpsnap.ops.snapshot.create" not in loaded, "it is refused before the verb is called"
    loaded = loaded_by(["snapshot", "create", "web", "x", "--dry-run"], environment)
    assert "qmpsnap.ops.snapshot.create" in loaded
    others = [
        *OTHERS[2:],
        "qmpsnap.ops.check.check",
        "qmpsnap.ops.adoption.adopt",
        "qmpsnap.cli.snapshot_verbs.revert",
    ]
    assert [name for name in others if name in loaded] == []


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_nothing_slow_is_loaded(words: list[str], environment: dict[str, str]) -> None:
    loaded = loaded_by(words, environment)
    assert [name for name in SLOW if name in loaded] == []


def test_a_commit_loads_no_other_noun_and_no_other_verb(environment: dict[str, str]) -> None:
    loaded = loaded_by(["commit", "nobody", "vda"], environment)
    assert {"qmpsnap.cli.snapshot_verbs.commit_stream", "qmpsnap.ops.merge.commit", "qemu.qmp"} <= set(loaded)
    assert [noun for noun in NOUNS if f"qmpsnap.cli.{noun}" in loaded] == ["snapshot_verbs.commit_stream"]
    assert [name for name in (*OTHERS, "psutil", "yaml", "rich", "importlib.metadata") if name in loaded] == []


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
    assert "qmpsnap.cli.output" in loaded
    assert [name for name in SLOW[:-1] if name in loaded] == []  # a console script itself may need its metadata


@pytest.mark.parametrize("name", ["controller", "machine_handle", "machine_life"])
def test_modules_that_the_api_imports_later_are_there(name: str) -> None:
    stand_ins = [found for found in vars(import_module(f"qmpsnap.api.{name}")).values() if isinstance(found, Later)]
    assert stand_ins
    for module in stand_ins:
        assert module.__file__
