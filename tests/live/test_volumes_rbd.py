"""Snapshots by a Ceph cluster, of machines whose disks are its images: what they hold, and what depends on what."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot, NotFoundError, QmpsnapError, StateError, StorageHangs, StoreMismatch
from qmpsnap.host import ceph, programs
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations import steps
from qmpsnap.ops.rebuild import rebuild
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.volumes.rbd import Rbd
from tests.faults.deaths import controller_dies
from tests.faults.site import NAME
from tests.harness import watch
from tests.harness.deaths import Point
from tests.live import counting
from tests.live.cluster import MIB, cluster, new_image, on_image, rbd, require_module
from tests.live.machine import Hashes, active_hash, context_of, fill, hold_invariants, snapshot_hashes
from tests.live.test_rebuild import at, lose

pytestmark = [pytest.mark.xdist_group("ceph"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    with cluster() as found:
        yield found


@pytest.fixture
def image(conf: Path) -> RbdImage:
    found = new_image(conf)
    require_module(found)
    return found


async def grown(q: qmpsnap.Controller, image: RbdImage) -> tuple[qmpsnap.MachineHandle, Hashes]:
    """A paused machine with two volume snapshots, and something of its own before each and after the last."""
    vm = await q.define(on_image(image))
    await vm.start(paused=True)
    for number, name in enumerate(("one", "two"), start=1):
        await fill(vm, "vda", number, offset=number * MIB)
        taken = await vm.snapshot(name, kind="volume")
        assert taken.kind == "volume"
    await fill(vm, "vda", 3, offset=3 * MIB)
    return vm, await snapshot_hashes(vm)


def ours(image: RbdImage, uuid: str) -> list[str]:
    """What the cluster has of a machine's snapshots and clones, as ``rbd`` names them."""
    names = rbd(RbdImage(pool=image.pool, image="", conf=image.conf), "ls", "--format=json")
    images = [replace(image, image=name) for name in names if name == image.image or uuid in name]
    found = [str(one) for one in images if uuid in one.image]
    found += [f"{one}@{kept['name']}" for one in images for kept in ceph.snapshots(one) if uuid in str(kept["name"])]
    return sorted(found)


def data(image: RbdImage) -> list[int]:
    """The first byte of the second MiB and of the three after it."""
    found: bytes = rbd(image, "export", "--no-progress", "-")
    return [found[number * MIB] for number in range(1, 5)]


