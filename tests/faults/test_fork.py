"""kill -9 around every step of a fork, and between steps: of the controller, of it and every QEMU, of QEMU alone.

Afterwards there is no such machine, or a whole one; of an ephemeral one that does not run there is nothing. No part of
a template is left, and no QEMU that no machine has.
"""

import contextlib
from itertools import product
from pathlib import Path

import pytest
from msgspec import Struct

import qmpsnap
from qmpsnap.machine import templates
from qmpsnap.model.operations import steps
from qmpsnap.ops.memory.load import Loading, load
from qmpsnap.qmp.session import Monitor
from tests.faults import site
from tests.faults.deaths import FORKS, controller_dies
from tests.faults.report import Fault
from tests.harness import watch
from tests.harness.deaths import Call, Point
from tests.harness.processes import kill_qemu, kill_qemus, qemus
from tests.live.machine import context_of, hold_invariants

BAKE = "qmpsnap.ops.fork.bake"
POINTS: dict[str, Point | Call] = {
    **{f"{step.name}, {when}": Point("fork", step.name, when) for step in steps.STEPS["fork"] for when in watch.WHEN},
    "a template is begun": Call(BAKE, "_in_qemu", "before", 1),
    "its memory is loaded": Call(BAKE, "_save_devices", "before", 1),
    "its devices are saved": Call(BAKE, "_save_devices", "after", 1),
    "before it is published": Call("qmpsnap.machine.templates", "publish", "before", 1),
    "its file is written": Call("qmpsnap.machine.templates", "digest_of", "after", 1),
    "the fork's QEMU is launched": Call("qmpsnap.ops.lifecycle.power", "launch", "after", 1),
    "its memory is mapped": Call("qmpsnap.ops.lifecycle.power", "load", "after", 1),
}
DEATHS = ("controller", "both")


async def parent(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    vm = await q.define(site.ONE)
    await site.grow(vm, "s1")
    await vm.start()
    await vm.snapshot("warm", kind="full")
    return vm


async def judge(vm: qmpsnap.MachineHandle, before: site.Before, form: str) -> None:
    """Raises what is violated."""
    async with qmpsnap.open() as q:
        names = [found.name for found in await q.machines()]
        for name in {*names, *q.context.store.unborn()}:
            await q.recover(name)
    home = context_of(vm).home
    async with qmpsnap.open() as q:
        machines = {found.name: found for found in await q.machines()}
        child = machines.get("child")
        if child:
            await hold_invariants(child)
            if form == "ephemeral fork":
                assert await child.state() == "running", "an ephemeral fork is left that does not run"
        else:
            assert not home.machine_dir("child").exists(), "something of a fork is left"
        running = [name for name, found in machines.items() if await found.is_running()]
        assert len(qemus(home.data)) == len(running), "a QEMU is left that no machine has"
        (shelf,) = templates.shelves(home)
        assert not shelf.unfinished(), "part of a template is left"
        assert {key for key in shelf.names() if not shelf.read(key)} == set(), "a template is left that is none"
        for name in machines:
            assert not await q.recover(name), "I8: something was open still"
        if child:
            if await child.is_running():
                await child.stop(force=True)
            if form == "fork":
                await child.undefine(disks="remove")
        await vm.fork("warm", "child")
        await hold_invariants(await q.machine("child"))
    await site.judge(vm, home.data / "elsewhere", before, site.Expected(ends=True), then=False)


class Case(Struct, frozen=True):
    """A form of the verb, where something dies, and what."""

    form: str
    at: str
    death: str

    def __str__(self) -> str:
        return f"{self.form}-{self.at}-{self.death}"


CASES = [Case(form, at, death) for form, death, at in product(FORKS, DEATHS, POINTS)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=pytest.mark.short if n % 2 else ()) for n, case in enumerate(CASES)]
)
async def test_killed(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    point = POINTS[case.at]
    between = "" if isinstance(point, Point) else " between steps"
    fault.case(f"kill -9{between}: {'controller and QEMU' if case.death == 'both' else 'controller'}", "fork")
    vm = await parent(q)
    before = await site.look(vm)
    died = await controller_dies(case.form, place, point, qemu_too=case.death == "both")
    assert died.died, died.said
    if isinstance(point, Point):
        fault.reached("fork", point.step)
    await judge(vm, before, case.form)


@pytest.mark.parametrize("form", FORKS)
@pytest.mark.parametrize("step", [step.name for step in steps.STEPS["fork"]])
async def test_every_qemu_is_killed(q: qmpsnap.Controller, place: Path, fault: Fault, form: str, step: str) -> None:
    fault.case("kill -9: QEMU", "fork")
    vm = await parent(q)
    before = await site.look(vm)
    killed: list[bool] = []

    def hook(verb: str, at: str, when: watch.When) -> None:
        if not killed and (verb, at, when) == ("fork", step, "after"):
            killed.append(kill_qemus(context_of(vm).home.data))

    with watch.watching(hook), contextlib.suppress(qmpsnap.QmpsnapError):
        await vm.fork("warm", "child", ephemeral=form == "ephemeral fork")
    assert killed == [True]
    fault.reached("fork", step)
    await judge(vm, before, form)


async def test_the_forks_qemu_is_killed_as_it_loads(
    q: qmpsnap.Controller, fault: Fault, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.case("kill -9 between steps: QEMU", "fork")
    vm = await parent(q)
    before = await site.look(vm)

    async def dying(qemu: Monitor, loading: Loading) -> None:
        kill_qemu(await q.machine("child"))
        await load(qemu, loading)

    with monkeypatch.context() as patch:
        patch.setattr("qmpsnap.ops.lifecycle.power.load", dying)
        with pytest.raises(qmpsnap.QmpsnapError) as failed:
            await vm.fork("warm", "child")
    assert failed.value.effect == "applied"  # there is a machine, and it does not run
    assert await (await q.machine("child")).state() == "stopped"
    await judge(vm, before, "fork")


@pytest.mark.parametrize("when", watch.WHEN)
async def test_killed_as_it_evicts_another_template(
    q: qmpsnap.Controller, place: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, when: watch.When
) -> None:
    fault.case("kill -9 between steps: controller", "fork")
    vm = await parent(q)
    await vm.snapshot("other", kind="full")
    await vm.fork("other", "child")
    child = await q.machine("child")
    await child.stop(force=True)
    await child.undefine(disks="remove")
    monkeypatch.setenv(templates.LIMIT, f"{site.ONE.memory >> 20}M")
    before = await site.look(vm)
    died = await controller_dies("fork", place, Call("qmpsnap.machine.templates", "Shelf.remove", when, 1))
    assert died.died, died.said
    await judge(vm, before, "fork")
    assert len(await q.templates()) == 1


async def test_fifty_ephemeral_forks_killed_at_once_are_removed_by_the_next_command(
    q: qmpsnap.Controller, home: Path, fault: Fault
) -> None:
    fault.case("kill -9: QEMU", "fork")
    vm = await parent(q)
    await vm.fork("warm", count=50, ephemeral=True)
    assert len(qemus(home)) == 51
    kill_qemus(home)
    async with qmpsnap.open() as again:
        assert [found.name for found in await again.machines()] == [vm.name]
    for folder in (home / "machines", home / "run", home / "logs", home / "locks"):
        assert [entry.name for entry in folder.iterdir()] == [vm.name]
    assert qemus(home) == []
    await hold_invariants(vm)
