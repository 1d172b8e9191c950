"""QEMUs that the owner of an adopted machine launches again while an operation on its images has not ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

import qmpsnap
from qmpsnap.block.usage import image_locks
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import OperationPending, StateError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.operations.operation import Merge, MergePlan
from qmpsnap.ops.session import external_writers
from tests.harness.deaths import JOBS, STORE, Call, die_at
from tests.live.machine import context_of
from tests.live.test_adopt import Foreign, agree, folder, launched

__all__ = ["folder", "launched"]  # fixtures

CREATE = ("snapshot", "create", "theirs", "s3")
COMMIT = ("commit", "--base", "s2", "--consume")
PIVOT = ("mirror", "--pivot", "copy.qcow2")
VERBS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "commit before finalize": (Call(JOBS, "finalize", "before", 1), COMMIT),
    "commit after finalize": (Call(JOBS, "finalize", "after", 1), COMMIT),
    "pivot before finalize": (Call(JOBS, "finalize", "before", 1), PIVOT),
    "pivot after finalize": (Call(JOBS, "finalize", "after", 1), PIVOT),
    "create": (Call(STORE, "SqliteStore.settle", "before", 1), CREATE),
}
SETTLED: dict[str, tuple[Call, tuple[str, ...]]] = {
    "commit": (Call("qmpsnap.ops.merge.job", "remove_files", "before", 1), COMMIT),
    "pivot": (Call("qmpsnap.ops.merge.job", "remove_files", "before", 1), PIVOT),
}
STREAM = ("snapshot", "delete", "theirs", "s2")
STAYS: dict[str, tuple[Call, tuple[str, ...]]] = {
    "before finalize": (Call(JOBS, "finalize", "before", 1), STREAM),
    "after finalize": (Call(JOBS, "finalize", "after", 1), STREAM),
}
MOVED = [verb for verb in VERBS if "before" not in verb]
"""Those after which the guest has been moved to the new side, in a QEMU that lives on."""

_DISK = "virtio0"


class Left(Struct, frozen=True):
    """A machine with an operation that nobody ended, and no QEMU that we know of."""

    vm: qmpsnap.MachineHandle
    active: Layer
    launch: Callable[[Layer], Foreign]
    files: frozenset[Path]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that lives is not waited for as one that ends."""
    monkeypatch.setattr(external_writers, "PATIENCE", 0.1)


async def _broken(q: qmpsnap.Controller, launched: Any, verb: str, *, moved: int | None = None) -> Left:
    """It dies at the verb, and its QEMU with it; or, with ``moved``, after the guest has written that to 9M."""
    theirs = launched("drive")
    folder = theirs.folder
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    for number, name in enumerate(("s1", "s2"), start=1):
        await theirs.io(f"write -P {number} {number}M 1M")
        await vm.snapshot(name)
    await theirs.io("write -P 3 3M 3M")
    active = (await vm.chains())[0].active
    point, words = (VERBS | SETTLED | STAYS)[verb]
    if "theirs" not in words:
        option, *rest = words[1:]
        words = (words[0], "theirs", _DISK, option, *(str(folder / w) if "." in w else w for w in rest))
    await die_at(point, *words, qemu_too=moved is None)
    if moved is not None:
        await theirs.io(f"write -P {moved} 9M 1M")
        _end(theirs)
    theirs.process.wait(10)

    def launch(layer: Layer) -> Foreign:
        for name in ("given.sock", "own.sock"):
            (folder / name).unlink(missing_ok=True)
        again: Foreign = launched(["-drive", f"file={layer.path},format=qcow2,if=virtio"])
        return again

    ours = context_of(vm).home.machine_dir("theirs")
    return Left(vm, active, launch, frozenset({*ours.glob("*.qcow2"), *folder.glob("*.qcow2")}))


def _end(qemu: Foreign) -> None:
    """It closes its images in good order."""
    qemu.process.terminate()
    assert qemu.process.wait(10) == 0


async def _on(left: Left, layer: Layer, pattern: int) -> Foreign:
    """The owner launches it on that layer, and the guest writes."""
    qemu = left.launch(layer)
    await qemu.io(f"write -P {pattern} 9M 1M")
    return qemu


async def _reads(qemu: Foreign, last: int) -> None:
    for place, pattern in ((1, 1), (2, 2), (3, 3), (9, last)):
        await qemu.io(f"read -P {pattern} {place}M 1M")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", VERBS)
async def test_what_a_qemu_has_open_is_neither_removed_nor_recorded(
    q: qmpsnap.Controller, launched: Any, verb: str
) -> None:
    left = await _broken(q, launched, verb)
    vm = left.vm
    qemu = await _on(left, left.active, 9)
    known = [(snapshot.name, snapshot.state) for snapshot in await vm.snapshots()]
    for act in (vm.recover, lambda: vm.snapshot("s4"), lambda: vm.undefine(disks="remove")):
        with pytest.raises(OperationPending, match=r"another process has .* open") as refused:
            await act()
        assert "qmpsnap undefine theirs --keep-disks and qmpsnap adopt theirs" in as_typed(refused.value.hint)
    assert [(snapshot.name, snapshot.state) for snapshot in await vm.snapshots()] == known
    assert all(file.exists() for file in left.files)

    told: list[str] = []
    assert left.active.path in await vm.undefine(disks="keep", told=told.append)
    assert "was given up" in told[0]
    await q.adopt("theirs", qemu.socket)
    vm = await q.machine("theirs")
    assert (await vm.chains())[0].active.path == left.active.path
    await vm.snapshot("s5")
    await agree(vm, {})
    assert all(file.exists() for file in left.files)
    await _reads(qemu, 9)


