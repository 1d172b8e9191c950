"""A controller dies, and the next command ends what it left; what dies where is in tests/faults."""

import subprocess
from pathlib import Path

import qmpsnap
from qmpsnap.model.machines.spec import MachineSpec
from tests.harness.deaths import Call, die_at
from tests.harness.processes import guards
from tests.live.machine import hold_invariants


async def test_the_next_verb_recovers_by_itself(q: qmpsnap.Controller, still_spec: MachineSpec, home: Path) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await die_at(Call("qmpsnap.qmp.commands", "transaction", "after", 1), "snapshot", "create", "still", "one")
    await vm.snapshot("two")
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["one", "two"]
    await hold_invariants(vm)


def test_a_process_without_arguments_counts_as_a_guard_until_it_ends(home: Path) -> None:
    # What the kernel shows of a guard while it becomes a recovery; this one stays so until its input ends.
    with subprocess.Popen([""], executable="cat", cwd=home, stdin=subprocess.PIPE) as becoming:
        assert [process.pid for process in guards()] == [becoming.pid]
    assert not guards()
