"""Each kind of operation that a command may leave open has someone who ends it."""

import inspect
from importlib import import_module
from typing import get_args

import pytest

from qmpsnap.model.operations.operation import Plan
from qmpsnap.ops.session.recovery import ENDINGS

PLANS = get_args(Plan)


def test_every_kind_of_plan_is_in_the_table() -> None:
    assert set(ENDINGS) == set(PLANS)


@pytest.mark.parametrize("named", ENDINGS.values())
def test_the_table_names_what_there_is(named: str) -> None:
    module, function = named.split(":")
    assert inspect.iscoroutinefunction(getattr(import_module(module), function))
