"""``snapshot push`` and ``pop``: a stack that survives a death between its two steps."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from qmpsnap.model.layers.snapshot import Outside
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.revert import revert
from qmpsnap.ops.revert.revert import Reverted
from qmpsnap.store.sqlite import schema
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.harness.deaths import Call, die_at
from tests.live.machine import active_hash, context_of, fill, hold_invariants


@pytest.mark.parametrize("state", ["prelaunch", "stopped"])
async def test_a_stack(q: qmpsnap.Controller, still_spec: MachineSpec, state: str) -> None:
    vm = await q.define(still_spec)
    with pytest.raises(StateError, match="has no current snapshot") as refused:
        await vm.pop()
    assert "snapshot push still" in as_typed(refused.value.hint)
    held = []
    await vm.start(paused=True)
    for pattern in (1, 2, 3):
        await fill(vm, "vda", pattern)
        held.append(await active_hash(vm))
        await vm.push()
    await fill(vm, "vda", 4)
    if state == "stopped":
        await vm.stop(force=True)
    files = len(list(context_of(vm).home.machine_dir("still").iterdir()))
    for name in ("snap-3", "snap-2", "snap-1"):
        done = await vm.pop()
        assert (done.snapshot.name, done.kept) == (name, None)
        assert await vm.state() == state
        assert await active_hash(vm) == held.pop()
        assert name not in [snapshot.name for snapshot in await vm.snapshots()]
        await hold_invariants(vm)
    assert await vm.snapshots() == ()
    assert (await vm.record()).current is None
    assert len(list(context_of(vm).home.machine_dir("still").iterdir())) == files - 6


@pytest.mark.parametrize(
    "point",
    [
        Call("qmpsnap.ops.revert.revert", "run", "before", 1),
        Call("qmpsnap.ops.revert.revert", "run", "after", 1),
        Call("qmpsnap.ops.snapshot.delete", "run", "after", 1),
    ],
)
async def test_killed_between_its_steps(q: qmpsnap.Controller, still_spec: MachineSpec, point: Call) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await vm.push("lower")
    await fill(vm, "vda", 1)
    held = await active_hash(vm)
    await vm.push("upper")
    await fill(vm, "vda", 2)
    await die_at(point, "snapshot", "pop", "still", "--progress", "none")
    await hold_invariants(vm)
    if [snapshot.name for snapshot in await vm.snapshots()] == ["lower", "upper"]:
        await vm.pop()
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["lower"]
    assert (await vm.record()).current == "lower"
    assert await active_hash(vm) == held
    await hold_invariants(vm)


def test_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "s.yaml").write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n")
    assert main(["define", str(home / "s.yaml")]) == 0
    assert main(["snapshot", "pop", "still"]) == 4
    assert main(["snapshot", "push", "still", "-m", "a note", "-o", "name"]) == 0
    assert capsys.readouterr().out == "snap-1\n"
    assert main(["snapshot", "push", "still", "mine"]) == 0
    capsys.readouterr()
    assert main(["snapshot", "pop", "still", "--progress", "none"]) == 0
    assert "is back at mine, stopped; mine is deleted" in capsys.readouterr().out
    assert main(["snapshot", "pop", "still", "-o", "json"]) == 0
    assert '"snapshot": "snap-1"' in capsys.readouterr().out


def test_pop_tells_what_revert_tells(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "s.yaml").write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n")
    assert main(["define", str(home / "s.yaml")]) == 0
    gone_back = revert.run

    async def with_memory(*arguments: Any) -> Reverted:
        other = Outside("extra", "/x")
        done = await gone_back(*arguments)
        return replace(done, memory=True, notes=("a note",), clock_error_ms=-12.5, detached=(other,))

    monkeypatch.setattr(revert, "run", with_memory)
    for form in ("table", "json"):
        assert main(["snapshot", "push", "still"]) == 0
        capsys.readouterr()
        assert main(["snapshot", "pop", "still", "-o", form]) == 0
        told = capsys.readouterr()
        assert "a note" in told.err
        assert "detached: extra (/x)" in told.err
        if form == "table":
            assert "the guest's clock is off by -12.5 ms; snap-1 is deleted" in told.out
        else:
            said = json.loads(told.out)
            assert (said["clock_error_ms"], said["memory"], said["notes"]) == (-12.5, True, ["a note"])
            assert said["detached"] == [{"name": "extra", "file": "/x"}]


async def test_only_what_was_pushed_is_popped_unasked(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.push("pushed")
    await vm.snapshot("taken")
    with pytest.raises(StateError, match=r"snapshot taken of machine .* which push did not take") as refused:
        await vm.pop()
    with pytest.raises(StateError, match="which push did not take"):
        await vm.plan_pop()
    assert "snapshot revert still taken; or accept that with --discard" in as_typed(refused.value.hint)
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["pushed", "taken"]
    assert (await vm.plan_pop(discard=True)).details.delete.names == ("taken",)
    assert (await vm.pop(discard=True)).snapshot.name == "taken"
    await vm.rename_snapshot("pushed", "renamed")
    assert (await vm.pop()).snapshot.name == "renamed"


def test_an_older_store_does_not_know_what_was_pushed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    schema.connect(path, migrations=schema.MIGRATIONS[:4]).close()
    with closing(sqlite3.connect(path)) as old, old:
        old.execute("INSERT INTO machine (id, name, uuid, host, spec, created) VALUES (1, 'm', 'u', 'h', '{}', 0)")
        old.execute(
            "INSERT INTO snapshot VALUES (1, 1, 's', 'disk', 'ok', NULL, 0, '', 'live', NULL, 1, 1, NULL, NULL, NULL,"
            " 'crash', '')"
        )
    with SqliteStore(path, machines=tmp_path) as store:
        assert [found.pushed for found in store.snapshots("m")] == [False]
