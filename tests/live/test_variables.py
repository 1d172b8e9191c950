"""The UEFI variable store of a machine goes along with a revert, and what it held before is kept."""

import os
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.machine.config.firmware import find_firmware
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.rebuild import rebuild
from tests.harness.deaths import Call, die_at
from tests.live.machine import MIB, context_of, hold_invariants
from tests.live.test_rebuild import at, lose


@pytest.fixture
def uefi_spec() -> MachineSpec:
    try:
        find_firmware()
    except HostCannot as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    return MachineSpec(name="still", memory=256 * MIB, firmware="uefi", disks=(DiskSpec(name="vda", size=2 * MIB),))


def put(vm: qmpsnap.MachineHandle, mark: int) -> None:
    """As if the guest had written there: the last byte of all."""
    with context_of(vm).home.variables(vm.name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([mark]))


def mark_in(file: str | Path | None) -> int:
    assert file is not None
    return Path(file).read_bytes()[-1]


def mark(vm: qmpsnap.MachineHandle) -> int:
    return mark_in(context_of(vm).home.variables(vm.name))


def copies(vm: qmpsnap.MachineHandle) -> set[str]:
    """The files beside the machine's own variable store, an unfinished one, too."""
    return {str(path) for path in context_of(vm).home.machine_dir(vm.name).glob("vars*") if path.name != "vars.fd"}


async def listed(vm: qmpsnap.MachineHandle) -> set[str]:
    return {snapshot.variables for snapshot in await vm.snapshots() if snapshot.variables}


async def stopped_with_a_snapshot(q: qmpsnap.Controller, spec: MachineSpec) -> qmpsnap.MachineHandle:
    """Snapshot ``s`` holds mark 1; by now the store has mark 2."""
    vm = await q.define(spec)
    put(vm, 1)
    await vm.snapshot("s", kind="internal")
    put(vm, 2)
    return vm


async def stopped_and_unwritten(q: qmpsnap.Controller, spec: MachineSpec) -> tuple[qmpsnap.MachineHandle, str]:
    """The same on an empty layer on an automatic snapshot, whose name is told and which holds mark 2."""
    vm = await stopped_with_a_snapshot(q, spec)
    kept = (await vm.revert("s")).kept
    assert kept is not None
    await vm.revert(kept.name, discard=True)
    return vm, kept.name


async def booted(q: qmpsnap.Controller, spec: MachineSpec) -> qmpsnap.MachineHandle:
    """Its firmware runs and has written variables, as it does on its first boot."""
    vm = await q.define(spec)
    variables = context_of(vm).home.variables("still")
    fresh = variables.read_bytes()
    await vm.start()
    log = context_of(vm).home.log_dir("still") / CONSOLE_LOG
    with anyio.fail_after(120):
        while b"BdsDxe" not in log.read_bytes() and variables.read_bytes() == fresh:
            await anyio.sleep(0.1)
    return vm


async def test_a_revert_is_undone_by_another(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await stopped_with_a_snapshot(q, uefi_spec)
    kept = (await vm.revert("s")).kept
    assert kept is not None
    assert (kept.kind, mark_in(kept.variables), mark(vm)) == ("disk", 2, 1)
    await hold_invariants(vm)
    await vm.revert(kept.name)
    assert mark(vm) == 2
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)
    await vm.delete_snapshots(*[snapshot.name for snapshot in await vm.snapshots()])
    assert copies(vm) == set()
    assert mark(vm) == 2
    await hold_invariants(vm)


async def test_what_is_discarded_is_not_kept(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await stopped_with_a_snapshot(q, uefi_spec)
    assert (await vm.revert("s", discard=True)).kept is None
    assert mark(vm) == 1
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)


async def test_a_memory_brings_its_own_along(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await booted(q, uefi_spec)
    held = mark(vm)
    await vm.snapshot("all", kind="full")
    put(vm, held ^ 0xFF)
    kept = (await vm.revert("all")).kept  # QEMU writes what the memory has
    assert kept is not None
    assert (mark_in(kept.variables), mark(vm)) == (held ^ 0xFF, held)
    await hold_invariants(vm)
    await vm.revert(kept.name)
    assert mark(vm) == held ^ 0xFF
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)


async def test_restoring_again_and_again_keeps_it_once(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await booted(q, uefi_spec)
    await vm.save()
    kept = [(await vm.restore(paused=True)).kept]
    await vm.stop(force=True)
    kept.append((await vm.restore(paused=True)).kept)
    assert [found is not None for found in kept] == [True, False]
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)


