"""The public names: each is there at run time and has the type that programs rely on."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap import pytest_plugin, sync, testing
from tests.api.described import public

CHECKED = Path(__file__).parent / "public_api.py"
SYNCHRONOUS = Path(__file__).parent / "sync_api.py"
PLUGIN = Path(__file__).parent / "plugin_api.py"
FIXTURES: dict[str, type] = {
    "qmpsnap_controller": qmpsnap.Controller,
    "qmpsnap_fresh": qmpsnap.MachineHandle,
    "qmpsnap_fresh_sync": sync.MachineHandle,
    "qmpsnap_machine": qmpsnap.MachineHandle,
    "qmpsnap_machine_sync": sync.MachineHandle,
    "qmpsnap_small_guest": qmpsnap.MachineHandle,
}
"""What a test may annotate its arguments with: mypy does not see where they come from."""
ROOT = Path(__file__).parents[2]


def test_the_public_api_has_its_types() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", str(CHECKED), str(SYNCHRONOUS), str(PLUGIN)],
        check=False, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("name", qmpsnap.__all__)
def test_a_public_name_is_there(name: str) -> None:
    found = getattr(qmpsnap, name)
    assert found is not None
    assert found.__doc__, f"{name} has no docstring"
    assert name in dir(qmpsnap)


def test_all_is_what_can_be_loaded() -> None:
    assert sorted(qmpsnap._WHERE) == sorted(qmpsnap.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        qmpsnap.missing  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(qmpsnap.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("of", [qmpsnap.Controller, qmpsnap.MachineHandle, qmpsnap.ForkPool])
def test_every_public_method_is_in_the_typed_program(of: type) -> None:
    program = CHECKED.read_text()
    assert [name for name in public(of) if f".{name}(" not in program] == []


def test_every_fixture_gives_what_its_users_annotate() -> None:
    given = {
        name: re.findall(r"MachineHandle|Controller|\bsync\b", str(inspect.signature(fixture).return_annotation))
        for name in pytest_plugin.__all__
        if not name.startswith(("_", "pytest_")) and (fixture := getattr(pytest_plugin, name))
    }
    wanted = {
        name: ["sync", kind.__name__] if kind.__module__.startswith("qmpsnap.sync") else [kind.__name__]
        for name, kind in FIXTURES.items()
    }
    assert given == wanted
    program = PLUGIN.read_text()
    assert [name for name in (*FIXTURES, *testing.__all__) if name not in program] == []
