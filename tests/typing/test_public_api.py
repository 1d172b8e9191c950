"""The public names: each is there at run time and has the type that programs rely on."""

import subprocess
import sys
from pathlib import Path

import pytest

import qmpsnap
from tests.api.described import public

CHECKED = Path(__file__).parent / "public_api.py"
SYNCHRONOUS = Path(__file__).parent / "sync_api.py"
ROOT = Path(__file__).parents[2]


def test_the_public_api_has_its_types() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", str(CHECKED), str(SYNCHRONOUS)],
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


@pytest.mark.parametrize("of", [qmpsnap.Controller, qmpsnap.MachineHandle])
def test_every_public_method_is_in_the_typed_program(of: type) -> None:
    program = CHECKED.read_text()
    assert [name for name in public(of) if f".{name}(" not in program] == []
