"""Known bytes on a machine that never runs its vCPUs: exact contents, every run state, long chains."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

import qmpsnap
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.qmp.session import Session
from tests.live.machine import MIB, content_hash, fill, hold_invariants

pytestmark = pytest.mark.version


async def test_running_paused_and_stopped_machines_alike(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    hashes: dict[tuple[str, str], str] = {}

    async def take(name: str, mode: str) -> None:
        snapshot = await vm.snapshot(name)
        assert snapshot.mode == mode
        for point in snapshot.points:
            hashes[name, point.disk] = await content_hash(vm, point.layer)
        await hold_invariants(vm, hashes)

    await take("empty", "stopped")
    await vm.start(paused=True)
    for number, name in enumerate(("a", "b", "c"), start=1):
        await fill(vm, "vda", number, offset=number * MIB)
        await fill(vm, "vdb", number + 100)
        await take(name, "paused")
    await fill(vm, "vda", 9)
    await vm.stop(force=True)
    await take("down", "stopped")
    assert len({value for (_, disk), value in hashes.items() if disk == "vda"}) == 5
    await vm.start()
    await take("up", "live")


async def test_only_the_disks_asked_for(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    snapshot = await vm.snapshot("half", disks=["vdb"])
    assert [point.disk for point in snapshot.points] == ["vdb"]
    depths = {view.disk: len(view.layers) for view in await vm.chains()}
    assert depths == {"vda": 1, "vdb": 2}
    await hold_invariants(vm)


async def test_a_dry_run_tells_exactly_what_the_run_then_does(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmpsnap.ops.snapshot.plan import qmp_commands

    vm = await q.define(still_spec)
    await vm.start(paused=True)
    machine, plan = await vm.record(), (await vm.plan_snapshot("s")).details
    foretold = qmp_commands(plan, machine)
    assert [command for command, _ in foretold] == ["blockdev-add", "blockdev-add", "transaction"]
    assert await vm.snapshots() == ()
    await hold_invariants(vm)

    sent: list[tuple[str, Mapping[str, Any] | None]] = []
    execute = Session.execute

    async def listening(self: Session, command: str, arguments: Any = None, **rest: Any) -> Any:
        sent.append((command, arguments))
        return await execute(self, command, arguments, **rest)

    monkeypatch.setattr(Session, "execute", listening)
    await vm.snapshot("s")
    changing = [(command, arguments) for command, arguments in sent if not command.startswith(("query", "x-debug"))]
    assert changing == foretold


def _cpu(qemu: int) -> float:
    """Seconds of CPU time that we and the QEMU of that pid have taken, in steps far smaller than a clock tick."""
    threads = Path(f"/proc/{qemu}/task").iterdir()
    return time.process_time() + sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


async def test_the_hundredth_snapshot_costs_like_the_tenth(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    execute = Session.execute

    async def measuring(self: Session, command: str, *arguments: Any, **rest: Any) -> Any:
        answer = await execute(self, command, *arguments, **rest)
        sizes.append(len(msgspec.json.encode(answer)))
        return answer

    monkeypatch.setattr(Session, "execute", measuring)
    flat, deep = await _with_snapshots(q, "flat", 5), await _with_snapshots(q, "deep", 90)
    took: dict[str, list[float]] = {flat.name: [], deep.name: []}
    for _ in range(10):
        for vm in (flat, deep):  # by turns: whoever else is at work takes caches and half a core away, now from both
            process = (await vm.record()).process
            assert process
            before = _cpu(process.pid)
            await vm.snapshot()
            took[vm.name].append(_cpu(process.pid) - before)
    tenth, hundredth = sum(took[flat.name]), sum(took[deep.name])
    assert hundredth < 2 * tenth, f"10th {tenth * 100:.0f} ms of CPU time, 100th {hundredth * 100:.0f} ms"
    assert max(sizes) < 1_000_000
    assert len((await deep.chains())[0].layers) == 101
    await hold_invariants(deep)
    await deep.stop(force=True)
    await deep.start(paused=True)
    await hold_invariants(deep)


async def _with_snapshots(q: qmpsnap.Controller, name: str, count: int) -> qmpsnap.MachineHandle:
    vm = await q.define(MachineSpec(name=name, memory=64 * MIB, disks=(DiskSpec(name="vda", size=16 * MIB),)))
    await vm.start(paused=True)
    for _ in range(count):
        await vm.snapshot()
    return vm


async def test_a_linked_clone_reads_its_base_and_never_writes_it(
    q: qmpsnap.Controller, still_spec: MachineSpec, home: Path
) -> None:
    origin = await q.define(still_spec)
    await origin.start(paused=True)
    await fill(origin, "vda", 7)
    snapshot = await origin.snapshot("golden")
    point = snapshot.points[0]
    base = q.context.store.layer(point.layer).path
    before = await content_hash(origin, point.layer)

    clone = await q.define(MachineSpec(name="clone", memory=64 * MIB, disks=(DiskSpec(name="vda", base=base),)))
    await clone.start(paused=True)
    await fill(clone, "vda", 8)
    await clone.snapshot("changed")
    assert await content_hash(origin, point.layer) == before
    assert (await clone.chains())[0].layers[0].layer.id == point.layer
    await clone.stop(force=True)
    gone = await clone.undefine(disks="remove")
    assert base not in gone
    assert Path(base).exists()
    await hold_invariants(origin, {("golden", "vda"): before})
