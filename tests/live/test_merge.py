"""Commit, stream and delete on real chains with known bytes: running under -S and stopped alike."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot, QmpsnapError, StateError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import JobId
from qmpsnap.qmp import jobs
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.qmp.session import Monitor
from tests.live.machine import (
    MIB,
    ONE_DISK,
    active_hash,
    content_hash,
    context_of,
    fill,
    grown,
    hold_invariants,
    snapshot_hashes,
)

pytestmark = pytest.mark.version


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
    vm = await grown(q, "s1", "s2", "s3")
    base, top, chain, lost = COMMITS[form]
    hashes, before = await snapshot_hashes(vm), await active_hash(vm)
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
    assert await active_hash(vm) == before
    await vm.snapshot("afterwards")
    if state == "stopped":
        await vm.start(paused=True)
    await fill(vm, "vda", 55)
    await hold_invariants(vm, kept)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize(("base", "chain"), [("s1", ["vda-1", "vda-4"]), (None, ["vda-4"])])
async def test_streams_harm_no_snapshot(q: qmpsnap.Controller, base: str | None, chain: list[str], state: str) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    hashes, before = await snapshot_hashes(vm), await active_hash(vm)
    if state == "stopped":
        await vm.stop(force=True)
    await vm.stream("vda", base=base)
    assert await _chain(vm) == chain
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == before
    await vm.snapshot("afterwards")
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("names", [("s1",), ("s2",), ("s3",), ("s1", "s2"), ("s1", "s3"), ("s1", "s2", "s3")])
async def test_deleting_keeps_everything_else(q: qmpsnap.Controller, names: tuple[str, ...], state: str) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    hashes, before = await snapshot_hashes(vm), await active_hash(vm)
    if state == "stopped":
        await vm.stop(force=True)
    await vm.delete_snapshots(*names)
    assert {s.name for s in await vm.snapshots()} == {"s1", "s2", "s3"} - set(names)
    kept = {key: value for key, value in hashes.items() if key[0] not in names}
    await hold_invariants(vm, kept)
    assert await active_hash(vm) == before
    assert len(await _chain(vm)) == 4 - len(names)
    files = list(context_of(vm).home.machine_dir(vm.name).glob("*.qcow2"))
    assert len(files) == 4 - len(names)
    await vm.snapshot("afterwards")
    await hold_invariants(vm, kept)


async def test_a_block_that_raises_cancels_the_job(q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    real = jobs.follow

    async def held(
        monitor: Monitor, job: JobId, *until: jobs.JobState, report: jobs.Report = jobs.unreported
    ) -> JobInfo:
        if "ready" in until:  # whatever the job does, the verb is still at it when the block raises
            info = await jobs.find(monitor, job)
            assert info
            report(info)
            await anyio.sleep_forever()
        return await real(monitor, job, *until, report=report)

    monkeypatch.setattr(jobs, "follow", held)
    chain = (await vm.chains())[0].ids
    hashes = await snapshot_hashes(vm)

    async def raising() -> None:
        async with vm.stream("vda") as job:
            async for info in job.progress():
                raise RuntimeError(info.status)

    with pytest.raises(RuntimeError, match=r"running|pending") as raised:
        await raising()
    assert raised.value.__cause__ is None
    assert (await vm.chains())[0].ids == chain
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize(("below", "above"), [(300, 2), (2, 300)])
async def test_delete_moves_the_smaller_side(q: qmpsnap.Controller, below: int, above: int, state: str) -> None:
    vm = await q.define(MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=400 * MIB),)))
    await vm.start(paused=True)
    await vm.snapshot("base")
    await fill(vm, "vda", 1, length=below * MIB)
    await vm.snapshot("doomed")
    await fill(vm, "vda", 2, offset=10 * MIB, length=above * MIB)
    hashes, before = await snapshot_hashes(vm), await active_hash(vm)
    if state == "stopped":
        await vm.stop(force=True)
    files = context_of(vm).home.machine_dir(vm.name)
    written_before = {path.name: path.stat().st_blocks * 512 for path in files.iterdir()}
    done = await vm.delete_snapshots("doomed")
    kept = "vda-3.qcow2" if above > below else "vda-2.qcow2"
    written = (files / kept).stat().st_blocks * 512 - written_before[kept]
    assert written < 4 * MIB
    assert done.bytes < 4 * MIB
    del hashes["doomed", "vda"]
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == before


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_layer_with_two_branches_stays_hidden_until_one_is_left(q: qmpsnap.Controller, state: str) -> None:
    vm = await grown(q, "a", "b")
    await vm.revert("a")
    await fill(vm, "vda", 77, offset=5 * MIB)
    await vm.snapshot("c")
    if state == "stopped":
        await vm.stop(force=True)
    hashes = await snapshot_hashes(vm)
    layer = next(s for s in await vm.snapshots() if s.name == "a").points[0].layer
    done = await vm.delete_snapshots("a")
    del hashes["a", "vda"]
    assert done.hidden == (layer,)
    assert context_of(vm).store.layer(layer).state == "hidden"
    await hold_invariants(vm, hashes)
    gone = [s.name for s in await vm.snapshots() if s.name == "b" or s.name.startswith("auto-")]
    await vm.delete_snapshots(*gone)
    for name in gone:
        del hashes[name, "vda"]
    # One branch is left: what was hidden is merged with it now.
    assert layer not in context_of(vm).store.forest().layers or len(await _chain(vm)) == 2
    assert "hidden" not in {found.state for found in context_of(vm).store.forest().layers.values()}
    await hold_invariants(vm, hashes)


async def test_what_a_clone_reads_is_never_written(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    first = context_of(vm).store.layer((await vm.snapshots())[0].points[0].layer)
    clone = await q.define(MachineSpec(name="clone", memory=64 * MIB, disks=(DiskSpec(name="vda", base=first.path),)))
    before = await content_hash(clone, (await clone.chains())[0].active.id)
    with pytest.raises(StateError, match=r"machine clone|of clone") as refused:
        await vm.commit("vda", base="s1", top="s2", consume=True)
    assert refused.value.exit_code == 4
    hashes = await snapshot_hashes(vm)
    done = await vm.delete_snapshots("s1")
    assert done.hidden == (first.id,)
    del hashes["s1", "vda"]
    await hold_invariants(vm, hashes)
    assert await content_hash(clone, (await clone.chains())[0].active.id) == before
    await clone.start(paused=True)
    await hold_invariants(clone)


async def test_bad_merges_are_refused_before_anything_happens(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    hashes = await snapshot_hashes(vm)
    for wrong, code in (
        (vm.commit("vda", base="s2", top="s1", consume=True), 4),
        (vm.commit("vda", base="vda-1", top="vda-1", consume=True), 4),
        (vm.commit("vda", base="vdb-1"), 3),
        (vm.commit("vdx"), 3),
        (vm.stream("vda", base="s3"), 4),
        (vm.stream("vda", base="nope"), 3),
        (vm.delete_snapshots("s1", "nope"), 3),
        (vm.delete_snapshots(), 2),
    ):
        with pytest.raises(QmpsnapError) as refused:
            await wrong
        assert refused.value.exit_code == code
        assert refused.value.effect == "none"
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("verb", ["stream", "commit"])
async def test_a_full_disk_pauses_the_job_and_it_goes_on_later(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, home: Path, verb: str
) -> None:
    """The space that was there when we looked is gone when the job writes."""
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    machines = home / "machines"
    machines.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", machines], check=True)  # noqa: ASYNC221
    try:
        vm = await q.define(MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=16 * MIB),)))
        await vm.start(paused=True)
        await vm.snapshot("s1")
        await fill(vm, "vda", 1, length=6 * MIB)
        await vm.snapshot("s2")
        hashes = await snapshot_hashes(vm)
        free = shutil.disk_usage(machines).free
        (machines / "filler").write_bytes(bytes(free - 4 * MIB))

        async def merge() -> None:
            await (vm.stream("vda") if verb == "stream" else vm.commit("vda", consume=True))

        with pytest.raises(HostCannot, match="are free") as refused:
            await merge()
        assert refused.value.exit_code == 9
        monkeypatch.setattr("qmpsnap.ops.merge.commit.require_space", lambda *_: None)
        with pytest.raises(HostCannot, match="no space is left") as paused:
            await merge()
        assert paused.value.effect == "unknown"
        assert "job wait" in as_typed(paused.value.hint)
        (machines / "filler").unlink()
        await vm.wait()
        assert await _chain(vm) == ["vda-3" if verb == "stream" else "vda-1"]
        await hold_invariants(vm, hashes if verb == "stream" else {})
        await vm.stop(force=True)
    finally:
        subprocess.run(["umount", "--lazy", machines], check=True)  # noqa: ASYNC221


async def test_a_frozen_layer_that_absorbed_another_is_frozen_again(q: qmpsnap.Controller) -> None:
    """QEMU 10.0 and 11.1 leave it writable: nobody else could read the snapshot that lies there."""
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    for name, length in (("a", 4), ("b", 2), ("c", 3)):
        await fill(vm, "vda", length, length=length * MIB)
        await vm.snapshot(name)
    hashes = await snapshot_hashes(vm)
    done = await vm.delete_snapshots("b")
    assert [choice.how for choice in done._plan.reductions[0].choices] == ["stream", "commit"]
    del hashes["b", "vda"]
    await hold_invariants(vm, hashes)
    await vm.snapshot("d")
    await fill(vm, "vda", 9)
    await hold_invariants(vm, hashes)


async def test_what_undefine_leaves_to_a_clone_is_hidden_in_its_chain(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1", "s2", "s3")
    await vm.stop(force=True)
    first = context_of(vm).store.layer((await vm.snapshots())[0].points[0].layer)
    clone = await q.define(MachineSpec(name="clone", memory=64 * MIB, disks=(DiskSpec(name="vda", base=first.path),)))
    before = await content_hash(clone, (await clone.chains())[0].active.id)
    await vm.undefine(disks="remove")
    assert [at.layer.state for at in (await clone.chains())[0].layers] == ["hidden", "ok"]
    await clone.snapshot("own")
    await clone.delete_snapshots("own")  # takes the hidden one along
    assert [at.layer.state for at in (await clone.chains())[0].layers] == ["ok"]
    assert await content_hash(clone, (await clone.chains())[0].active.id) == before
    assert not Path(first.path).exists() or (await clone.chains())[0].active.path == first.path
    await hold_invariants(clone)


@pytest.mark.parametrize("last", ["delete", "undefine, removing", "undefine, keeping"])
async def test_layers_without_a_snapshot_go_with_the_last_that_reads_them(q: qmpsnap.Controller, last: str) -> None:
    vm = await q.define(ONE_DISK)
    await vm.snapshot("s1")
    for _ in range(2):
        await vm.add_layers()
    reverted = await vm.revert("s1")
    assert reverted.kept
    folder, store = context_of(vm).home.machine_dir(vm.name), context_of(vm).store
    await vm.delete_snapshots(reverted.kept.name, metadata=last != "delete")
    below = {layer for chain in await vm.chains() for layer in chain.ids}
    if last == "delete":
        assert store.forest().layers.keys() == below
        assert sorted(folder.glob("*.qcow2")) == sorted(Path(store.layer(layer).path) for layer in below)
        await hold_invariants(vm)
        return
    files = sorted(map(str, folder.glob("*.qcow2")))
    assert len(files) == len(below) + 3
    fate: Literal["keep", "remove"] = "keep" if last == "undefine, keeping" else "remove"
    planned = (await vm.plan_undefine(disks=fate)).details
    assert sorted(planned.kept or planned.removed) == files
    assert sorted(await vm.undefine(disks=fate)) == files
    assert folder.exists() == (fate == "keep")
    assert not store.forest().layers
