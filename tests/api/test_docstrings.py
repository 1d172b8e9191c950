"""Every public method says what it does, what each argument is, and which errors it raises."""

from collections.abc import Callable
from typing import Any

import pytest

import qmpsnap
from tests.api.described import CLASSES, described, kind, parameters, public

DESCRIBED = CLASSES | {"pool": qmpsnap.ForkPool}
METHODS = {f"{letter}.{name}": method for letter, of in DESCRIBED.items() for name, method in public(of).items()}
PLANS = {name for name in METHODS if ".plan_" in name}
"""Their arguments and errors are those of the method that they are plans of."""
HARMLESS = {"q.read_spec", "q.machines", "pool.memory"}
"""They raise what any call may raise, or say it at once."""


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_described(name: str) -> None:
    method: Callable[..., Any] = METHODS[name]
    told = described(method)
    assert told.text, "no docstring"
    assert told.text[0].endswith((".", ":")), told.text[0]
    if name in PLANS:
        of = name.replace("plan_", "")
        assert of in METHODS
        assert f":meth:`{of.partition('.')[2]}`" in told.text[0]
        return
    asked = {one.name for one in parameters(method)} - {"report", "options"}
    written = {one.strip("* ") for entry in told.arguments for one in entry.split(",")} - {"report", "options"}
    assert written == asked
    if kind(method) in ("coroutine", "job") and name not in HARMLESS:
        assert told.errors, "no errors"
