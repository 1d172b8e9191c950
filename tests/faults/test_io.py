"""ENOSPC and EIO at the n-th request of a kind, from QEMU's blkdebug below every layer. Then: put right, recover."""

import errno
from pathlib import Path

import pytest
from msgspec import Struct

import qmpsnap
from qmpsnap.errors import OperationPending
from tests.faults import claims, filters, site
from tests.faults.deaths import ends_by_itself
from tests.faults.filters import Failure
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ready

NAMES = [
    name
    for name, scenario in SCENARIOS.items()
    if scenario.warm is None
    and (scenario.column in ("create internal", "commit", "stream", "delete", "mirror") or scenario.verb == "commit")
    and name != "delete of a leaf"
]
FAILURES = [
    *(Failure("write_aio", nth, errno.ENOSPC, once) for nth in (1, 2) for once in (True, False)),
    *(Failure("l2_update", 1, errno.ENOSPC, once) for once in (True, False)),
    *(Failure("cluster_alloc", 1, errno.ENOSPC, once) for once in (True, False)),
    *(Failure("flush_to_disk", nth, errno.EIO, once) for nth in (1, 2) for once in (True, False)),
    Failure("vmstate_save", 1, errno.ENOSPC, once=True),
    Failure("read_aio", 1, errno.EIO, once=True),
    Failure("write_aio", 1, errno.EIO, once=False),
]


class Case(Struct, frozen=True):
    """A scenario, and what fails in it."""

    name: str
    failure: Failure

    def __str__(self) -> str:
        return f"{self.name}-{self.failure}"


CASES = [Case(name, failure) for name in NAMES for failure in FAILURES]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=pytest.mark.short if place % 7 == 0 else ())
        for place, case in enumerate(CASES)
    ],
)
async def test_a_request_fails(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    scenario = SCENARIOS[case.name]
    fault.case(f"{errno.errorcode[case.failure.errno]} in QEMU", scenario.column)
    with filters.failing(case.failure):
        vm = await ready(q, scenario, place)
        before = await site.look(vm)
        if not await ends_by_itself(lambda: scenario.act(vm, place)):
            fault.too_late()  # it makes no such request, or QEMU has got over it
        claims.hold_error(vm, before.claimed)  # here, before anything is done about it
        try:
            await vm.recover()
        except OperationPending:
            await _goes_on_or_gives_up(vm, case.failure)
    if await vm.is_running():  # without the filter, which is no node of a machine's
        await vm.stop(force=True)
        await vm.start(paused=scenario.start == "paused")
    await site.judge(vm, place, before, scenario.expected)


async def _goes_on_or_gives_up(vm: qmpsnap.MachineHandle, failure: Failure) -> None:
    """The user has put it right and lets the job go on; or cannot, and gives it up, as far as QEMU lets go of it."""
    if failure.once:
        await vm.wait()
        return
    try:
        await vm.cancel()
    except OperationPending as error:
        if "fix that" not in error.hint:
            raise