async def test_a_snapshot_is_reverted_to_and_that_is_undone(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes = await grown(q, image)
    uuid = (await vm.record()).uuid.replace("-", "")
    assert [at.layer.path for at in (await vm.chains())[0].layers] == [image.filename]
    assert [one.partition("@")[0] for one in ours(image, uuid)] == [str(image)] * 2

    done = await vm.revert("one", state="paused")
    assert done.kept
    (layer,) = (at.layer for at in (await vm.chains())[0].layers)
    clone = RbdImage.parse(layer.path)
    assert clone
    assert clone.image.startswith("qc-")
    assert (layer.owned, layer.storage, layer.identity) == (True, "rbd", ceph.info(clone).identity)
    assert data(clone) == [1, 0, 0, 0]
    await fill(vm, "vda", 4, offset=4 * MIB)
    await vm.snapshot("three", kind="volume")

    # What depends on a snapshot is named, and nothing is changed.
    before = ours(image, uuid)
    with pytest.raises(StateError, match=f"clones depend on it: rbd:{clone}") as refused:
        await vm.delete_snapshots("one")
    assert refused.value.effect == "none"
    with pytest.raises(StateError, match=f"rbd:{clone} cannot be removed: it has snapshots: rbd:{clone}@qs-"):
        await vm.revert("two", discard=True)
    assert await vm.is_running()
    assert ours(image, uuid) == before
    await hold_invariants(vm, hashes)

    back = await vm.revert(done.kept.name)
    assert back.kept
    await vm.stop(force=True)
    assert data(image) == [1, 2, 3, 0]
    plan = await vm.delete_snapshots("two", "three", back.kept.name, "one")
    assert plan.bytes == 0
    assert ours(image, uuid) == []
    await hold_invariants(vm)


async def test_a_clone_is_flattened_and_depends_on_nothing(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes = await grown(q, image)
    await vm.revert("one", state="paused")
    clone = RbdImage.parse((await vm.chains())[0].active.path)
    assert clone
    await fill(vm, "vda", 4, offset=4 * MIB)
    await vm.snapshot("three", kind="volume")
    plan = await vm.plan_flatten("vda")
    assert plan.bytes == ceph.info(image).said["object_size"]  # all that snapshot one has lies in the first object
    with pytest.raises(StateError, match="clones depend on it") as refused:
        await vm.delete_snapshots("one")
    assert as_typed(refused.value.hint) == "let these have a copy of what they read of it with --flatten"
    told: list[JobInfo] = []
    wanted = await vm.plan_delete_snapshots("one", flatten=True)
    assert wanted.bytes == plan.bytes
    assert "parent" in ceph.info(clone).said
    done = await vm.delete_snapshots("one", flatten=True, report=told.append)
    assert done.bytes == plan.bytes
    assert (told[-1].type, told[-1].current_progress) == ("flatten", plan.bytes)
    assert "parent" not in ceph.info(clone).said
    assert data(clone) == [1, 0, 0, 4]
    assert [one.verb for one in context_of(vm).store.operations(vm.name)][-2:] == ["flatten", "delete"]
    assert (await vm.flatten("vda")).clones == ()
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] == "two"})

    # A revert makes the next one, whose tie its own snapshots keep if the cluster cannot take it from them.
    await vm.revert("two", state="paused")
    clone = RbdImage.parse((await vm.chains())[0].active.path)
    assert clone
    assert (await vm.apply(await vm.plan_flatten("vda"))).bytes == plan.bytes
    assert data(clone) == [1, 2, 0, 0]
    await vm.delete_snapshots("two")
    await hold_invariants(vm)
    await vm.stop(force=True)
    old = replace(image, image=f"{image.image}-old")
    rbd(replace(image, snapshot=None), "snap", "create", "--no-progress", "--snap=s")
    rbd(image, "snap", "protect", "--snap=s")
    rbd(image, "clone", "--snap=s", f"--dest={image.pool}/{old.image}", "--image-feature=layering")
    other = await q.define(on_image(old, "other"))
    await other.snapshot("own", kind="volume")
    with pytest.raises(StateError, match="no feature deep-flatten: its snapshots would still depend on") as refused:
        await other.flatten("vda")
    assert refused.value.effect == "none"


@pytest.mark.grid
@pytest.mark.parametrize("step", [step.name for step in steps.STEPS["flatten"]])
async def test_a_killed_flatten_is_done_again(q: qmpsnap.Controller, image: RbdImage, home: Path, step: str) -> None:
    vm = await q.define(on_image(image, NAME))
    await vm.start(paused=True)
    await fill(vm, "vda", 1, offset=MIB)
    await vm.snapshot("one", kind="volume")
    await vm.revert("one", state="paused")
    hashes = await snapshot_hashes(vm)
    for when in watch.WHEN:
        died = await controller_dies("flatten", home, Point("flatten", step, when))
        assert died.died, died.said
        await vm.recover()
        last = context_of(vm).store.operations(vm.name)[-1]
        done = {(steps.PLANNED, "before"): ("revert", "settled"), (steps.SETTLED, when): ("flatten", "settled")}
        assert (last.verb, last.state) == done.get((step, when), ("flatten", "failed"))
        await hold_invariants(vm, hashes)
        if step == steps.SETTLED:
            break
    await vm.flatten("vda")
    assert not (await vm.plan_flatten("vda")).details.clones
    await hold_invariants(vm, hashes)


