"""Foreign errors: what the system refuses, and what no qmpsnap has written, comes out as an error of ours."""

import asyncio
import errno
import os
import resource
import sqlite3
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.block.image import backing
from qmpsnap.errors import HostCannot, QmpsnapError, StoreMismatch
from qmpsnap.host.borders import border
from qmpsnap.host.system_errors import translated
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB, hold_invariants


async def _defined(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    return await q.define(MachineSpec(name="m", agent=False, disks=(DiskSpec(name="vda", size=MIB),)))


async def test_a_header_that_cannot_be_written_out(q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await _defined(q)
    for name in ("a", "b", "c"):
        await vm.snapshot(name)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(backing, "_backing_of", fails)
        with pytest.raises(HostCannot, match="Input/output error") as refused:
            await vm.delete_snapshots("b")
    assert (refused.value.machine, refused.value.operation is None) == ("m", False)
    recorded = {snapshot.name for snapshot in await vm.snapshots()}
    assert refused.value.effect in {"unknown", "none" if "b" in recorded else "applied"}
    await vm.recover()
    await hold_invariants(vm)


async def test_a_folder_that_cannot_be_looked_into(q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await _defined(q)

    def fails(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "lstat", fails)
        broken.setattr(os, "listdir", fails)
        with pytest.raises(QmpsnapError):
            await vm.start(paused=True)
    assert not await vm.is_running()


async def test_a_hard_limit_below_a_disk(q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    vm = await _defined(q)
    with monkeypatch.context() as limited:
        limited.setattr(resource, "getrlimit", lambda _: (MIB - 1, MIB - 1))
        with pytest.raises(HostCannot, match="disk vda") as refused:
            await vm.start(paused=True)
    assert (refused.value.effect, "ulimit -Hf" in refused.value.hint, await vm.is_running()) == ("none", True, False)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE machine SET spec = '{'",
        "UPDATE machine SET spec = '[]'",
        "UPDATE machine SET spec = CAST(x'7bff7d' AS TEXT)",
        "UPDATE machine SET host = CAST(x'ff' AS TEXT)",
        "UPDATE machine SET adopted = '7'",
    ],
)
async def test_what_no_qmpsnap_has_written(q: qmpsnap.Controller, change: str) -> None:
    vm = await _defined(q)
    connection = sqlite3.connect(q.context.home.store)
    with connection:
        connection.execute(change)
    connection.close()
    for asked in (q.machines, vm.record):
        with pytest.raises(StoreMismatch, match="the store"):
            await asked()


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "/x"), "Input/output error: /x"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (ExceptionGroup("", [ValueError(), OSError(errno.ENOSPC, "No space left on device")]), "No space"),
    ],
    ids=repr,
)
async def test_each_is_ours_at_the_border(foreign: Exception, ours: str) -> None:
    with pytest.raises(HostCannot, match=ours) as refused:
        await _Api().act(foreign)
    assert (refused.value.effect, refused.value.__cause__) == ("unknown", foreign)


@pytest.mark.parametrize("foreign", [KeyError("x"), BrokenPipeError(), asyncio.CancelledError()], ids=repr)
async def test_mistakes_and_ends_pass_as_they_are(foreign: BaseException) -> None:
    assert translated(foreign) is None
    with pytest.raises(type(foreign)):
        await _Api().act(foreign)


@border
class _Api:
    async def act(self, error: BaseException) -> None:
        raise error
