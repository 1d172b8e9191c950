"""A controller dies, and the next command ends what it left; what dies where is in tests/faults."""

import subprocess
from pathlib import Path

import qmpsnap
from qmpsnap.model.spec import MachineSpec
from tests.live.crash import STORE, die_at, guards
from tests.live.machine import hold_invariants


def _files(home: Path) -> set[str]:
    return {path.name for path in (home / "machines/still").iterdir()}


async def test_the_next_verb_recovers_by_itself(q: qmpsnap.Controller, still_spec: MachineSpec, home: Path) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await die_at(("qmpsnap.qmp.commands", "transaction", "after", 1), "snapshot", "create", "still", "one")
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


def test_a_process_without_arguments_counts_as_a_guard_until_it_ends(home: Path) -> None:
    # What the kernel shows of a guard while it becomes a recovery; this one stays so until its input ends.
    with subprocess.Popen([""], executable="cat", cwd=home, stdin=subprocess.PIPE) as becoming:
        assert [process.pid for process in guards()] == [becoming.pid]
    assert not guards()