@pytest.mark.grid
async def test_a_flatten_is_given_up_where_the_cluster_hangs(
    q: qmpsnap.Controller, image: RbdImage, conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes = await grown(q, image)
    await vm.revert("one", state="paused")
    osd = int((conf.parent / "osd.pid").read_text())
    real = programs.running

    def hangs(*arguments: Any, **how: Any) -> Any:
        os.kill(osd, signal.SIGSTOP)
        return real(*arguments, **how)

    monkeypatch.setattr(ceph, "running", hangs)
    monkeypatch.setattr(ceph, "_SILENCE", 0.5)
    monkeypatch.setenv("QMPSNAP_STORAGE_DEADLINE", "1")
    try:
        with pytest.raises(StorageHangs, match=r"flatten of .* does not go on: .* does not answer") as given:
            await vm.flatten("vda")
        assert given.value.effect == "unknown"
    finally:
        os.kill(osd, signal.SIGCONT)
    monkeypatch.undo()
    await vm.recover()
    await hold_invariants(vm, hashes)
    await vm.flatten("vda")
    assert not (await vm.plan_flatten("vda")).details.clones
    await hold_invariants(vm, hashes)


@pytest.mark.grid
async def test_a_stopped_machine_needs_no_overlay_and_all_goes_with_it(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes = await grown(q, image)
    uuid = (await vm.record()).uuid.replace("-", "")
    await vm.stop(force=True)
    hashes |= {("off", "vda"): await active_hash(vm)}
    await vm.snapshot("off", kind="volume")
    await vm.revert("two")
    await vm.snapshot("more", kind="volume")
    await hold_invariants(vm, hashes)
    rbd(image, "snap", "create", "--no-progress", "--snap=mine")
    await vm.undefine(disks="remove")
    assert ours(image, uuid) == []
    assert [one["name"] for one in ceph.snapshots(image)] == ["mine"]


@pytest.mark.grid
async def test_another_machine_reads_a_snapshot(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes = await grown(q, image)
    clone = await q.define(
        MachineSpec(name="clone", memory=64 * MIB, disks=(DiskSpec(name="vda", base="web@one"),), agent=False)
    )
    await clone.start(paused=True)
    await fill(clone, "vda", 7, offset=7 * MIB)
    await clone.snapshot("c1")
    await clone.stop(force=True)
    await vm.delete_snapshots("one")
    await hold_invariants(clone)
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] == "two"})
    assert (await vm.chains())[0].active.path == image.filename


@pytest.mark.grid
async def test_memory_and_image_are_of_one_instant(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm = await q.define(on_image(image))
    await vm.start()
    taken = await vm.snapshot("full", kind="full", volume=True)
    assert taken.vmstate
    assert len((await vm.chains())[0].layers) == 1
    await fill(vm, "vda", 2)
    assert (await vm.revert("full")).memory
    hashes = await snapshot_hashes(vm)
    assert len((await vm.chains())[0].layers) == 1
    await hold_invariants(vm, hashes)


@pytest.mark.grid
@pytest.mark.parametrize("quiesce", ["skip", "require"])
async def test_the_disks_of_a_writing_guest_are_of_one_instant(
    q: qmpsnap.Controller,
    image: RbdImage,
    guest_spec: MachineSpec,
    tmp_path: Path,
    quiesce: Literal["skip", "require"],
) -> None:
    """A qcow2 file, which keeps a layer for each snapshot here, and an image of the cluster."""
    vm = await q.define(replace(guest_spec, disks=(guest_spec.disks[0], DiskSpec(name="vdb", rbd=image))))
    await vm.start()
    in_files = quiesce == "require"
    await counting.count(vm, in_files=in_files)
    for _ in range(3 if in_files else 20):
        taken = await vm.snapshot(kind="volume", mixed=True, quiesce=quiesce)
        assert taken.level == ("fs" if in_files else "crash")
    assert (await vm.chains("vdb"))[0].active.path == image.filename
    await vm.stop(force=True)
    counts = [await counting.counted(vm, one, tmp_path, in_files=in_files) for one in await vm.snapshots()]
    counting.hold_one_instant(counts)
    await vm.revert((await vm.snapshots())[-1].name)
    active = [chain.active for chain in context_of(vm).store.chains(vm.name)]
    assert [await counting.counter(vm, layer, tmp_path, in_file=in_files) for layer in active] == counts[-1]


async def test_what_was_changed_behind_our_back_is_found(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes = await grown(q, image)
    point = (await vm.snapshots())[0].points[0]
    path = context_of(vm).store.layer(point.layer).path
    kept = RbdImage.parse(path)
    assert kept
    rbd(kept, "snap", "unprotect")
    rbd(kept, "snap", "rm", "--no-progress")
    found = (await vm.check()).findings
    assert [(one.code, one.layer) for one in found] == [("layer-missing", point.layer)]
    for verb in (vm.revert("one"), vm.revert("one", discard=True)):
        with pytest.raises((StoreMismatch, HostCannot, NotFoundError)) as refused:
            await verb
        assert refused.value.effect == "none"
    rbd(kept, "snap", "create", "--no-progress")
    assert [one.code for one in (await vm.check()).findings] == ["layer-replaced"]
    with pytest.raises(StoreMismatch, match="not the recorded"):
        await vm.revert("one")
    assert await vm.is_running()
    rbd(kept, "snap", "rm", "--no-progress")
    await vm.delete_snapshots("one")
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] == "two"})


