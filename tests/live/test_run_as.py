"""Root's QEMU as a user of its own, through everything that opens a file; and as root, with few capabilities."""

import os
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.machine import privileges
from tests.live.machine import MIB, context_of, fill, grown, hold_invariants, snapshot_hashes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run QEMU as another user")

USER = "nobody"
UID = 65534


@pytest.fixture
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(privileges.VARIABLE, USER)
    return home


def status_of(vm: qmpsnap.MachineHandle) -> dict[str, list[str]]:
    context = context_of(vm)
    process = context.process(context.store.machine(vm.name))
    assert process
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {line.split(":")[0]: line.split()[1:] for line in lines}


def require_nobody(vm: qmpsnap.MachineHandle) -> None:
    status = status_of(vm)
    assert status["Uid"] == [str(UID)] * 4
    assert "0" not in (*status["Gid"], *status.get("Groups", []))
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind][0], 16) == 0, kind
    assert status["Seccomp"] == ["2"]


async def running(vm: qmpsnap.MachineHandle) -> None:
    if not await vm.is_running():
        await vm.start(paused=True)
    require_nobody(vm)


async def test_the_whole_life_of_a_machine_as_another_user(q: qmpsnap.Controller, place: Path) -> None:
    vm = await grown(q, "s1", "s2")
    require_nobody(vm)
    await vm.resume()  # whose memory is saved while it stands still, as userfaultfd is root's
    full = await vm.snapshot("full", kind="full")
    assert full.vmstate
    assert full.vmstate.mode == "stopped"
    await fill(vm, "vda", 7, offset=9 * MIB)
    before = await snapshot_hashes(vm)
    await vm.snapshot("inside", kind="internal")
    await fill(vm, "vda", 8, offset=9 * MIB)
    for name in ("s1", "full", "inside"):
        await vm.revert(name)
        await running(vm)
        await hold_invariants(vm, before)
    await vm.delete_snapshots("inside")
    await vm.snapshot("s3")
    before = await snapshot_hashes(vm)
    await vm.stream("vda")
    require_nobody(vm)
    await hold_invariants(vm, before)
    await vm.delete_snapshots("s2")
    await vm.mirror("vda", place / "copy.qcow2", mode="pivot")
    require_nobody(vm)
    await vm.snapshot("s4")
    await vm.commit("vda", base="s4", consume=True)
    require_nobody(vm)
    await vm.stop(force=True)
    await vm.delete_snapshots("s3")  # by a worker
    await hold_invariants(vm)
