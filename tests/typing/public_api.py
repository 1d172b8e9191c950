"""What a program that uses qmpsnap sees through mypy strict; checked, never run.

Every line marked ``type: ignore`` is a mistake that must be found: strict mypy complains when it no longer is one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import qmpsnap
from qmpsnap import (
    Chain,
    Committed,
    Controller,
    Deleted,
    DiskSpec,
    Forked,
    ForkPool,
    Job,
    JobChanged,
    JobInfo,
    Layer,
    MachineHandle,
    MachineJob,
    MachineSpec,
    Mirrored,
    Plan,
    PlannedFile,
    ProcessError,
    Pruned,
    QmpsnapError,
    Shelved,
    Shortage,
    ShortageChanged,
    Snapshot,
    State,
    StateChanged,
    Streamed,
)
from qmpsnap.machine.agent import Completed, Trimmed
from qmpsnap.model.layers.vmstate import Vmstate
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.operations.flatten import FlattenPlan
from qmpsnap.model.operations.operation import (
    CreatePlan,
    DefinePlan,
    InternalPlan,
    MergePlan,
    MirrorPlan,
    Operation,
    ResizePlan,
)
from qmpsnap.ops.adoption.adopt import Survey
from qmpsnap.ops.adoption.take import TakePlan
from qmpsnap.ops.check.check import Checked
from qmpsnap.ops.devices.attach import Attached
from qmpsnap.ops.devices.detach import Detached
from qmpsnap.ops.devices.nics import Nic
from qmpsnap.ops.fork.run import Preview as ForkPreview
from qmpsnap.ops.lifecycle.change import Changed
from qmpsnap.ops.lifecycle.dry_run import Forgotten
from qmpsnap.ops.lifecycle.rename import Renamed
from qmpsnap.ops.outside.compare import ChainView, LayerView
from qmpsnap.ops.revert.revert import Preview, Reverted
from qmpsnap.ops.snapshot.delete import DeletePlan
from qmpsnap.ops.stack import PopPreview


async def opening(home: Path) -> None:
    async with qmpsnap.open() as q:
        assert_type(q, Controller)
    async with qmpsnap.open(home) as q, qmpsnap.open(home=str(home)):
        assert_type(q, Controller)
    async with qmpsnap.open(1):  # type: ignore[arg-type]
        pass
    with qmpsnap.open():  # type: ignore[attr-defined]
        pass


async def the_controller(q: Controller) -> None:
    assert_type(await q.machines(), tuple[MachineHandle, ...])
    assert_type(await q.machine("web"), MachineHandle)
    assert_type(await q.templates(), tuple[Shelved, ...])
    assert_type(await q.prune_templates(all=True), Pruned)
    assert_type(await q.plan_prune_templates(), Plan[Pruned, Pruned])
    assert_type(q.read_spec("web.yaml"), MachineSpec)
    assert_type(await q.define("web.yaml"), MachineHandle)
    assert_type(await q.define(Path("web.yaml"), folders=[Path("/images")], allow_extra=True), MachineHandle)
    assert_type(await q.define(MachineSpec(name="web", disks=(DiskSpec(name="vda", size=1 << 30),))), MachineHandle)
    assert_type(await q.define("web.yaml", exist_ok=True), MachineHandle)
    assert_type(await q.adopt("theirs", "/run/qmp.sock"), MachineHandle)
    define, adopt = await q.plan_define("web.yaml"), await q.plan_adopt("theirs", "/run/qmp.sock")
    assert_type(define, Plan[DefinePlan, MachineHandle])
    assert_type(adopt, Plan[tuple[Survey, DefinePlan], MachineHandle])
    assert_type(await q.apply(define), MachineHandle)
    await q.machine(None)  # type: ignore[arg-type]


async def plans(vm: MachineHandle) -> None:
    assert_type(await vm.plan_snapshot("before"), Plan[CreatePlan, Snapshot])
    assert_type(await vm.plan_snapshot("in", kind="internal", disks=["vda"]), Plan[InternalPlan, Snapshot])
    assert_type(await vm.plan_add_layers(), Plan[CreatePlan, tuple[Layer, ...]])
    assert_type(await vm.plan_revert("before"), Plan[Preview, Reverted])
    assert_type(await vm.plan_push("before"), Plan[CreatePlan, Snapshot])
    assert_type(await vm.plan_pop(discard=True), Plan[PopPreview, Reverted])
    assert_type(await vm.plan_save(name="evening"), Plan[CreatePlan, Snapshot])
    assert_type(await vm.plan_restore(discard=True), Plan[Preview, Reverted])
    assert_type(await vm.plan_undefine(disks="keep"), Plan[Forgotten, list[str]])
    assert_type(await vm.plan_rename("other"), Plan[Renamed, Machine])
    assert_type(await vm.plan_rename_snapshot("before", "after"), Plan[None, Snapshot])
    assert_type(await vm.plan_describe_snapshot("before", tags={"k": "v"}), Plan[Snapshot, Snapshot])
    assert_type(await vm.plan_commit("vda", top="before", consume=True), Plan[MergePlan, Committed])
    assert_type(await vm.plan_stream("vda", base="before"), Plan[MergePlan, Streamed])
    assert_type(await vm.plan_mirror("vda", Path("/srv/copy"), mode="finish"), Plan[MirrorPlan, Mirrored])
    assert_type(await vm.plan_delete_snapshots("a", "b", children=True), Plan[DeletePlan, Deleted])
    assert_type(await vm.plan_set(MachineSpec(name="web")), Plan[Changed, Changed])
    assert_type(await vm.plan_take((await vm.launched_as()).spec), Plan[TakePlan, TakePlan])
    assert_type(await vm.plan_attach_disk({"size": "1G"}), Plan[Attached, Attached])
    assert_type(await vm.plan_detach_disk("vdb"), Plan[Detached, Detached])
    assert_type(await vm.plan_attach_nic({"kind": "user"}), Plan[Nic, Nic])
    assert_type(await vm.plan_detach_nic(0), Plan[Nic, Nic])
    assert_type(await vm.plan_resize("vda", "+1G"), Plan[ResizePlan, ResizePlan])
    assert_type(await vm.plan_flatten("vda"), Plan[FlattenPlan, FlattenPlan])
    assert_type(await vm.plan_snapshot(kind="volume", mixed=True, lvm_size="20%"), Plan[CreatePlan, Snapshot])
    plan = await vm.plan_commit("vda")
    assert_type(plan.files, tuple[PlannedFile, ...])
    assert_type((plan.summary, plan.bytes), tuple[str, int])
    assert_type(plan.qmp, tuple[dict[str, Any], ...])
    assert_type(vm.apply(plan), Job[Committed])
    await vm.plan_snapshot(kind="disk", compression="zstd")  # type: ignore[call-overload]


async def jobs(vm: MachineHandle) -> None:
    job = vm.commit("vda")
    assert_type(job, Job[Committed])
    async for info in job.progress():
        assert_type(info, JobInfo)
    assert_type((await job).overwritten, tuple[str, ...])
    async with vm.snapshot("before", kind="full") as taking:
        assert_type(taking, Job[Snapshot])
    await job.cancel()
    (await job).lost  # type: ignore[attr-defined]  # noqa: B018


async def snapshots(vm: MachineHandle) -> None:
    assert_type(await vm.snapshot(), Snapshot)
    assert_type(await vm.snapshot("before", description="text", disks=["vda"]), Snapshot)
    assert_type(await vm.snapshot(files={"vda": "/srv/vda.qcow2"}), Snapshot)
    assert_type(await vm.snapshot(files={"vda": Path("vda.qcow2")}), Snapshot)
    await vm.snapshot(files=["vda"])  # type: ignore[call-overload]
    assert_type(await vm.snapshot("all", kind="full", max_pause_ms=40, compression="zstd", degrade=True), Snapshot)
    assert_type(await vm.snapshot("in", kind="internal", memory=False), Snapshot)
    assert_type(await vm.snapshot("sync", by="blockdev-snapshot-sync"), Snapshot)
    assert_type(await vm.snapshot("sync", kind="full", by="blockdev-snapshot-sync"), Snapshot)
    assert_type(await vm.plan_snapshot("sync", by="blockdev-snapshot"), Plan[CreatePlan, Snapshot])
    await vm.snapshot(by="snapshot_blkdev")  # type: ignore[call-overload]
    assert_type(await vm.snapshot("in", kind="internal", by="savevm"), Snapshot)
    await vm.snapshot(kind="full", by="savevm")  # type: ignore[call-overload]
    assert_type(await vm.mirror("vda", "/copy", mode="pivot", by="drive-mirror"), Mirrored)
    await vm.mirror("vda", "/copy", mode="pivot", by="blockdev-backup")  # type: ignore[arg-type]
    await vm.revert("in", by="loadvm")
    await vm.revert("in", by="savevm")  # type: ignore[arg-type]
    await vm.delete_snapshots("in", by="delvm")
    await vm.delete_snapshots("in", by="loadvm")  # type: ignore[arg-type]
    await vm.snapshot(kind="volume", by="blockdev-snapshot")  # type: ignore[call-overload]
    assert_type(await vm.snapshot(quiesce="prefer", freeze_window=2), Snapshot)
    await vm.snapshot(quiesce="maybe")  # type: ignore[call-overload]
    assert_type(await vm.snapshot("all", kind="full", volume=True), Snapshot)
    assert_type(await vm.snapshot(kind="volume"), Snapshot)
    await vm.snapshot(max_pause_ms=40)  # type: ignore[call-overload]
    await vm.snapshot(kind="full", memory=True)  # type: ignore[call-overload]
    await vm.snapshot(kind="internal", files={"vda": "l"})  # type: ignore[call-overload]
    await vm.snapshot("before", "text")  # type: ignore[call-overload]
    vm.snapshot("before").name  # type: ignore[attr-defined]  # noqa: B018


async def events(vm: MachineHandle) -> None:
    async for event in vm.events(interval=1):
        if isinstance(event, StateChanged):
            assert_type(event.state.guest_runs, bool)
        elif isinstance(event, JobChanged):
            assert_type(event.job, JobInfo)
        else:
            assert_type(event, ShortageChanged)
            assert_type(event.shortage[0].free, int)


async def a_guest(vm: MachineHandle) -> None:
    assert_type(await vm.run("uname -s"), Completed[str])
    assert_type(await vm.run("uname -s", encoding=None), Completed[bytes])
    assert_type(await vm.run("cat", stdin=b"x", env={"A": "b"}, cwd="/tmp", wait=5), Completed[str])
    assert_type(await vm.put(b"content", "/etc/motd") + await vm.get("/etc/motd", Path("motd"), timeout=5), int)
    assert_type(await vm.run(["uname", "-s"], timeout=5, check=False), Completed[str])
    assert_type(await vm.fstrim(minimum=4096), tuple[Trimmed, ...])
    try:
        await vm.run("false")
    except ProcessError as error:
        assert_type(error.exit_status, int)
        assert_type(error.stderr, str | bytes)


async def a_machine(vm: MachineHandle) -> None:
    assert_type(vm.name, str)
    assert_type(await vm.record(), Machine)
    assert_type(await vm.start(paused=True, allow_extra=True), Process)
    assert_type(await vm.is_running(), bool)
    assert_type(await vm.state(), State)
    assert_type(await vm.shortage(), tuple[Shortage, ...])
    assert_type(await vm.misfits(), tuple[str, ...])
    assert_type(await vm.left_out(), tuple[str, ...])
    await vm.pause()
    assert_type(await vm.resume(), State)
    await vm.wakeup()
    assert_type(await vm.add_layers(disks=["vda"], files={"vda": "l"}), tuple[Layer, ...])
    assert_type(await vm.revert("before", discard=True, state="paused"), Reverted)
    assert_type(await vm.revert(await vm.snapshot()), Reverted)
    assert_type(await vm.save("/srv/web.vmstate", name="evening"), Snapshot)
    assert_type(await vm.restore("/srv/web.vmstate", discard=True, paused=True, after=False), Reverted)
    assert_type(await vm.mirror("vda", "/srv/copy.qcow2", mode="finish"), Mirrored)
    assert_type(await vm.commit("vda", base="a", top="b", consume=True), Committed)
    assert_type(await vm.stream("vda", base="a"), Streamed)
    assert_type(await vm.stream("vda", base=await vm.snapshot()), Streamed)
    assert_type(await vm.delete_snapshots("a", "b", children=True, metadata=False), Deleted)
    assert_type(await vm.jobs(), tuple[MachineJob, ...])
    assert_type(await vm.set_speed(1 << 20), list[str])
    assert_type(await vm.wait(), list[Operation])
    assert_type(await vm.cancel(), list[Operation])
    assert_type(await vm.rename("other"), Machine)
    assert_type(await vm.rename_snapshot("before", "after"), Snapshot)
    assert_type(await vm.describe_snapshot("before", "text", tags={"k": "v"}, untag=["old"]), Snapshot)
    assert_type(await vm.set({"memory": "4G"}), Changed)
    assert_type(await vm.take(MachineSpec(name="web"), allow_extra=True), TakePlan)
    assert_type(await vm.attach_disk({"image": Path("/srv/data.qcow2")}, folders=[Path("/srv")]), Attached)
    assert_type(await vm.attach_disk(DiskSpec(name="vdb", size=1 << 30)), Attached)
    assert_type(await vm.detach_disk("vdb"), Detached)
    assert_type(await vm.attach_nic({}), Nic)
    assert_type(await vm.detach_nic("52:54:00:00:00:01", timeout=5), Nic)
    assert_type(await vm.resize("vda", "+1G"), ResizePlan)
    assert_type(await vm.flatten("vda"), FlattenPlan)
    assert_type(await vm.push("before", description="text"), Snapshot)
    assert_type(await vm.pop(discard=True), Reverted)
    await vm.revert("before", state="asleep")  # type: ignore[arg-type]
    assert_type(await vm.snapshots(), tuple[Snapshot, ...])
    assert_type(await vm.chains("vda"), tuple[ChainView, ...])
    assert_type(await vm.check(deep=True, repair=True), Checked)
    assert_type(await vm.recover(), list[Operation])
    assert_type(await vm.undefine(disks="keep"), list[str])
    await vm.stop(force=True, timeout=5)
    await vm.undefine(disks="burn")  # type: ignore[arg-type]


async def forks(vm: MachineHandle) -> None:
    assert_type(await vm.fork("warm", "child", count=2, ephemeral=True, identity="fresh"), list[Forked])
    assert_type(await vm.plan_fork(), Plan[ForkPreview, list[Forked]])
    async with vm.pool("warm", size=2, fresh=False) as pool, pool.take() as fork:
        assert_type(pool, ForkPool)
        assert_type(await pool.memory(), int)
        assert_type(fork, MachineHandle)
    await vm.fork(identity="stolen")  # type: ignore[arg-type]


def values(snapshot: Snapshot, chain: Chain, view: ChainView) -> None:
    assert_type(snapshot.name, str)
    assert_type(snapshot.parent, str | None)
    assert_type(snapshot.pause_ms, float | None)
    assert_type(snapshot.vmstate, Vmstate | None)
    assert_type(chain.active, Layer)
    assert_type(chain.layers, tuple[Layer, ...])
    assert_type(view.layers, tuple[LayerView, ...])
    snapshot.name = "other"  # type: ignore[misc]


def an_error(error: QmpsnapError) -> Sequence[str]:
    assert_type(error.exit_code, int)
    assert_type(error.machine, str | None)
    if error.effect == "changed":  # type: ignore[comparison-overlap]
        return [error.message]  # type: ignore[unreachable]
    return [error.message, error.hint, error.effect]


qmpsnap.missing  # type: ignore[attr-defined]  # noqa: B018
