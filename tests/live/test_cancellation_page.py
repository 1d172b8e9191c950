"""docs/how-to/cancellation.md: what it calls right is run on a real QEMU, and what it calls wrong is Python."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.model.machines.spec import MachineSpec
from tests.live.booted import start_booted
from tests.live.machine import ONE_DISK, hold_invariants

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "cancellation.md").read_text()
RIGHT = re.findall(r"<!-- right -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
ALL = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def function(block: str) -> str:
    return f"async def run(vm, other):\n{textwrap.indent(block, '    ')}"


def test_every_block_is_python() -> None:
    assert (len(RIGHT), len(ALL)) == (6, 11)
    for block in ALL:
        ast.parse(function(block))


@pytest.mark.parametrize("block", RIGHT, ids=range(len(RIGHT)))
async def test_what_is_right_works(q: qmpsnap.Controller, guest_spec: MachineSpec, block: str) -> None:
    vm = await q.define(guest_spec)
    if "vm.run" in block:
        await start_booted(vm)
    await vm.snapshot("s1")
    names: dict[str, Any] = {}
    exec(function(block), names)  # noqa: S102 - from our own page
    await names["run"](vm, await q.define(ONE_DISK))
    await hold_invariants(vm)