async def test_what_an_automatic_snapshot_holds_is_not_kept_twice(
    q: qmpsnap.Controller, uefi_spec: MachineSpec
) -> None:
    vm, kept = await stopped_and_unwritten(q, uefi_spec)
    before = copies(vm)
    assert (await vm.plan_revert("s")).details.kept is None
    assert (await vm.revert("s")).kept is None
    assert (mark(vm), copies(vm)) == (1, before)
    await hold_invariants(vm)
    await vm.revert(kept, discard=True)
    put(vm, 3)  # nothing on the disk, but there
    assert (await vm.plan_revert("s")).details.kept is not None
    again = (await vm.revert("s")).kept
    assert again is not None
    assert (mark_in(again.variables), mark(vm)) == (3, 1)
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)


async def test_a_store_that_is_gone_cannot_be_kept(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await stopped_with_a_snapshot(q, uefi_spec)
    context_of(vm).home.variables("still").unlink()
    with pytest.raises(
        StoreMismatch, match=r"vars\.fd, the variable store of machine still, does not exist"
    ) as refused:
        await vm.revert("s")
    assert "--discard" in as_typed(refused.value.hint)
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["s"]
    await vm.revert("s", discard=True)
    assert mark(vm) == 1
    await hold_invariants(vm)


async def test_a_lost_store_does_not_lose_it(home: Path, uefi_spec: MachineSpec) -> None:
    async with qmpsnap.open() as q:
        vm = await stopped_with_a_snapshot(q, uefi_spec)
        await vm.revert("s")
    lose(home)
    assert (await rebuild.run(at(home), set_aside=False)).left_out == ()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert {s.kind: mark_in(s.variables) for s in await vm.snapshots()} == {"internal": 1, "disk": 2}
        await hold_invariants(vm)


# --- deaths -----------------------------------------------------------------------------------------------------------

COPY = ("qmpsnap.machine.config.firmware_files", "copy_variables")
REPLACE = ("qmpsnap.ops.revert.cutover", "copy_variables")
SETTLE = ("qmpsnap.store.sqlite.backend", "SqliteStore.settle")
FORWARD: dict[str, Call] = {
    "before it is copied": Call(*COPY, "before", 1),
    "with a copy that may not be durable": Call("qmpsnap.host.files", "sync_folder", "before", 2),
    "with a copy": Call(*REPLACE, "before", 1),
    "replaced": Call(*REPLACE, "after", 1),
    "not settled": Call(*SETTLE, "before", 1),
    "settled": Call(*SETTLE, "after", 1),
}


async def test_killed_before_the_guest_would_notice(q: qmpsnap.Controller, uefi_spec: MachineSpec) -> None:
    vm = await stopped_with_a_snapshot(q, uefi_spec)
    await die_at(
        Call("qmpsnap.store.sqlite.backend", "SqliteStore.mark", "before", 1), "snapshot", "revert", "still", "s"
    )
    await vm.recover()
    assert (mark(vm), copies(vm)) == (2, await listed(vm))
    await hold_invariants(vm)


@pytest.mark.parametrize("step", FORWARD)
async def test_killed_while_it_is_replaced(q: qmpsnap.Controller, uefi_spec: MachineSpec, step: str) -> None:
    vm = await stopped_with_a_snapshot(q, uefi_spec)
    await die_at(FORWARD[step], "snapshot", "revert", "still", "s")
    await vm.recover()
    assert await vm.recover() == []
    kept = (await vm.snapshots())[-1]
    assert (mark_in(kept.variables), mark(vm)) == (2, 1)
    assert copies(vm) == await listed(vm)
    await hold_invariants(vm)
    await vm.revert(kept.name)
    assert mark(vm) == 2
    await hold_invariants(vm)


@pytest.mark.parametrize("step", ["replaced", "settled"])
async def test_killed_where_nothing_has_to_be_kept(q: qmpsnap.Controller, uefi_spec: MachineSpec, step: str) -> None:
    vm, kept = await stopped_and_unwritten(q, uefi_spec)
    await die_at(FORWARD[step], "snapshot", "revert", "still", "s")
    await vm.recover()
    assert await vm.recover() == []
    assert {snapshot.name for snapshot in await vm.snapshots()} == {"s", kept}
    assert (mark(vm), copies(vm)) == (1, await listed(vm))
    await hold_invariants(vm)
