"""What is written from the API is as the API is now; ``QMPSNAP_GOLDEN=write`` writes it anew, and fails."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.sync import Controller, ForkPool, MachineHandle
from tests.api import python_page, sync_api
from tests.api.described import public

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "python.md"


def hold(path: Path, now: str) -> None:
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        path.write_text(now)
        pytest.fail("written")
    assert path.read_text() == now


def test_the_python_page_says_what_the_docstrings_say() -> None:
    head, _, rest = PAGE.read_text().partition(python_page.BEGIN)
    tail = rest.partition(python_page.END)[2]
    hold(PAGE, head + python_page.BEGIN + "\n" + python_page.page() + python_page.END + tail)


@pytest.mark.parametrize("name", sync_api.MODULES)
def test_the_synchronous_api_is_that_of_the_other(name: str) -> None:
    hold(ROOT / "qmpsnap" / "sync" / f"{name}.py", formatted(sync_api.module(name)))


@pytest.mark.parametrize(
    ("of", "twin"),
    [(qmpsnap.Controller, Controller), (qmpsnap.MachineHandle, MachineHandle), (qmpsnap.ForkPool, ForkPool)],
)
def test_every_method_has_a_twin(of: type, twin: type) -> None:
    def given(method: Callable[..., Any]) -> list[str]:
        return [str(one) for one in inspect.signature(method).parameters.values()]

    assert {name: given(method) for name, method in public(of).items()} == {
        name: given(method) for name, method in public(twin).items()
    }


def formatted(source: str) -> str:
    """As ruff writes it."""
    ruff = Path(sys.executable).with_name("ruff")
    for words in (["check", "--fix-only", "--select", "I,F401,RUF100,UP"], ["format"]):
        argv = [str(ruff), *words, "--quiet", "--stdin-filename", str(ROOT / "qmpsnap" / "sync" / "written.py"), "-"]
        source = subprocess.run(argv, input=source, capture_output=True, text=True, check=True).stdout
    return source
