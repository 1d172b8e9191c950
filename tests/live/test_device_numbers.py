"""A file system that has another device number after a boot: nothing is refused for it, and nothing is mistaken."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.errors import StoreMismatch
from qmpsnap.model.machines.spec import MachineSpec
from tests.harness.deaths import STORE, Call, die_at
from tests.live.machine import active_hash, context_of, fill, flush, grown_and_stopped, hold_invariants


def recorded_elsewhere(home: Path) -> None:
    """Let the store say what it would if the kernel had called all devices by other numbers until now."""

    def other(value: Any) -> Any:
        if isinstance(value, list):
            return [other(each) for each in value]
        if isinstance(value, dict):
            new = {key: other(each) for key, each in value.items()}
            return new | {"device": new["device"] + 1} if new.get("inode") else new
        return value

    with sqlite3.connect(home / "qmpsnap.db") as sql:
        sql.execute("UPDATE layer SET device = device + 1")
        for table, column in (("snapshot", "vmstate"), ("operation", "plan")):
            rows = sql.execute(f"SELECT id, {column} FROM {table} WHERE {column} IS NOT NULL").fetchall()  # noqa: S608
            for number, text in rows:
                sql.execute(
                    f"UPDATE {table} SET {column} = ? WHERE id = ?",  # noqa: S608
                    (json.dumps(other(json.loads(text))), number),
                )
        for number, step in sql.execute("SELECT id, step FROM operation").fetchall():
            match step.split(":"):
                case [phase, device, inode, *more] if device.isdigit() and inode.isdigit():
                    after = ":".join([phase, str(int(device) + 1), inode, *more])
                    sql.execute("UPDATE operation SET step = ? WHERE id = ?", (after, number))
    sql.close()


async def test_a_machine_with_all_that_it_has(home: Path, still_spec: MachineSpec) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(still_spec)
        await vm.start()
        await fill(vm, "vda", 0x11)
        await vm.snapshot("full", kind="full")
        await vm.snapshot("disks")
        await fill(vm, "vda", 0x22)
        await flush(vm, "vda")
        await vm.stop(force=True)
        now = await active_hash(vm)
    recorded_elsewhere(home)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (await vm.check(deep=True)).findings == ()
        assert await active_hash(vm) == now
        await vm.start()
        assert (await vm.revert("full")).memory
        await vm.stop(force=True)
        state = next(found.vmstate for found in await vm.snapshots() if found.name == "full")
        assert state
        assert Path(state.path).exists()
    recorded_elsewhere(home)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.delete_snapshots("full")
        assert not Path(state.path).exists()
        await hold_invariants(vm)


VERBS = {
    "commit": ("commit", "still", "vda", "--base", "s1", "--consume"),
    "mirror": ("mirror", "still", "vda", "{}", "--pivot"),
    "revert": ("snapshot", "revert", "still", "s1"),
}


@pytest.mark.parametrize("verb", VERBS)
async def test_an_operation_that_was_open(q: qmpsnap.Controller, home: Path, verb: str) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    words = [word.format(home / "copy.qcow2") for word in VERBS[verb]]
    await die_at(Call(STORE, "SqliteStore.settle", "after", 1), *words)
    (left,) = context_of(vm).store.operations("still", only_open=True)
    recorded_elsewhere(home)
    async with qmpsnap.open() as again:
        vm = await again.machine("still")
        (ended,) = await vm.recover()
        assert ended.id == left.id
        assert (await vm.check()).findings == ()
        ok = {s.name for s in await vm.snapshots() if s.state == "ok"}
        await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] in ok})
        if verb != "revert":
            assert await active_hash(vm) == now


async def test_a_file_that_was_replaced_is_still_refused(home: Path, still_spec: MachineSpec) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(still_spec)
        path = Path((await vm.chains())[0].layers[-1].layer.path)
    kept = path.rename(path.with_name("kept"))
    shutil.copy(kept, path)
    recorded_elsewhere(home)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        with pytest.raises(StoreMismatch, match="not the recorded file"):
            await vm.start()


async def test_another_hosts_numbers_are_its_own(home: Path, still_spec: MachineSpec) -> None:
    async with qmpsnap.open() as q:
        await q.define(still_spec)
    recorded_elsewhere(home)
    with sqlite3.connect(home / "qmpsnap.db") as sql:
        sql.execute("UPDATE machine SET host = 'elsewhere'")
        before = sql.execute("SELECT id, device FROM layer").fetchall()
        sql.commit()
        async with qmpsnap.open():
            pass
        assert sql.execute("SELECT id, device FROM layer").fetchall() == before
    sql.close()
