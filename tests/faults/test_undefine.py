"""The controller dies around each step of ``undefine --remove-disks``: the machine is there as before, or no file is.

Its first step is durable with the very commit that forgets the machine.
"""

from itertools import product
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import NotFoundError
from qmpsnap.model.operations import steps
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Call, Point
from tests.live.machine import hold_invariants

POINTS: dict[str, Point | Call] = {
    **{
        f"{step.name}, {when}": Point("undefine", step.name, when)
        for step in steps.STEPS["undefine"]
        for when in watch.WHEN
    },
    "a file is gone": Call("qmpsnap.ops.lifecycle.recover", "_remove", "after", 1),
}
ENDS = ("recover", "recover all", "define")


@pytest.mark.short
@pytest.mark.parametrize(("at", "end"), [*product(POINTS, ENDS)])
async def test_killed(q: qmpsnap.Controller, home: Path, fault: Fault, at: str, end: str) -> None:
    fault.case("kill -9: controller", "undefine")
    (place := home / "elsewhere").mkdir()
    vm = await q.define(site.TWO)
    await vm.snapshot("s1")
    await vm.snapshot("s2", files={"vda": place / "mine"})
    died = await controller_dies("undefine", home, point := POINTS[at])
    assert died.died, died.said
    if isinstance(point, Point):
        fault.reached("undefine", point.step)
    if at == "planned, before":
        await vm.recover()  # which writes its record again
        await hold_invariants(vm)
        return
    assert not await q.machines()
    if end == "define":
        await hold_invariants(await q.define(site.ONE))
        assert len(list((home / "machines" / "still").glob("vd*"))) == 1
    else:
        assert await anyio.to_thread.run_sync(lambda: main(["recover", *(["still"] if end == "recover" else [])])) in (
            0,
            3,
        )
        assert not (home / "machines" / "still").exists()
        with pytest.raises(NotFoundError):
            await q.recover("still")
    assert not list(place.iterdir())
