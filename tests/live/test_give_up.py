"""A machine with an operation that cannot be ended any more: it is forgotten all the same, and its files stay."""

from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import OperationPending
from qmpsnap.model.home import RECORD
from tests.harness.deaths import STORE, Call, die_at
from tests.live.machine import ONE_DISK, context_of, grown_and_stopped, hold_invariants

pytestmark = pytest.mark.version

CREATE = ("snapshot", "create", "still", "s3")


async def given_up(vm: qmpsnap.MachineHandle) -> tuple[str, list[str]]:
    """What is said of it, and the files that stay; every other verb is refused, and no file is touched."""
    folder = context_of(vm).home.machine_dir(vm.name)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != RECORD}
    for act in (vm.recover, lambda: vm.snapshot("s4"), vm.undefine, lambda: vm.undefine(disks="remove")):
        with pytest.raises(OperationPending) as refused:
            await act()
        assert "qmpsnap undefine still --keep-disks" in as_typed(refused.value.hint)
    told: list[str] = []
    kept = await vm.undefine(disks="keep", told=told.append)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (sentence,) = told
    return sentence, kept


async def usable_again(q: qmpsnap.Controller, vm: qmpsnap.MachineHandle) -> None:
    """The name is free, and the journal has come to an end."""
    store = context_of(vm).store
    assert store.operations(vm.name, only_open=True) == ()
    assert store.operations(vm.name)[-1].error == "given up: its machine was undefined"
    again = await q.define(ONE_DISK)
    for path in context_of(vm).home.machine_dir(vm.name).iterdir():
        if str(path) != (await again.chains())[0].active.path and path.name != RECORD:
            path.unlink()
    await again.start(paused=True)
    await again.snapshot("s1")
    await hold_invariants(again)


async def test_a_snapshot_inside_an_image_that_is_gone(q: qmpsnap.Controller) -> None:
    vm, _, _ = await grown_and_stopped(q)
    await die_at(Call("qmpsnap.ops.internal.tags", "tag_stopped", "before", 1), *CREATE, "--kind", "internal")
    (active := Path((await vm.chains())[0].active.path)).unlink()
    sentence, kept = await given_up(vm)
    assert sentence.startswith("operation ")
    assert f"(internal) was given up: layer {active.stem} of machine still: {active} does not exist" in sentence
    assert f" in {active}" in sentence
    assert str(active) in kept
    await usable_again(q, vm)


async def test_a_new_layer_that_somebody_has_put_another_file_for(q: qmpsnap.Controller) -> None:
    vm, _, _ = await grown_and_stopped(q)
    layer = context_of(vm).home.machine_dir("still") / f"vda-{context_of(vm).store.next_serial()}.qcow2"
    await die_at(Call(STORE, "SqliteStore.settle", "before", 1), *CREATE)
    layer.write_bytes(b"of somebody")
    sentence, kept = await given_up(vm)
    assert sentence.endswith(f"it may have left {layer}")
    assert str(layer) not in kept
    await usable_again(q, vm)


async def test_while_a_qemu_has_the_images_open_nothing_is_given_up(q: qmpsnap.Controller) -> None:
    vm, _, _ = await grown_and_stopped(q)
    layer = context_of(vm).home.machine_dir("still") / f"vda-{context_of(vm).store.next_serial()}.qcow2"
    await vm.start(paused=True)
    await die_at(Call("qmpsnap.ops.snapshot.create", "make_overlays", "after", 1), *CREATE)
    layer.write_bytes(b"of somebody")
    with pytest.raises(OperationPending):
        await vm.undefine(disks="keep")
    await vm.stop(force=True)
    layer.unlink()
    await vm.recover()
    await hold_invariants(vm)
