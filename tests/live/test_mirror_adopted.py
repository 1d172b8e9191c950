"""Mirrors of disks of a QEMU that somebody else launched, below whatever filters it has."""

from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.errors import ImageInUse, StateError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId
from qmpsnap.ops.mirror import mirror
from qmpsnap.ops.mirror.mirror import MirrorRequest
from tests.live.machine import MIB, content_hash, context_of, hash_of
from tests.live.test_adopt import FORMS, NAMES, _adopted, agree, digest, folder, launched, layers

pytestmark = pytest.mark.version

__all__ = ["folder", "launched"]  # fixtures


async def _hash_now(vm: qmpsnap.MachineHandle, name: str) -> str:
    snapshot = await vm.snapshot(name)
    return await content_hash(vm, snapshot.points[0].layer)


@pytest.mark.parametrize("kind", ["full", "shallow"])
@pytest.mark.parametrize("form", FORMS)
async def test_the_guest_goes_on_with_the_copy(
    q: qmpsnap.Controller, folder: Path, launched: Any, form: str, kind: str
) -> None:
    theirs, vm, hashes = await _adopted(q, launched, form)
    untouched = {file: digest(folder / file) for file in ("base.qcow2", "top.qcow2")}
    filters = {name for _, edge, name in await theirs.graph() if edge == "root"}
    hashes["s4"] = await _hash_now(vm, "s4")
    _, (_, (command, arguments)) = await vm_preview(vm, NAMES[form], folder / "copy.qcow2", shallow=kind == "shallow")
    assert command == "blockdev-mirror"
    done = await vm.mirror(NAMES[form], folder / "copy.qcow2", mode="pivot", shallow=kind == "shallow")
    chain = await layers(vm)
    assert (chain[-1], len(chain)) == ("copy.qcow2", 6 if kind == "shallow" else 1)
    await agree(vm, hashes)
    if form in ("blockdev under a throttle", "blockdev under copy-on-read"):
        assert {name for _, edge, name in await theirs.graph() if edge == "root"} == filters == {arguments["device"]}
    assert {node["file"] for node in await theirs.nodes() if node["drv"] == "file" and not node["ro"]} == {
        str(folder / "copy.qcow2")
    }
    assert await _hash_now(vm, "s5") == hashes["s4"]
    await theirs.io("write -P 9 9M 1M")
    assert await _hash_now(vm, "s6") != hashes["s4"]
    await agree(vm, hashes)
    await vm.delete_snapshots("s5")
    await agree(vm, hashes)
    assert done._plan.live
    assert {file: digest(folder / file) for file in untouched} == untouched


async def vm_preview(vm: qmpsnap.MachineHandle, disk: str, target: Path, *, shallow: bool) -> Any:
    request = MirrorRequest(disk=disk, target=str(target), mode="pivot", shallow=shallow)
    return await mirror.preview(context_of(vm), vm.name, request)


@pytest.mark.parametrize("form", FORMS)
async def test_the_copy_is_had(q: qmpsnap.Controller, folder: Path, launched: Any, form: str) -> None:
    theirs, vm, hashes = await _adopted(q, launched, form)
    chain = await layers(vm)
    hashes["s4"] = await _hash_now(vm, "s4")
    before = await theirs.graph()
    await vm.mirror(NAMES[form], folder / "copy.qcow2", mode="finish")
    assert await theirs.graph() == before
    assert len(await layers(vm)) == len(chain) + 1
    await agree(vm, hashes)
    path = str(folder / "copy.qcow2")
    copy = Layer(id=LayerId("copy-0"), path=path, format="qcow2", backing=None, virtual_size=16 * MIB)
    assert await hash_of(vm, copy) == hashes["s4"]


async def test_what_a_stopped_one_refuses(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    theirs, vm, hashes = await _adopted(q, launched, "drive")
    chain = await layers(vm)
    await vm.stop(force=True)
    theirs.process.wait(10)
    with pytest.raises(StateError, match="qmpsnap does not launch") as refused:
        await vm.mirror(NAMES["drive"], folder / "copy.qcow2", mode="pivot")
    assert refused.value.effect == "none"
    await vm.mirror(NAMES["drive"], folder / "copy.qcow2", mode="finish")
    assert await layers(vm) == chain
    for name, digest_ in hashes.items():
        snapshot = next(s for s in await vm.snapshots() if s.name == name)
        assert await content_hash(vm, snapshot.points[0].layer) == digest_


MODES: tuple[mirror.Mode, ...] = ("pivot", "finish")


async def test_after_its_owner_has_started_it_again(q: qmpsnap.Controller, folder: Path, launched: Any) -> None:
    """A new process is another machine until it is adopted: it has the layers open, and no worker gets at them."""
    theirs, vm, hashes = await _adopted(q, launched, "drive")
    hashes["s4"] = await _hash_now(vm, "s4")
    active = (await vm.chains())[0].active
    await vm.stop(force=True)
    theirs.process.wait(10)
    for name in ("given.sock", "own.sock"):
        (folder / name).unlink(missing_ok=True)
    again = launched(["-drive", f"file={active.path},format=qcow2,if=virtio"])
    before, names = await again.graph(), sorted(file.name for file in folder.iterdir())
    for mode in MODES:
        with pytest.raises(
            ImageInUse, match=r"virtio0-\d.qcow2, an image of machine theirs, is open for writing in"
        ) as refused:
            await vm.mirror(NAMES["drive"], folder / "copy.qcow2", mode=mode)
        assert refused.value.effect == "none"
    assert await again.graph() == before
    assert sorted(file.name for file in folder.iterdir()) == names

    kept = await vm.undefine(disks="keep")
    assert active.path in kept
    await q.adopt("theirs", again.socket)
    vm = await q.machine("theirs")
    await again.io("write -P 9 9M 1M")
    await vm.snapshot("s5")
    await vm.mirror(NAMES["drive"], folder / "copy.qcow2", mode="pivot", shallow=True)
    await again.io("write -P 8 8M 1M")
    await agree(vm, {})
    await vm.mirror(NAMES["drive"], folder / "alone.qcow2", mode="pivot")
    assert await layers(vm) == ["alone.qcow2"]
    assert all(Path(path).exists() for path in kept)
