"""Snapshots by the storage itself, on real xfs and btrfs: what they hold, and that no chain grows."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot, OperationPending, StateError, StoreMismatch, UsageError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.merge.job import MergeJob
from qmpsnap.ops.snapshot import fold
from qmpsnap.volumes import reflink
from tests.harness import mounts
from tests.live import counting
from tests.live.booted import start_booted
from tests.live.conftest import _kill_all_below
from tests.live.machine import (
    MIB,
    Hashes,
    active_hash,
    content_hash,
    context_of,
    fill,
    hold_invariants,
    snapshot_hashes,
)

pytestmark = pytest.mark.version

TWO = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=16 * MIB), DiskSpec(name="vdb", size=16 * MIB, format="raw")),
)


@pytest.fixture(scope="module", params=mounts.KINDS)
def storage(request: pytest.FixtureRequest) -> Iterator[Path]:
    mounts.require(request.param)
    folder = Path(tempfile.mkdtemp(prefix="qr-"))
    with mounts.mounted(request.param, folder) as place:
        yield place
    shutil.rmtree(folder)


@pytest.fixture
def home(storage: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """On the storage under test."""
    folder = Path(tempfile.mkdtemp(prefix="qs-", dir=storage))
    monkeypatch.setenv("QMPSNAP_HOME", str(folder))
    yield folder
    _kill_all_below(folder)
    shutil.rmtree(folder)


async def _depths(vm: qmpsnap.MachineHandle) -> list[int]:
    return [len(chain.layers) for chain in await vm.chains()]


async def _layers(vm: qmpsnap.MachineHandle) -> list[str]:
    return [chain.active.id for chain in context_of(vm).store.chains(vm.name)]


async def _written(vm: qmpsnap.MachineHandle, number: int) -> None:
    """To both disks, as the guest would."""
    for disk in ("vda", "vdb"):
        await fill(vm, disk, number, offset=number * MIB)


async def _taken(vm: qmpsnap.MachineHandle, *names: str) -> Hashes:
    """Volume snapshots with something of its own before each and more after the last; their hashes."""
    for number, name in enumerate(names, start=1):
        await _written(vm, number)
        taken = await vm.snapshot(name, kind="volume")
        assert taken.kind == "volume"
    await _written(vm, len(names) + 1)
    return await snapshot_hashes(vm)


async def test_each_snapshot_holds_its_moment_and_no_chain_grows(q: qmpsnap.Controller) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    before = await _layers(vm)
    hashes = await _taken(vm, "one", "two", "three")
    assert len(set(hashes.values())) == 3  # the disks are written to alike
    assert await _layers(vm) == before
    assert await _depths(vm) == [1, 1]
    await hold_invariants(vm, hashes)

    done = await vm.revert("two", state="paused")
    assert done.kept
    assert await _depths(vm) == [1, 1]
    hashes |= {key: value for key, value in (await snapshot_hashes(vm)).items() if key[0] == done.kept.name}
    await _written(vm, 9)
    await hold_invariants(vm, hashes)
    assert await _depths(vm) == [1, 1]

    back = await vm.revert(done.kept.name)  # undone
    assert back.kept
    await vm.stop(force=True)
    assert await active_hash(vm) == hashes[done.kept.name, "vda"]
    await hold_invariants(vm, hashes)

    plan = await vm.delete_snapshots("one", "two", "three", back.kept.name)
    assert plan.bytes == 0
    left = {key: value for key, value in hashes.items() if key[0] == done.kept.name}
    await hold_invariants(vm, left)
    folder = context_of(vm).home.machine_dir(vm.name)
    assert [path.name for path in folder.iterdir() if path.name.startswith("qs-")] == []
    await vm.undefine(disks="remove")
    assert not folder.exists()


async def test_a_stopped_machine_needs_no_overlay(q: qmpsnap.Controller) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    await _written(vm, 1)
    await vm.stop(force=True)
    before = await active_hash(vm)
    taken = await vm.snapshot(kind="volume")
    assert await content_hash(vm, taken.points[0].layer) == before
    assert taken.pause_ms is None
    assert await _depths(vm) == [1, 1]
    await vm.start(paused=True)
    await _written(vm, 2)
    await hold_invariants(vm, {(taken.name, "vda"): before})


async def test_on_top_of_ordinary_snapshots(q: qmpsnap.Controller) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    await _written(vm, 1)
    await vm.snapshot("ordinary")
    hashes = await _taken(vm, "one", "two")
    assert await _depths(vm) == [2, 2]
    await vm.revert("one", state="paused")
    assert await _depths(vm) == [2, 2]
    await _written(vm, 7)
    await vm.snapshot("later")
    await vm.revert("ordinary", state="paused")
    await vm.delete_snapshots("one", "later")
    await hold_invariants(vm, {key: found for key, found in hashes.items() if key[0] != "one"})


async def test_the_disks_of_a_writing_guest_are_of_one_instant(
    q: qmpsnap.Controller, guest_spec: MachineSpec, tmp_path: Path
) -> None:
    vm = await q.define(replace(guest_spec, disks=(guest_spec.disks[0], RAW)))
    await start_booted(vm)
    await counting.count(vm)
    for _ in range(20):
        await vm.snapshot(kind="volume")
        assert await _depths(vm) == [1, 1]
    await vm.stop(force=True)
    counts = [await counting.counted(vm, snapshot, tmp_path) for snapshot in await vm.snapshots()]
    counting.hold_one_instant(counts)
    await vm.revert((await vm.snapshots())[-1].name)
    active = [chain.active for chain in context_of(vm).store.chains(vm.name)]
    assert [await counting.counter(vm, layer, tmp_path) for layer in active] == counts[-1]
    await hold_invariants(vm)


@pytest.mark.grid
async def test_the_file_systems_of_a_writing_guest_are_whole(
    q: qmpsnap.Controller, guest_spec: MachineSpec, tmp_path: Path
) -> None:
    vm = await q.define(replace(guest_spec, disks=(guest_spec.disks[0], RAW)))
    await start_booted(vm)
    await counting.count(vm, in_files=True)
    for _ in range(5):
        taken = await vm.snapshot(kind="volume", quiesce="require")
        assert taken.level == "fs"
    await vm.stop(force=True)
    counting.hold_one_instant(
        [await counting.counted(vm, one, tmp_path, in_files=True) for one in await vm.snapshots()]
    )


RAW = DiskSpec(name="vdb", size=64 * MIB, format="raw")


async def test_with_the_memory_of_the_same_instant(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run("echo before > /mark; dd if=/dev/urandom of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null")
    said = (await vm.run("cat /mark; dd if=/dev/vda bs=1M count=2 2>/dev/null | sha256sum")).stdout
    taken = await vm.snapshot("full", kind="full", volume=True)
    assert taken.kind == "full"
    assert taken.vmstate
    assert await _depths(vm) == [1, 1]
    await vm.run("echo after > /mark; dd if=/dev/zero of=/dev/vda bs=1M count=2 conv=fsync 2>/dev/null; sync")
    done = await vm.revert("full")
    assert done.memory
    again = await vm.run("cat /mark; dd if=/dev/vda bs=1M count=2 iflag=direct 2>/dev/null | sha256sum")
    assert again.stdout == said
    assert await _depths(vm) == [1, 1]
    await hold_invariants(vm)


async def test_an_image_of_the_user_s_stays_the_active_one(q: qmpsnap.Controller, place: Path) -> None:
    image = place / "-mine.raw"
    image.write_bytes(b"\0" * 8 * MIB)
    spec = MachineSpec(
        name="theirs", memory=64 * MIB, disks=(DiskSpec(name="vda", image=str(image), format="raw"),), agent=False
    )
    vm = await q.define(spec, folders=(place,))
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    taken = await vm.snapshot(kind="volume")
    hashes = await snapshot_hashes(vm)
    await fill(vm, "vda", 2)
    assert await _depths(vm) == [1]
    assert image.read_bytes()[:1] == b"\2"
    await hold_invariants(vm, hashes)
    await vm.revert(taken.name, state="paused")
    await fill(vm, "vda", 3)
    assert image.read_bytes()[:1] == b"\2"  # kept for the automatic snapshot
    await hold_invariants(vm, hashes)
    await vm.stop(force=True)
    await vm.undefine(disks="remove")
    assert [path.name for path in place.iterdir()] == [image.name]


@contextlib.contextmanager
def _in_memory() -> Iterator[Path]:
    """A folder on a file system without reflinks."""
    folder = Path(tempfile.mkdtemp(prefix="qs-", dir="/dev/shm"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


async def test_a_disk_without_a_driver_is_refused_or_keeps_a_layer(q: qmpsnap.Controller) -> None:
    with _in_memory() as elsewhere:
        image = elsewhere / "image.raw"
        image.write_bytes(b"\0" * 8 * MIB)
        disks = (TWO.disks[0], DiskSpec(name="vdb", image=str(image), format="raw"))
        spec = MachineSpec(name="still", memory=64 * MIB, disks=disks)
        vm = await q.define(spec, folders=(elsewhere,))
        await vm.start(paused=True)
        with pytest.raises(
            StateError, match=r"storage of disk vdb .* cannot make snapshots: .*cannot clone"
        ) as refused:
            await vm.snapshot(kind="volume")
        assert refused.value.effect == "none"
        assert "--mixed" in as_typed(refused.value.hint)
        with pytest.raises(StateError, match="no disk of machine still has storage"):
            await vm.snapshot(kind="volume", mixed=True, disks=["vdb"])
        assert await _depths(vm) == [1, 1]
        await fill(vm, "vdb", 1)
        taken = await vm.snapshot("mixed", kind="volume", mixed=True)
        assert await _depths(vm) == [1, 2]
        hashes = await snapshot_hashes(vm)
        await fill(vm, "vdb", 2)
        await fill(vm, "vda", 2)
        await hold_invariants(vm, hashes)
        await vm.revert(taken.name, state="paused")
        assert await _depths(vm) == [1, 2]
        await hold_invariants(vm, hashes)
        await vm.stop(force=True)
        await vm.undefine(disks="keep")


async def test_a_snapshot_that_was_removed_behind_our_back(q: qmpsnap.Controller) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    hashes = await _taken(vm, "one", "two")
    point = (await vm.snapshots())[0].points[0]
    Path(context_of(vm).store.layer(point.layer).path).unlink()
    found = (await vm.check()).findings
    assert [(finding.code, finding.layer) for finding in found] == [("layer-missing", point.layer)]
    with pytest.raises((StoreMismatch, HostCannot)) as refused:
        await vm.revert("one")
    assert refused.value.effect == "none"
    assert await vm.is_running()
    await vm.snapshot("three", kind="volume")
    await vm.delete_snapshots("one")
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] == "two"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "disk", "volume": True}, "full"),
        ({"kind": "disk", "mixed": True}, "volume"),
        ({"kind": "disk", "lvm_size": "20%"}, "volume"),
        ({"kind": "volume", "lvm_size": "--yes"}, "no size of a thick LVM snapshot"),
        ({"kind": "volume", "files": {"vda": "/tmp/x"}}, "files"),
        ({"kind": "full", "volume": True, "degrade": True}, "degrade"),
        ({"kind": "volume", "max_pause_ms": 5}, "full"),
    ],
)
async def test_options_that_say_nothing_of_it_are_refused(
    q: qmpsnap.Controller, options: dict[str, object], match: str
) -> None:
    vm = await q.define(TWO)
    with pytest.raises(UsageError) as refused:
        await vm.snapshot(**options)  # type: ignore[call-overload]
    assert match in f"{refused.value.message} {refused.value.hint}"


async def test_what_is_left_beside_an_image_is_found(q: qmpsnap.Controller, place: Path) -> None:
    image = place / "mine.raw"
    image.write_bytes(b"\0" * 8 * MIB)
    spec = MachineSpec(name="theirs", memory=64 * MIB, disks=(DiskSpec(name="vda", image=str(image), format="raw"),))
    vm = await q.define(spec, folders=(place,))
    taken = await vm.snapshot(kind="volume")
    path = Path(context_of(vm).store.layer(taken.points[0].layer).path)
    assert path.parent == place
    await hold_invariants(vm)
    left = path.with_name(path.name.replace(f"-{taken.operation}-", "-999-"))
    part = path.with_name(f"{left.name}.part")
    other = path.with_name(f"qs-{'0' * 32}-1-vda.raw")
    for file in (left, part, other):
        file.write_bytes(b"")
    found = {(finding.code, finding.file) for finding in (await vm.check()).findings}
    assert found == {("unreferenced-file", str(left)), ("part-left", str(part))}


async def test_a_clone_in_the_making_is_no_sign_of_an_old_store(q: qmpsnap.Controller) -> None:
    """What a revert leaves that can neither make its clone nor remove what there is of it."""
    vm = await q.define(TWO)
    taken = await vm.snapshot("s1", kind="volume")
    below = (await vm.chains())[0].active.path
    name = Path(context_of(vm).store.layer(taken.points[0].layer).path).name
    part = Path(below).with_name(f"{name.replace('qs-', 'qc-').replace(f'-{taken.operation}-', '-900-')}.part")
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, str(part)]
    subprocess.run(argv, check=True)  # noqa: ASYNC221
    await vm.snapshot("s2")
    assert {(finding.code, finding.file) for finding in (await vm.check()).findings} == {("part-left", str(part))}


async def test_the_dry_run_tells_what_is_made(q: qmpsnap.Controller) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    folder = context_of(vm).home.machine_dir(vm.name)
    before = sorted(path.name for path in folder.iterdir())
    plan = (await vm.plan_snapshot("one", kind="volume")).details
    assert sorted(path.name for path in folder.iterdir()) == before
    taken = await vm.snapshot("one", kind="volume")
    assert taken.points == plan.change.snapshots[0].points
    made = {path.name for path in folder.iterdir()} - set(before)
    assert made == {Path(copy.layer.path).name for copy in plan.volumes}


async def test_another_machine_is_based_on_a_snapshot(q: qmpsnap.Controller) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    hashes = await _taken(vm, "one")
    clone = await q.define(
        MachineSpec(
            name="clone",
            memory=64 * MIB,
            disks=(DiskSpec(name="vda", base="still@one"), DiskSpec(name="vdb", base="still@one")),
        )
    )
    await clone.start(paused=True)
    await clone.stop(force=True)
    assert await active_hash(clone) == hashes["one", "vda"]
    await vm.delete_snapshots("one")
    assert await active_hash(clone) == hashes["one", "vda"]
    await hold_invariants(vm)
    await hold_invariants(clone)
    for base, code in (("still@none", "not-found"), ("none@one", "not-found")):
        with pytest.raises(qmpsnap.QmpsnapError) as refused:
            await q.define(MachineSpec(name="other", disks=(DiskSpec(name="vda", base=base),)))
        assert refused.value.code == code


# --- the overlay that is committed back -------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["wait", "cancel"])
async def test_a_commit_that_takes_too_long_goes_on(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    await _written(vm, 1)

    async def never(*_: object) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(fold, "PATIENCE", 10.0)
    monkeypatch.setattr(MergeJob, "carry_on", never)
    with pytest.raises(OperationPending, match="snapshot one is taken, but an overlay") as left:
        await vm.snapshot("one", kind="volume", disks=["vda"])
    assert left.value.exit_code == 8
    assert "job wait still" in as_typed(left.value.hint)
    monkeypatch.undo()
    hashes = await snapshot_hashes(vm)
    assert await _depths(vm) == [2, 1]
    if then == "wait":
        await vm.wait()
        assert await _depths(vm) == [1, 1]
    else:
        await vm.cancel()
        assert await _depths(vm) == [2, 1]
        await fill(vm, "vda", 3)
    await vm.snapshot("two", kind="volume")
    assert await _depths(vm) == [1, 1]
    await hold_invariants(vm, hashes)


async def test_an_overlay_that_is_left_is_committed_by_recover(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    await _written(vm, 1)
    monkeypatch.setattr(fold, "PATIENCE", 0.0)  # it ends before a job has begun
    with pytest.raises(OperationPending, match="snapshot one is taken, but an overlay") as left:
        await vm.snapshot("one", kind="volume")
    monkeypatch.undo()
    assert "recover still" in as_typed(left.value.hint)
    hashes = await snapshot_hashes(vm)
    assert await _depths(vm) == [2, 2]
    await _written(vm, 2)
    await hold_invariants(vm, hashes)
    await vm.recover()
    assert await _depths(vm) == [1, 1]
    await hold_invariants(vm, hashes)


async def test_a_full_file_system_undoes_it(q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await q.define(TWO)
    await vm.start(paused=True)
    await _written(vm, 1)
    real, calls = reflink.share, []

    def full(source: int, target: int) -> None:
        calls.append(source)
        if len(calls) % 2 == 0:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(reflink, "share", full)
    monkeypatch.setattr(reflink, "_able", {context_of(vm).home.data.stat().st_dev: ""})
    with pytest.raises(HostCannot, match="No space left") as refused:
        await vm.snapshot("one", kind="volume")
    assert len(calls) == 2
    assert refused.value.effect == "none"
    assert await vm.snapshots() == ()
    assert await _depths(vm) == [1, 1]
    await hold_invariants(vm)
    monkeypatch.undo()
    await vm.snapshot("one", kind="volume")
    await hold_invariants(vm)