@pytest.mark.parametrize("verb", VERBS)
async def test_what_was_written_to_the_old_side_counts(q: qmpsnap.Controller, launched: Any, verb: str) -> None:
    left = await _broken(q, launched, verb)
    _end(await _on(left, left.active, 9))
    (ended,) = await left.vm.recover()
    assert await left.vm.recover() == []
    assert ended.state in ("planned", "running")
    assert (await left.vm.chains())[0].active.path == left.active.path
    assert "s3" not in [snapshot.name for snapshot in await left.vm.snapshots()]
    await _reads(left.launch(left.active), 9)


@pytest.mark.parametrize("verb", MOVED)
async def test_what_was_written_to_the_new_side_counts(q: qmpsnap.Controller, launched: Any, verb: str) -> None:
    left = await _broken(q, launched, verb, moved=8)
    await left.vm.recover()
    active = (await left.vm.chains())[0].active
    assert active.path != left.active.path
    assert ("s3" in [snapshot.name for snapshot in await left.vm.snapshots()]) == (verb == "create")
    await _reads(left.launch(active), 8)


@pytest.mark.parametrize("verb", MOVED)
async def test_where_both_sides_were_written_to_nothing_is_guessed(
    q: qmpsnap.Controller, launched: Any, verb: str
) -> None:
    left = await _broken(q, launched, verb, moved=8)
    _end(await _on(left, left.active, 9))
    with pytest.raises(OperationPending, match="may have been written to"):
        await left.vm.recover()
    assert left.active.path in await left.vm.undefine(disks="keep")
    assert all(file.exists() for file in left.files)


@pytest.mark.parametrize("verb", VERBS)
async def test_one_that_is_not_launched_again_goes_back(q: qmpsnap.Controller, launched: Any, verb: str) -> None:
    left = await _broken(q, launched, verb)
    await left.vm.recover()
    assert (await left.vm.chains())[0].active.path == left.active.path
    assert (await left.vm.check()).findings == ()
    await _reads(left.launch(left.active), 0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", SETTLED)
async def test_a_layer_that_was_left_and_is_used_again_is_not_removed(
    q: qmpsnap.Controller, launched: Any, verb: str
) -> None:
    left = await _broken(q, launched, verb)
    qemu = await _on(left, left.active, 9)
    with pytest.raises(OperationPending, match=r"another process has .* open"):
        await left.vm.recover()
    _end(qemu)
    with pytest.raises(OperationPending, match="may have been written to"):
        await left.vm.recover()
    await left.vm.undefine(disks="keep")
    await _reads(left.launch(left.active), 9)


@pytest.mark.parametrize("verb", SETTLED)
async def test_a_layer_that_was_left_goes(q: qmpsnap.Controller, launched: Any, verb: str) -> None:
    left = await _broken(q, launched, verb, moved=8)
    await left.vm.recover()
    assert not Path(left.active.path).exists()
    assert (await left.vm.check()).findings == ()
    await _reads(left.launch((await left.vm.chains())[0].active), 8)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", STAYS)
async def test_a_stream_goes_forward_once_nobody_reads_what_goes(
    q: qmpsnap.Controller, launched: Any, verb: str
) -> None:
    left = await _broken(q, launched, verb)
    below = (await left.vm.chains())[0].layers[-2].layer
    plan = context_of(left.vm).store.operations("theirs")[-1].plan
    assert isinstance(plan, MergePlan)
    assert [step.kind for step in plan.steps if isinstance(step, Merge)] == ["stream"]
    qemu = await _on(left, left.active, 9)
    if verb == "before finalize":  # else the header of its layer names no other any more
        with pytest.raises(OperationPending, match=f"another process has {below.path} open"):
            await left.vm.recover()
        assert Path(below.path).exists()
        _end(qemu)
    await left.vm.recover()
    assert not Path(below.path).exists()
    assert [layer.layer.path for layer in (await left.vm.chains())[0].layers][-1] == left.active.path
    if verb == "before finalize":
        qemu = left.launch(left.active)
    await _reads(qemu, 9)


@pytest.mark.usefixtures("impatient")
async def test_images_that_somebody_has_open_are_not_removed(q: qmpsnap.Controller, launched: Any) -> None:
    left = await _broken(q, launched, "create")
    await left.vm.recover()
    assert not any(image_locks.is_locked(str(file)) for file in left.files)
    qemu = await _on(left, left.active, 9)
    assert image_locks.is_locked(left.active.path)
    with pytest.raises(StateError, match=r"open for writing in"):
        await left.vm.undefine(disks="remove")
    await _reads(qemu, 9)
    _end(qemu)
    assert left.active.path in await left.vm.undefine(disks="remove")
    assert not image_locks.is_locked(left.active.path)