@pytest.mark.grid
@pytest.mark.parametrize("verb", ["snapshot", "revert"])
async def test_a_cluster_that_hangs_loses_nothing(
    q: qmpsnap.Controller, image: RbdImage, conf: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """It stops where the driver is at work; recovery ends that once the cluster answers again."""
    vm, hashes = await grown(q, image)
    osd = int((conf.parent / "osd.pid").read_text())
    real = getattr(Rbd, "snapshot" if verb == "snapshot" else "clone")

    async def hangs(self: Rbd, *arguments: object) -> object:
        os.kill(osd, signal.SIGSTOP)
        monkeypatch.setattr("qmpsnap.volumes.rbd.DEADLINE", 1.0)
        monkeypatch.setenv("QMPSNAP_STORAGE_DEADLINE", "1")
        return await real(self, *arguments)

    monkeypatch.setattr(Rbd, "snapshot" if verb == "snapshot" else "clone", hangs)
    try:
        with pytest.raises(QmpsnapError) as failed:
            await (vm.snapshot("three", kind="volume") if verb == "snapshot" else vm.revert("one"))
        assert isinstance(failed.value, StorageHangs)
        assert failed.value.effect == "unknown"
    finally:
        os.kill(osd, signal.SIGCONT)
    monkeypatch.undo()
    await vm.recover()
    assert len((await vm.chains())[0].layers) == 1
    await hold_invariants(vm, hashes)
    await vm.snapshot("four", kind="volume")
    await hold_invariants(vm, hashes)


@pytest.mark.grid
async def test_a_lost_store_is_made_again(image: RbdImage, home: Path) -> None:
    async with qmpsnap.open() as q:
        vm, hashes = await grown(q, image)
        await vm.revert("one", state="paused")
        await fill(vm, "vda", 4, offset=4 * MIB)
        await vm.snapshot("three", kind="volume")
        await vm.stop(force=True)
        before = (await vm.snapshots(), await vm.chains(), await snapshot_hashes(vm))
    lose(home)
    done = await rebuild.run(at(home), set_aside=False)
    assert ([(made.name, made.notes) for made in done.machines], done.left_out) == ([("web", ())], ())
    async with qmpsnap.open() as q:
        vm = await q.machine("web")
        assert (await vm.snapshots(), await vm.chains(), await snapshot_hashes(vm)) == before
        await hold_invariants(vm, hashes)
        await vm.revert("two")
        await vm.delete_snapshots("one", flatten=True)
        await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] == "two"})


async def test_what_is_left_in_the_cluster_is_found(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm = await q.define(on_image(image))
    taken = await vm.snapshot(kind="volume")
    await hold_invariants(vm)
    kept = RbdImage.parse(context_of(vm).store.layer(taken.points[0].layer).path)
    assert kept
    assert kept.snapshot
    left = replace(kept, snapshot=kept.snapshot.replace(f"-{taken.operation}-", "-999-"))
    part = replace(kept, image=f"qc{kept.snapshot[2:]}", snapshot=None)
    rbd(left, "snap", "create", "--no-progress")
    rbd(replace(left, snapshot=f"qs-{'0' * 32}-1-vda"), "snap", "create", "--no-progress")  # another machine's
    rbd(kept, "clone", f"--dest-pool={part.pool}", f"--dest={part.image}")
    found = (await vm.check()).findings
    assert {(one.code, one.file, one.repairable) for one in found} == {
        ("volume-left", left.filename, False),
        ("volume-left", part.filename, True),
    }
    found = (await vm.check(repair=True)).findings
    assert [one.file for one in found] == [left.filename]
