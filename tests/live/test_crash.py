"""The controller dies at each step of `snapshot create`; QEMU lives, dies with it, or never ran. Then: recover."""

from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.model.spec import MachineSpec
from tests.live.crash import STORE, die_at, kill_qemu
from tests.live.machine import content_hash, context_of, fill, hold_invariants

STEPS = {
    "before the journal row": (STORE, "SqliteStore.open_operation", "before", 1),
    "after the journal row": (STORE, "SqliteStore.open_operation", "after", 1),
    "with one overlay made": ("qmpsnap.block.image", "ImageTool.create_overlay", "after", 1),
    "with both overlays made": ("qmpsnap.block.image", "ImageTool.create_overlay", "after", 2),
    "with one node opened": ("qmpsnap.qmp.commands", "blockdev_add", "after", 1),
    "before the transaction is marked": (STORE, "SqliteStore.mark", "before", 1),
    "after the transaction is marked": (STORE, "SqliteStore.mark", "after", 1),
    "after the transaction": ("qmpsnap.qmp.commands", "transaction", "after", 1),
    "before settling": (STORE, "SqliteStore.settle", "before", 1),
    "after settling": (STORE, "SqliteStore.settle", "after", 1),
}
ONLY_LIVE = {
    "with one node opened",
    "before the transaction is marked",
    "after the transaction is marked",
    "after the transaction",
}
TAKEN = {"after the transaction", "before settling", "after settling"}


async def _die_at(step: str, *words: str) -> None:
    await die_at(STEPS[step], *words)


def _files(home: Path) -> set[str]:
    return {path.name for path in (home / "machines/still").iterdir()}


@pytest.mark.grid
@pytest.mark.parametrize("qemu", ["lives", "dies too", "never ran"])
@pytest.mark.parametrize("step", STEPS)
async def test_killed_controller(
    q: qmpsnap.Controller, still_spec: MachineSpec, home: Path, step: str, qemu: str
) -> None:
    if qemu == "never ran" and step in ONLY_LIVE:
        return  # a stopped machine takes no such step
    vm = await q.define(still_spec)
    hashes = {}
    if qemu != "never ran":
        await vm.start(paused=True)
        await fill(vm, "vda", 1)
    first = await vm.snapshot("first")
    for point in first.points:
        hashes["first", point.disk] = await content_hash(vm, point.layer)
    if qemu != "never ran":
        await fill(vm, "vda", 2)
    before = _files(home)

    await _die_at(step, "snapshot", "create", "still", "second")
    if qemu == "dies too":
        await kill_qemu(vm)

    await vm.recover()
    names = [snapshot.name for snapshot in await vm.snapshots()]
    settled = {"lives": TAKEN, "never ran": {"after settling"}, "dies too": TAKEN | {"after the transaction is marked"}}
    assert names == (["first", "second"] if step in settled[qemu] else ["first"])
    if "second" not in names:
        assert _files(home) == before
    await hold_invariants(vm, hashes)
    # Once more changes nothing, and the machine goes on working.
    record, files = await vm.record(), _files(home)
    await vm.recover()
    assert (await vm.record(), _files(home)) == (record, files)
    if qemu == "dies too":
        await vm.start(paused=True)
    await vm.snapshot("third")
    if qemu != "never ran":
        await fill(vm, "vda", 3)
    await hold_invariants(vm, hashes)
    assert context_of(vm).store.operations("still", only_open=True) == ()


async def test_the_next_verb_recovers_by_itself(q: qmpsnap.Controller, still_spec: MachineSpec, home: Path) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await _die_at("after the transaction", "snapshot", "create", "still", "one")
    await vm.snapshot("two")
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["one", "two"]
    await hold_invariants(vm)


async def test_a_definition_that_died_can_be_repeated(q: qmpsnap.Controller, home: Path) -> None:
    spec = home / "s.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}, {name: vdb, size: 1M, format: raw}]\n")
    await die_at((STORE, "SqliteStore.settle", "before", 1), "define", str(spec))
    assert await q.machines() == ()
    vm = await q.define(spec)
    assert len(_files(home)) == 2
    await hold_invariants(vm)


@pytest.mark.grid
@pytest.mark.parametrize("after", range(1, 40, 3))
async def test_a_cancelled_scope_leaves_all_or_nothing(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Cancelled when the n-th await on the store, QEMU or qemu-img is about to begin."""
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 5)
    count = 0
    with anyio.CancelScope() as scope:

        def tick() -> None:
            nonlocal count
            count += 1
            if count == after:
                scope.cancel()

        for owner, name in (
            ("qmpsnap.qmp.session.Session", "execute"),
            ("qmpsnap.block.image.ImageTool", "create_overlay"),
            ("anyio.to_thread", "run_sync"),
        ):
            _count_calls(monkeypatch, f"{owner}.{name}", tick)
        await vm.snapshot("s")
    monkeypatch.undo()
    monkeypatch.setenv("QMPSNAP_HOME", str(context_of(vm).home.data))
    taken = [snapshot.name for snapshot in await vm.snapshots()]
    assert taken in ([], ["s"])
    await hold_invariants(vm)
    if not taken:
        await vm.snapshot("s")
        await hold_invariants(vm)


def _count_calls(monkeypatch: pytest.MonkeyPatch, target: str, tick: object) -> None:
    import importlib

    module, _, name = target.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, attribute = module.rpartition(".")
        owner = getattr(importlib.import_module(parent), attribute)
    real = getattr(owner, name)

    async def counted(*arguments: object, **rest: object) -> object:
        assert callable(tick)
        tick()
        return await real(*arguments, **rest)

    monkeypatch.setattr(owner, name, counted)
