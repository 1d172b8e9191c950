"""Plans in their one shape, on a real QEMU: making one changes nothing, applying one does it, or refuses."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.errors import JobCancelled, NameTaken, NotFoundError, StateError, UsageError
from tests.live.machine import MIB, ONE_DISK, fill, grown, hold_invariants, snapshot_hashes, user_monitor
from tests.live.test_dry_runs import everything

pytestmark = pytest.mark.version

Planned = Callable[[qmpsnap.MachineHandle, Path], Awaitable[qmpsnap.Plan[Any, Any]]]
PLANS: dict[str, Planned] = {
    "snapshot": lambda vm, _: vm.plan_snapshot("new"),
    "full": lambda vm, _: vm.plan_snapshot("new", kind="full"),
    "internal": lambda vm, _: vm.plan_snapshot("new", kind="internal"),
    "save": lambda vm, _: vm.plan_save(name="new"),
    "add_layers": lambda vm, _: vm.plan_add_layers(),
    "push": lambda vm, _: vm.plan_push("new"),
    "pop": lambda vm, _: vm.plan_pop(discard=True),
    "revert": lambda vm, _: vm.plan_revert("s1"),
    "rename_snapshot": lambda vm, _: vm.plan_rename_snapshot("s1", "new"),
    "describe_snapshot": lambda vm, _: vm.plan_describe_snapshot("s1", "text", tags={"k": "v"}),
    "commit": lambda vm, _: vm.plan_commit("vda", top="s2", consume=True),
    "stream": lambda vm, _: vm.plan_stream("vda", base="s1"),
    "mirror": lambda vm, place: vm.plan_mirror("vda", place / "copy", mode="pivot"),
    "delete_snapshots": lambda vm, _: vm.plan_delete_snapshots("s2"),
}


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", PLANS)
async def test_a_plan_is_carried_out_as_it_says(q: qmpsnap.Controller, home: Path, place: Path, what: str) -> None:
    vm = await grown(q, "s1", "s2")
    if what == "full":
        await vm.resume()  # an early QEMU saves the memory of no guest that has not run
    before = everything(home)
    plan = await PLANS[what](vm, place)
    assert everything(home) == before
    assert plan.summary.isprintable()
    assert plan.machine == "still"
    assert all(set(command) == {"execute", "arguments"} for command in plan.qmp)
    was = files(home)
    await vm.apply(plan)
    now = files(home)
    by = {action: {file.path for file in plan.files if file.action == action} for action in ("create", "remove")}
    images = {path for path in now - was if not path.endswith((".log", ".sock", "record.json"))}
    assert {path for path in images if "/machines/" in path or str(place) in path} == by["create"]
    assert {path for path in was - now if "/machines/" in path} == by["remove"]
    with pytest.raises(StateError, match="has changed since the plan was made"):
        await vm.apply(plan)
    await hold_invariants(vm)


async def _restart(vm: qmpsnap.MachineHandle) -> None:
    await vm.stop(force=True)
    await vm.start(paused=True)


CHANGES: dict[str, Callable[[qmpsnap.MachineHandle], Awaitable[object]]] = {
    "a snapshot": lambda vm: vm.snapshot(),
    "a description": lambda vm: vm.describe_snapshot("s1", "other"),
    "a rename": lambda vm: vm.rename_snapshot("s1", "other"),
    "it was stopped": lambda vm: vm.stop(force=True),
    "it was started": _restart,
    "its guest runs": lambda vm: vm.resume(),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_machine_that_has_changed_is_left_alone(q: qmpsnap.Controller, home: Path, change: str) -> None:
    vm = await grown(q, "s1", "s2")
    plan = await vm.plan_commit("vda", top="s2", consume=True)
    await CHANGES[change](vm)
    hashes = await snapshot_hashes(vm)
    with pytest.raises(StateError, match="has changed since the plan was made") as told:
        await vm.apply(plan)
    assert (told.value.effect, told.value.hint) == ("none", "plan again")
    assert await snapshot_hashes(vm) == hashes
    if await vm.state() == "running":
        await vm.pause()
    assert (await vm.apply(await vm.plan_commit("vda", top="vda-3", consume=True))).overwritten
    await hold_invariants(vm)


async def test_what_the_guest_writes_is_no_change(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2")
    plan = await vm.plan_delete_snapshots("s2")
    (command,) = plan.qmp
    assert command["execute"] in {"block-commit", "block-stream"}
    assert plan.bytes >= MIB
    await fill(vm, "vda", 7, offset=10 * MIB)
    job = vm.apply(plan)
    seen = {info.id async for info in job.progress()}
    assert seen == {command["arguments"]["job-id"]}
    assert (await job).names == ("s2",)
    await hold_invariants(vm)


async def test_the_commands_of_a_plan_are_those_sent(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    plan = await vm.plan_snapshot("s2")
    assert [command["execute"] for command in plan.qmp] == ["blockdev-add", "transaction"]
    await vm.apply(plan)
    async with user_monitor(vm) as qemu:
        nodes: Any = await qemu.execute("query-named-block-nodes")
    assert plan.qmp[0]["arguments"]["node-name"] in {node["node-name"] for node in nodes}


async def test_plans_of_other_machines(q: qmpsnap.Controller, home: Path) -> None:
    plan = await q.plan_define(ONE_DISK)
    assert (plan.verb, plan.machine, plan.bytes, plan.qmp) == ("define", "still", 0, ())
    assert not files(home / "machines")
    vm = await q.apply(plan)
    assert {file.path for file in plan.files} <= files(home)
    with pytest.raises(NameTaken):
        await q.apply(plan)
    mine = await vm.plan_undefine(disks="remove")
    other = qmpsnap.MachineHandle(q.context, "other")
    with pytest.raises(UsageError, match="a plan of machine still, not of other"):
        await other.apply(mine)
    await q.apply(mine)
    assert not files(home / "machines")
    with pytest.raises(NotFoundError):
        await q.apply(mine)


async def test_a_plan_can_be_cancelled_as_its_verb(q: qmpsnap.Controller, slow_jobs: None) -> None:
    vm = await grown(q, "s1", "s2")
    hashes = await snapshot_hashes(vm)
    job = vm.apply(await vm.plan_stream("vda"))
    async for info in job.progress():
        if info.status == "running":
            break
    await job.cancel()
    with pytest.raises(JobCancelled):
        await job
    await hold_invariants(vm, hashes)
