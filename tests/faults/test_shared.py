"""Another branch reads the layer that a merge would write to or remove: it is refused, or the layer stays."""

from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from tests.faults import site
from tests.faults.deaths import ends_by_itself
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, Act, branch, ready
from tests.faults.site import Expected


async def _commit(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.commit("vda", base="s2", consume=True)


async def _commit_below(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.commit("vda", base="s1", consume=True)


async def _delete(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.delete_snapshots("s2")


VERBS: dict[str, tuple[Act, str]] = {
    "commit": (_commit, "refused"),
    "commit across it": (_commit_below, "refused"),
    "delete": (_delete, ""),
}


@pytest.mark.short
@pytest.mark.parametrize("start", ["paused", "stopped"])
@pytest.mark.parametrize("verb", VERBS)
async def test_another_branch_reads_it(q: qmpsnap.Controller, place: Path, fault: Fault, verb: str, start: str) -> None:
    fault.case("another branch reads it", verb.partition(" ")[0])
    scenario = replace(SCENARIOS[f"commit of the active layer, {start}"], prepare=branch)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    act, ends = VERBS[verb]
    assert await ends_by_itself(lambda: act(vm, place)) == ends
    await site.judge(vm, place, before, Expected(loses=frozenset({"s2"} if verb == "delete" else ())))
