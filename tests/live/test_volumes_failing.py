"""Volume snapshots and reverts whose driver fails, at each of its verbs; and two hundred of them in a row."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pytest

import qmpsnap
from qmpsnap.errors import HostCannot, OperationPending, QmpsnapError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base import volumes
from qmpsnap.qmp.session import Monitor
from qmpsnap.volumes.reflink import Reflink
from tests.live.machine import MIB, active_hash, context_of, fill, hold_invariants, snapshot_hashes
from tests.volumes import copying

TWO = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=4 * MIB), DiskSpec(name="vdb", size=4 * MIB, format="raw")),
    agent=False,
)
State = Literal["running", "stopped"]
When = Literal["before", "after"]
VERBS = ("probe", "snapshot", "clone", "remove", "list", "size")


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    with copying.everywhere():
        yield


class Failing:
    """A driver one verb of which fails, before or after it is done, from some call on."""

    def __init__(self, verb: str, when: When, *, after: int) -> None:
        self.verb, self.when, self.after, self.calls = verb, when, after, Counter[str]()
        self.real = Reflink()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.real, name)
        if name not in VERBS:
            return real

        async def called(*arguments: Any) -> Any:
            self.calls[name] += 1
            fails = name == self.verb and self.calls[name] > self.after
            if fails and self.when == "before":
                raise HostCannot(f"{name} fails")
            result = await real(*arguments)
            if fails:
                raise HostCannot(f"{name} fails once it is done", effect="unknown")
            return result

        return called


@contextlib.contextmanager
def _driver(verb: str, when: When, *, after: int = 0) -> Iterator[Failing]:
    driver = Failing(verb, when, after=after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "driver_of", lambda *_, **__: driver)
        yield driver


async def _machine(q: qmpsnap.Controller, state: State) -> qmpsnap.MachineHandle:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    for disk in ("vda", "vdb"):
        await fill(vm, disk, 1)
    if state == "stopped":
        await vm.stop(force=True)
    return vm


def _ours(vm: qmpsnap.MachineHandle) -> list[str]:
    folder = context_of(vm).home.machine_dir(vm.name)
    return [path.name for path in folder.iterdir() if path.name.startswith(("qs-", "qc-"))]


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("disk", ["vda", "vdb"])
async def test_a_snapshot_that_fails_is_undone(q: qmpsnap.Controller, state: State, when: When, disk: str) -> None:
    vm = await _machine(q, state)
    with (
        _driver("snapshot", when, after=int(disk == "vdb")),
        pytest.raises(HostCannot, match="snapshot fails") as failed,
    ):
        await vm.snapshot("one", kind="volume")
    complete = (disk, when) == ("vdb", "after")  # then it is taken, whatever the driver says
    assert failed.value.effect == ("applied" if complete else "none")
    assert len(await vm.snapshots()) == int(complete)
    assert len(_ours(vm)) == 2 * complete
    assert [len(chain.layers) for chain in await vm.chains()] == [1, 1]
    await hold_invariants(vm)
    await vm.snapshot("two", kind="volume")
    await hold_invariants(vm)


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_probe_that_fails_changes_nothing(q: qmpsnap.Controller, state: State) -> None:
    vm = await _machine(q, state)
    last = context_of(vm).store.operations(vm.name)[-1].id
    with _driver("probe", "before"), pytest.raises(HostCannot, match="probe fails"):
        await vm.snapshot("one", kind="volume")
    assert context_of(vm).store.operations(vm.name)[-1].id == last
    await hold_invariants(vm)


@pytest.mark.parametrize("verb", ["list", "remove"])
async def test_an_undoing_that_fails_waits_for_recovery(q: qmpsnap.Controller, verb: str) -> None:
    vm = await _machine(q, "running")
    with _driver("snapshot", "after") as driver, pytest.MonkeyPatch.context() as patch:

        async def fails(*_: object) -> None:
            raise HostCannot(f"{verb} fails")

        patch.setattr(driver, verb, fails, raising=False)
        with pytest.raises(QmpsnapError) as failed:
            await vm.snapshot("one", kind="volume")
        assert failed.value.effect == "unknown"
        with pytest.raises(OperationPending, match=f"{verb} fails"):
            await vm.recover()
    await vm.recover()
    assert [len(chain.layers) for chain in await vm.chains()] == [1, 1]
    await hold_invariants(vm)
    await vm.snapshot("two", kind="volume")
    await hold_invariants(vm)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_revert_that_fails_leaves_the_guest_alone(q: qmpsnap.Controller, when: When) -> None:
    vm = await _machine(q, "running")
    await vm.snapshot("one", kind="volume")
    hashes = await snapshot_hashes(vm)
    await fill(vm, "vda", 2)
    with _driver("clone", when, after=1), pytest.raises(HostCannot, match="clone fails") as failed:
        await vm.revert("one")
    assert failed.value.effect == "none"
    assert await vm.is_running()
    assert not [name for name in _ours(vm) if name.startswith("qc-")]
    before = await active_hash(vm)
    await hold_invariants(vm, hashes)
    await vm.revert("one", state="paused")
    assert await active_hash(vm) != before
    await hold_invariants(vm, hashes)


async def test_the_two_hundredth_costs_as_much_as_the_tenth(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is asked of QEMU and the store, which no busy host changes."""
    vm = await _machine(q, "running")
    asked: Counter[str] = Counter()
    execute = Monitor.execute

    async def counted(self: Monitor, command: str, *arguments: Any, **named: Any) -> Any:
        if command not in ("query-jobs", "query-status"):  # asked until QEMU is done
            asked["qmp"] += 1
        return await execute(self, command, *arguments, **named)

    monkeypatch.setattr(Monitor, "execute", counted)
    costs = []
    for number in range(1, 201):
        asked.clear()
        await vm.snapshot(f"n{number}", kind="volume", disks=["vda"])
        costs.append(asked["qmp"])
    assert [len(chain.layers) for chain in await vm.chains()] == [1, 1]
    assert costs[199] <= 1.5 * costs[9], costs
    await hold_invariants(vm)
    plan = await vm.delete_snapshots(*(f"n{number}" for number in range(1, 101)))
    assert plan.bytes == 0
    assert len(_ours(vm)) == 100
    await hold_invariants(vm)
