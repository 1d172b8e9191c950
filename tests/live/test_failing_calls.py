"""What one failing call once left behind, unsaid: each found by tests/faults/test_failing.py."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.errors import HostCannot, NotFoundError, OperationPending
from qmpsnap.host import files
from qmpsnap.host.files import sync_folder
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base import relocate
from qmpsnap.ops.session.pending import Broken
from qmpsnap.store import records
from qmpsnap.store.sqlite.database import Database
from tests.live.machine import MIB, ONE_DISK, context_of, hold_invariants

SPEC = MachineSpec(name="m", agent=False, disks=(DiskSpec(name="vda", size=MIB), DiskSpec(name="vdb", size=MIB)))


def refused(name: str) -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO), name)


def failing(real: Callable[..., Any], fits: Callable[[str], bool], *, times: int = 1) -> Callable[..., Any]:
    """The call, which fails so many times for a name that fits."""
    left = times

    def called(name: Any, *arguments: Any, **rest: Any) -> Any:
        nonlocal left
        if left and fits(os.fspath(name)):
            left -= 1
            raise refused(os.fspath(name))
        return real(name, *arguments, **rest)

    return called


async def test_a_forgotten_machine_says_which_of_its_files_are_left(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)
    folder = context_of(vm).home.machine_dir("m")
    with monkeypatch.context() as broken:
        broken.setattr(os, "unlink", failing(os.unlink, lambda name: name == "vda-1.qcow2"))
        with pytest.raises(HostCannot, match=r"vda-1\.qcow2 was not removed") as told:
            await vm.undefine(disks="remove")
    assert told.value.effect == "applied"
    assert "machine m is no longer defined" in str(told.value)
    with pytest.raises(NotFoundError):
        await q.machine("m")
    assert [path.name for path in folder.iterdir()] == ["vda-1.qcow2"], "the others went all the same"


async def test_a_machine_that_could_not_be_forgotten_is_written_down_again(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)

    def fails(*_: object) -> None:
        raise HostCannot("the store is full")

    with monkeypatch.context() as broken:
        broken.setattr(Database, "_commit", fails)
        with pytest.raises(HostCannot) as told:
            await vm.undefine(disks="remove")
    assert told.value.effect == "none"
    await hold_invariants(vm)


async def test_a_definition_is_undone_once_what_it_wrote_down_is_gone(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(records, "sync_folder", failing(sync_folder, lambda _: True, times=99))
        with pytest.raises(HostCannot, match="cannot be written") as told:
            await q.define(SPEC)
        assert told.value.effect == "unknown"
        with pytest.raises(OperationPending) as pending:
            await q.recover("m")
        assert pending.value.effect == "unknown"
    await q.recover("m")
    assert q.context.store.records.lost() == ()
    await hold_invariants(await q.define(SPEC))


async def test_memory_with_its_name_is_taken_back_with_the_snapshot(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    with monkeypatch.context() as broken:
        broken.setattr(
            os, "unlink", failing(os.unlink, lambda name: "memory-" in name and not name.endswith(".vmstate"))
        )
        with pytest.raises(HostCannot) as told:
            await vm.snapshot("full", kind="full")
    assert told.value.effect == "none" or await vm.snapshots(), told.value
    assert not list(context_of(vm).home.machine_dir(vm.name).glob("*.vmstate*"))
    await hold_invariants(vm)


async def test_what_was_begun_may_have_changed_something(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)
    layer = Path(context_of(vm).store.chains("m")[0].active.path)
    shutil.copy2(layer, place / "copy")
    (place / "copy").replace(layer)
    with monkeypatch.context() as broken:
        broken.setattr(files, "replace_durably", failing(files.replace_durably, lambda _: True, times=99))
        with pytest.raises(HostCannot) as told:
            await relocate.run(q.context, accept_copies=True)
    assert told.value.effect == "unknown"
    await relocate.run(q.context, accept_copies=True)
    await hold_invariants(vm)


async def test_a_recovery_that_ends_half_way_does_not_know(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)

    async def fails(*_: object) -> None:
        raise HostCannot("the disk fails")

    with monkeypatch.context() as broken:
        broken.setattr(Broken, "mark_failed", fails)
        with pytest.raises(OperationPending) as told:
            await _half_a_snapshot(vm, broken)
    assert told.value.effect == "unknown"
    await vm.recover()
    await hold_invariants(vm)


async def _half_a_snapshot(vm: qmpsnap.MachineHandle, broken: pytest.MonkeyPatch) -> None:
    """One that fails, and whose undoing fails; then its recovery, which removes its files and fails as well."""
    store = context_of(vm).store
    with broken.context() as unsettled:

        def settle(*_: object, **__: object) -> None:
            raise HostCannot("the store is full")

        unsettled.setattr(type(store), "settle", settle)
        with pytest.raises(HostCannot):
            await vm.snapshot("new")
    await vm.recover()
