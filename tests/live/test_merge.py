"""Commit, stream and delete on real chains with known bytes: running under -S and stopped alike."""

import pytest

import qmpsnap
from qmpsnap.errors import StateError
from qmpsnap.model.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB, content_hash, context_of, fill, hold_invariants

SPEC = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=16 * MIB),))


async def _grown(q: qmpsnap.Controller, names: tuple[str, ...] = ("s1", "s2", "s3")) -> qmpsnap.MachineHandle:
    """A machine with three snapshots, a MiB of its own written before each and one more after the last."""
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    for number, name in enumerate(names, start=1):
        await fill(vm, "vda", number, offset=number * MIB)
        await vm.snapshot(name)
    await fill(vm, "vda", 99, offset=8 * MIB)
    return vm


async def _hashes(vm: qmpsnap.MachineHandle) -> dict[tuple[str, str], str]:
    return {
        (snapshot.name, point.disk): await content_hash(vm, point.layer)
        for snapshot in await vm.snapshots()
        if snapshot.state == "ok"
        for point in snapshot.points
    }


async def _active_hash(vm: qmpsnap.MachineHandle) -> str:
    """What the guest would read now: of a stopped machine the active layer, of a running one that of a new snapshot."""
    if await vm.is_running():
        await vm.stop(force=True)
        found = await content_hash(vm, (await vm.chains())[0].layers[-1].layer.id)
        await vm.start(paused=True)
        return found
    return await content_hash(vm, (await vm.chains())[0].layers[-1].layer.id)


async def _chain(vm: qmpsnap.MachineHandle) -> list[str]:
    return [layer.layer.id for layer in (await vm.chains())[0].layers]


COMMITS = {
    "s1 into the base": ("s1", "s2", ["vda-1", "vda-3", "vda-4"], {"s1"}),
    "s2 into s1": ("s2", "s3", ["vda-1", "vda-2", "vda-4"], {"s2"}),
    "s2 into the base": ("s1", "s3", ["vda-1", "vda-4"], {"s1", "s2"}),
    "the active layer": (None, None, ["vda-1"], {"s1", "s2", "s3"}),
}


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("form", COMMITS)
async def test_the_four_commits(q: qmpsnap.Controller, form: str, state: str) -> None:
    vm = await _grown(q)
    base, top, chain, lost = COMMITS[form]
    hashes, before = await _hashes(vm), await _active_hash(vm)
    if state == "stopped":
        await vm.stop(force=True)
    with pytest.raises(StateError, match=", ".join(sorted(lost))) as refused:
        await vm.commit("vda", base=base, top=top)
    assert refused.value.exit_code == 4
    await hold_invariants(vm, hashes)

    await vm.commit("vda", base=base, top=top, consume=True)
    assert await _chain(vm) == chain
    assert {s.name for s in await vm.snapshots() if s.state == "consumed"} == lost
    kept = {key: value for key, value in hashes.items() if key[0] not in lost}
    await hold_invariants(vm, kept)
    assert await _active_hash(vm) == before
    await vm.snapshot("afterwards")
    if state == "stopped":
        await vm.start(paused=True)
    await fill(vm, "vda", 55)
    await hold_invariants(vm, kept)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize(("base", "chain"), [("s1", ["vda-1", "vda-4"]), (None, ["vda-4"])])
async def test_streams_harm_no_snapshot(q: qmpsnap.Controller, base: str | None, chain: list[str], state: str) -> None:
    vm = await _grown(q)
    hashes, before = await _hashes(vm), await _active_hash(vm)
    if state == "stopped":
        await vm.stop(force=True)
    await vm.stream("vda", base=base)
    assert await _chain(vm) == chain
    await hold_invariants(vm, hashes)
    assert await _active_hash(vm) == before
    await vm.snapshot("afterwards")
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("names", [("s1",), ("s2",), ("s3",), ("s1", "s2"), ("s1", "s3"), ("s1", "s2", "s3")])
async def test_deleting_keeps_everything_else(q: qmpsnap.Controller, names: tuple[str, ...], state: str) -> None:
    vm = await _grown(q)
    hashes, before = await _hashes(vm), await _active_hash(vm)
    if state == "stopped":
        await vm.stop(force=True)
    await vm.delete_snapshots(*names)
    assert {s.name for s in await vm.snapshots()} == {"s1", "s2", "s3"} - set(names)
    kept = {key: value for key, value in hashes.items() if key[0] not in names}
    await hold_invariants(vm, kept)
    assert await _active_hash(vm) == before
    assert len(await _chain(vm)) == 4 - len(names)
    files = list(context_of(vm).home.machine_dir(vm.name).iterdir())
    assert len(files) == 4 - len(names)
    await vm.snapshot("afterwards")
    await hold_invariants(vm, kept)
