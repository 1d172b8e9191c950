"""Further QEMU arguments (`extra`) of a machine: only those that somebody has agreed to reach a QEMU."""

import json
import os
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import StateError, UsageError
from qmpsnap.model.machines.record import Consent
from qmpsnap.ops.base import relocate
from qmpsnap.ops.rebuild import rebuild
from tests.live.machine import ONE_DISK, context_of

AGREED = ("-device", "virtio-rng-pci,id=agreed")
FOREIGN = ("-device", "virtio-rng-pci,id=foreign")
SPEC = replace(ONE_DISK, extra=AGREED)


def write(home: Path, extra: Sequence[str], consent: Consent | None) -> None:
    """Edit the store as somebody would who has got at it."""
    said = None if consent is None else json.dumps({"extra": consent.extra, "user": consent.user})
    with closing(sqlite3.connect(home / "qmpsnap.db")) as sql:
        sql.execute(
            "UPDATE machine SET spec = json_set(spec, '$.extra', json(?)), consent = ?", (json.dumps(extra), said)
        )
        sql.commit()


async def require_refused(vm: qmpsnap.MachineHandle, said: str) -> None:
    for attempt in (vm.start, lambda: vm.start(paused=True), lambda: vm.revert("s1", state="running")):
        with pytest.raises(StateError, match=f"has not accepted the extra .*{said}") as refused:
            await attempt()
        assert refused.value.effect == "none"
        assert "start still --allow-extra" in as_typed(refused.value.hint)
        assert not await vm.is_running()
    assert len(await vm.snapshots()) == 1


async def test_arguments_that_were_put_into_the_store_reach_no_qemu(q: qmpsnap.Controller, home: Path) -> None:
    with pytest.raises(UsageError, match="can override every protection"):
        await q.define(SPEC)
    vm = await q.define(SPEC, allow_extra=True)
    await vm.snapshot("s1")
    mine = Consent(extra=AGREED, user=os.geteuid())
    assert (await vm.record()).consent == mine
    write(home, FOREIGN, mine)
    await require_refused(vm, "id=foreign")
    write(home, (*AGREED, *FOREIGN), mine)
    await require_refused(vm, "id=agreed .*id=foreign")
    write(home, AGREED, None)
    await require_refused(vm, "id=agreed")
    write(home, AGREED, replace(mine, user=os.geteuid() + 1))  # as in another user's home that was copied
    await require_refused(vm, "id=agreed")
    write(home, AGREED, mine)
    await vm.start(paused=True)
    await vm.stop(force=True)
    write(home, FOREIGN, mine)
    await vm.start(paused=True, allow_extra=True)
    assert (await vm.record()).consent == replace(mine, extra=FOREIGN)
    await vm.stop(force=True)
    await vm.revert("s1", state="paused")
    await vm.stop(force=True)


async def test_a_machine_without_any_needs_no_consent(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(ONE_DISK)
    assert (await vm.record()).consent is None
    await vm.start(paused=True, allow_extra=True)
    assert (await vm.record()).consent is None
    await vm.stop(force=True)
    await vm.snapshot("s1")
    write(home, FOREIGN, None)
    await require_refused(vm, "id=foreign")


async def test_a_rebuilt_store_has_no_consent(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC, allow_extra=True)
        places = context_of(vm).home
        await vm.snapshot("s1")
    for name in ("qmpsnap.db", "qmpsnap.db-wal", "qmpsnap.db-shm"):
        (home / name).unlink(missing_ok=True)
    await rebuild.run(places, set_aside=False)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        with pytest.raises(StateError, match="has not accepted the extra QEMU arguments"):
            await vm.start(paused=True)
        await vm.start(paused=True, allow_extra=True)
        await vm.stop(force=True)


async def test_consent_goes_with_a_home_that_is_moved(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "roms").mkdir()
    extra = ("-L", str(home / "roms"))
    async with qmpsnap.open() as q:
        await q.define(replace(SPEC, extra=extra), allow_extra=True)
    moved = tmp_path / "moved"
    shutil.move(home, moved)
    home.mkdir(mode=0o700)  # which the fixture removes
    monkeypatch.setenv("QMPSNAP_HOME", str(moved))
    async with qmpsnap.open() as q:
        await relocate.run(q.context, accept_copies=True)
        vm = await q.machine("still")
        assert (await vm.record()).spec.extra == ("-L", str(moved / "roms"))
        await vm.start(paused=True)
        await vm.stop(force=True)
