"""A machine in one file: out of one home and into another, and nothing of a file that is not the very one."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.errors import HostCannot, NameTaken, QmpsnapError, StateError, StoreMismatch
from qmpsnap.machine import bundle as format_
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.lifecycle import bundle
from qmpsnap.ops.lifecycle.bundle import Contents
from tests.harness.deaths import Call, die_at
from tests.live.machine import (
    MIB,
    active_hash,
    context_of,
    fill,
    grown_and_stopped,
    hold_invariants,
    snapshot_hashes,
)

FLIPS = 300


@pytest.fixture
async def other(home: Path) -> AsyncIterator[qmpsnap.Controller]:
    """A controller on a second home."""
    folder = home / "other"
    folder.mkdir()
    async with qmpsnap.open(folder) as controller:
        yield controller


async def taken_over(q: qmpsnap.Controller, path: Path, name: str | None = None) -> qmpsnap.MachineHandle:
    machine = await bundle.unpack(q.context, path, name=name, allow_extra=False)
    return await q.machine(machine.name)


def nothing_of_it(context: Context) -> None:
    """Assert that a home has neither a machine nor a file of one."""
    assert context.store.machines() == ()
    assert list(context.home.machines.rglob("*")) == []


@pytest.mark.version
async def test_a_machine_goes_to_another_home(q: qmpsnap.Controller, other: qmpsnap.Controller, place: Path) -> None:
    vm, hashes, active = await grown_and_stopped(q)
    await vm.start(paused=True)
    await vm.snapshot("inside", kind="internal", memory=False)
    await fill(vm, "vda", 7, offset=9 * MIB)
    saved = await vm.save(name="saved")
    assert saved.vmstate
    await bundle.export(q.context, vm.name, place / "still.bundle")
    hashes |= {key: found for key, found in (await snapshot_hashes(vm)).items() if key[0] != "inside"}
    active = await active_hash(vm)
    before = {one.name: one for one in await vm.snapshots()}

    moved = await taken_over(other, place / "still.bundle")
    assert (await moved.record()).uuid == (await vm.record()).uuid
    assert (await moved.record()).current == (await vm.record()).current
    after = {one.name: one for one in await moved.snapshots()}
    assert [(one.name, one.parent, one.created, one.kind) for one in after.values()] == [
        (one.name, one.parent, one.created, one.kind) for one in before.values()
    ]
    assert await active_hash(moved) == active
    await hold_invariants(moved, hashes)
    assert (await moved.check(deep=True)).findings == ()
    shutil.rmtree(context_of(vm).home.machine_dir("still"))  # nothing is read where it came from
    assert (await moved.restore(paused=True)).snapshot.name == "saved"
    await moved.stop(force=True)
    await moved.revert("inside")
    await hold_invariants(moved, hashes)


async def small(q: qmpsnap.Controller, place: Path) -> Path:
    """A bundle of a machine with one disk and one snapshot."""
    vm = await q.define(MachineSpec(name="m", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),)))
    await vm.snapshot("s1")
    await bundle.export(q.context, "m", place / "m.bundle")
    return place / "m.bundle"


async def test_a_bundle_in_which_a_bit_differs_is_refused(
    q: qmpsnap.Controller, other: qmpsnap.Controller, place: Path
) -> None:
    path = await small(q, place)
    data, changed = path.read_bytes(), place / "changed.bundle"
    for number in range(FLIPS):
        flipped = bytearray(data)
        at = number * len(data) // FLIPS
        flipped[at] ^= 1 << number % 8
        changed.write_bytes(flipped)
        with pytest.raises(StoreMismatch):
            await taken_over(other, changed, "n")
        nothing_of_it(other.context)
    assert (await taken_over(other, path)).name == "m"


async def test_a_bundle_of_another_length_is_refused(
    q: qmpsnap.Controller, other: qmpsnap.Controller, place: Path
) -> None:
    path = await small(q, place)
    data, changed = path.read_bytes(), place / "changed.bundle"
    for wrong in (data[:-1], data + b"\0", data[: len(data) // 2], data[:10], b"", data + data):
        changed.write_bytes(wrong)
        with pytest.raises(StoreMismatch):
            await taken_over(other, changed, "n")
        nothing_of_it(other.context)


async def test_what_cannot_be_exported(q: qmpsnap.Controller, place: Path) -> None:
    path = await small(q, place)
    with pytest.raises(StateError, match="exists already"):
        await bundle.export(q.context, "m", path)
    vm = await q.machine("m")
    await vm.start(paused=True)
    with pytest.raises(StateError, match="machine m is running"):
        await bundle.export(q.context, "m", place / "new.bundle")
    await vm.stop(force=True)
    layer = Path((await vm.chains())[0].layers[0].layer.path)
    copy = layer.with_name("copy")
    shutil.copy(layer, copy)
    copy.rename(layer)
    with pytest.raises(StoreMismatch, match="is not the recorded file"):
        await bundle.export(q.context, "m", place / "new.bundle")
    assert sorted(path.name for path in place.iterdir()) == ["m.bundle"]


async def test_what_cannot_be_imported(q: qmpsnap.Controller, other: qmpsnap.Controller, place: Path) -> None:
    path = await small(q, place)
    with pytest.raises(NameTaken):
        await taken_over(q, path)
    with pytest.raises(StateError, match="is that of machine m"):
        await taken_over(q, path, "n")
    with pytest.raises(HostCannot, match="cannot be read"):
        await taken_over(other, place / "missing")
    nothing_of_it(other.context)


def rewritten(path: Path, contents: Contents, folder: Path) -> None:
    """A bundle that says something else of the same files, and whose digest is right."""
    folder.mkdir()
    found = format_.unpack(str(path), str(folder))
    path.unlink()
    format_.write(str(path), msgspec.json.encode(contents), [format_.Source(file) for file in found.files])


@pytest.mark.parametrize("lie", ["size", "layer", "name", "cpu", "file"])
async def test_a_bundle_that_lies_is_refused(
    lie: str, q: qmpsnap.Controller, other: qmpsnap.Controller, place: Path
) -> None:
    path = await small(q, place)
    contents = msgspec.json.decode(format_.manifest_of(str(path)), type=Contents)
    record = contents.record
    match lie:
        case "size":
            record = replace(record, layers=(replace(record.layers[0], virtual_size=512), *record.layers[1:]))
        case "layer":
            record = replace(record, layers=record.layers[1:])
        case "name":
            record = replace(record, snapshots=(replace(record.snapshots[0], name="../x"),))
        case "cpu":
            spec = replace(record.machine.spec, cpu="max -device x")
            record = replace(record, machine=replace(record.machine, spec=spec))
    names = contents.files[:-1] if lie == "file" else contents.files
    rewritten(path, Contents(record=record, files=names), place / "unpacked")
    with pytest.raises(QmpsnapError):
        await taken_over(other, path, "n")
    nothing_of_it(other.context)


BUNDLE = "qmpsnap.ops.lifecycle.bundle"
DEATHS = {
    "unpacking": Call("qmpsnap.machine.bundle", "_unpack_one", "after", 1),
    "unpacked": Call("qmpsnap.machine.bundle", "unpack", "after", 1),
    "planned": Call(BUNDLE, "_publish", "before", 1),
    "published": Call(BUNDLE, "_point_to", "before", 1),
    "pointing": Call(BUNDLE, "_point_to", "after", 2),
}


@pytest.mark.parametrize("death", DEATHS)
async def test_killed_in_the_midst(death: str, q: qmpsnap.Controller, place: Path) -> None:
    path = await small(q, place)
    vm = await q.machine("m")
    await vm.undefine(disks="remove")
    await die_at(DEATHS[death], "import", "bundle", str(path))
    if death in ("planned", "published", "pointing"):
        (ended,) = await q.recover("m")
        assert ended.verb == "define"
        nothing_of_it(q.context)
    vm = await taken_over(q, path)  # also where nothing was planned, and files are left
    assert list(q.context.home.machines.iterdir()) == [q.context.home.machine_dir("m")]
    await hold_invariants(vm)


async def test_a_failure_in_the_midst_leaves_nothing(
    q: qmpsnap.Controller, other: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await small(q, place)

    async def fails(*_: object, **__: object) -> None:
        assert sorted(os.listdir(other.context.home.machine_dir("m")))  # noqa: PTH208 - they are published by now
        raise HostCannot("no qemu-img")

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "set_backing", fails)
        with pytest.raises(HostCannot, match="no qemu-img"):
            await taken_over(other, path)
    nothing_of_it(other.context)
    await hold_invariants(await taken_over(other, path))
