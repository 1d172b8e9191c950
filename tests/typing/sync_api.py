"""What a program without asyncio sees through mypy strict; checked, never run: the names are those of public_api.py.

Every line marked ``type: ignore`` is a mistake that must be found: strict mypy complains when it no longer is one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import qmpsnap.sync
from qmpsnap import (
    Committed,
    Completed,
    Deleted,
    Event,
    Layer,
    MachineJob,
    MachineSpec,
    Mirrored,
    Operation,
    Plan,
    Reverted,
    Shortage,
    Snapshot,
    State,
    Streamed,
    Trimmed,
)
from qmpsnap.model.operations.operation import CreatePlan, DefinePlan, InternalPlan, MergePlan, MirrorPlan
from qmpsnap.ops.lifecycle.dry_run import Forgotten
from qmpsnap.ops.revert.revert import Preview
from qmpsnap.ops.snapshot.delete import DeletePlan
from qmpsnap.ops.stack import PopPreview
from qmpsnap.sync import Controller, MachineHandle


def opening(home: Path) -> None:
    with qmpsnap.sync.open() as q:
        assert_type(q, Controller)
    with qmpsnap.sync.open(home, secrets={"web/vda": b"key"}):
        pass
    with qmpsnap.sync.open(1):  # type: ignore[arg-type]
        pass


def the_controller(q: Controller) -> None:
    assert_type(q.machines(), tuple[MachineHandle, ...])
    assert_type(q.machine("web"), MachineHandle)
    assert_type(q.read_spec("web.yaml"), MachineSpec)
    assert_type(q.define("web.yaml", exist_ok=True), MachineHandle)
    assert_type(q.adopt("theirs", "/run/qmp.sock"), MachineHandle)
    assert_type(q.plan_define("web.yaml"), Plan[DefinePlan, MachineHandle])
    assert_type(q.apply(q.plan_define("web.yaml")), MachineHandle)
    assert_type(q.recover("web"), list[Operation])
    q.machine(None)  # type: ignore[arg-type]


def plans(vm: MachineHandle) -> None:
    assert_type(vm.plan_snapshot("before"), Plan[CreatePlan, Snapshot])
    assert_type(vm.plan_snapshot(kind="internal"), Plan[InternalPlan, Snapshot])
    assert_type(vm.plan_revert("before"), Plan[Preview, Reverted])
    assert_type(vm.plan_pop(), Plan[PopPreview, Reverted])
    assert_type(vm.plan_undefine(disks="keep"), Plan[Forgotten, list[str]])
    assert_type(vm.plan_commit("vda"), Plan[MergePlan, Committed])
    assert_type(vm.plan_mirror("vda", "/srv/copy", mode="finish"), Plan[MirrorPlan, Mirrored])
    assert_type(vm.plan_delete_snapshots("a"), Plan[DeletePlan, Deleted])
    assert_type(vm.apply(vm.plan_commit("vda")), Committed)
    vm.plan_snapshot(kind="disk", compression="zstd")  # type: ignore[call-overload]


def a_machine(vm: MachineHandle) -> None:
    assert_type(vm.name, str)
    assert_type(vm.state(), State)
    assert_type(vm.resume(), State)
    assert_type(vm.shortage(), tuple[Shortage, ...])
    assert_type(vm.misfits(), tuple[str, ...])
    assert_type(vm.events(interval=1), Iterator[Event])
    assert_type(vm.run("uname -s"), Completed[str])
    assert_type(vm.run(["uname"], encoding=None, timeout=5), Completed[bytes])
    assert_type(vm.put(b"content", "/etc/motd") + vm.get("/etc/motd", "motd"), int)
    assert_type(vm.fstrim(), tuple[Trimmed, ...])
    vm.start(paused=True)
    vm.stop(force=True, timeout=5)
    vm.run("true", deadline=5)  # type: ignore[call-overload]


def layers(vm: MachineHandle) -> None:
    assert_type(vm.snapshot("all", kind="full", max_pause_ms=40, report=print), Snapshot)
    assert_type(vm.snapshots(), tuple[Snapshot, ...])
    assert_type(vm.add_layers(), tuple[Layer, ...])
    assert_type(vm.commit("vda", top=vm.snapshot(), consume=True), Committed)
    assert_type(vm.stream("vda"), Streamed)
    assert_type(vm.mirror("vda", Path("/srv/copy"), mode="pivot"), Mirrored)
    assert_type(vm.delete_snapshots("a", "b"), Deleted)
    assert_type(vm.revert("before", state="paused"), Reverted)
    assert_type(vm.jobs(), tuple[MachineJob, ...])
    assert_type(vm.set_speed(0), list[str])
    vm.snapshot(compression="zstd")  # type: ignore[call-overload]
    vm.revert("before", state="asleep")  # type: ignore[arg-type]
