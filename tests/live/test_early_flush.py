"""The active images are flushed before the guest is held, so that QEMU has little left to flush while it waits."""

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.session import early_flush
from qmpsnap.qmp.session import Session
from tests.live.machine import MIB, hold_invariants

pytestmark = pytest.mark.version

SPEC = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=16 * MIB), DiskSpec(name="vdb", size=16 * MIB)),
)
KINDS: Mapping[str, Mapping[str, Any]] = {
    "disk": {},
    "full": {"kind": "full"},
    "internal": {"kind": "internal", "memory": False},
    "internal with memory": {"kind": "internal"},
}
HOLDS = {"transaction", "stop", "snapshot-save"}


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flush counts as slow, however busy the host is."""
    monkeypatch.setattr(early_flush, "_SOON", math.inf)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed by us and what QEMU is told, in order."""
    found: list[str] = []
    execute, fdatasync = Session.execute, os.fdatasync

    async def told(self: Session, command: str, *rest: Any, **named: Any) -> Any:
        found.append(command)
        return await execute(self, command, *rest, **named)

    def flushed(descriptor: int) -> None:
        found.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fdatasync(descriptor)

    monkeypatch.setattr(Session, "execute", told)
    monkeypatch.setattr(os, "fdatasync", flushed)
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_every_active_image_is_flushed_before_qemu_holds_the_guest(
    q: qmpsnap.Controller, order: list[str], kind: str
) -> None:
    vm = await q.define(SPEC)
    await vm.start(paused=kind != "full")
    active = [chain.active.path for chain in await vm.chains()]
    order.clear()
    await vm.snapshot("one", **KINDS[kind])
    held = next(number for number, what in enumerate(order) if what in HOLDS)
    assert [what for what in order[:held] if what in active] == active
    await hold_invariants(vm)


async def test_an_image_that_cannot_be_flushed_is_left_to_qemu(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    tried: list[int] = []

    def fails(descriptor: int) -> None:
        tried.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails)
    await vm.snapshot("one")
    assert len(tried) == len(SPEC.disks)
    await hold_invariants(vm)


async def test_a_disk_that_qemu_never_flushes_is_not_flushed_by_us(q: qmpsnap.Controller, order: list[str]) -> None:
    vda, vdb = SPEC.disks
    vm = await q.define(replace(SPEC, disks=(vda, replace(vdb, cache="unsafe"))))
    await vm.start(paused=True)
    active = [chain.active.path for chain in await vm.chains()]
    order.clear()
    await vm.snapshot("one")
    assert [what for what in order if what in active] == active[:1]


async def test_a_slow_flush_is_repeated_a_few_times_only(
    q: qmpsnap.Controller, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    (first, _) = await vm.chains()
    monkeypatch.setattr(early_flush, "_SOON", 0)
    await vm.snapshot("one")
    assert order.count(first.active.path) == 3
