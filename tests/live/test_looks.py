"""What only looks: it says what the run would say, and it can be asked while somebody works on the machine."""

from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, LockHeld, StateError, StoreMismatch, UsageError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base import free_space
from qmpsnap.ops.merge import commit
from qmpsnap.ops.merge.commit import CommitRequest
from qmpsnap.ops.mirror import mirror
from qmpsnap.ops.mirror.mirror import MirrorRequest
from qmpsnap.ops.snapshot import delete
from qmpsnap.ops.snapshot.delete import DeleteRequest
from tests.harness.deaths import JOBS, Call, stopped_at
from tests.live.machine import context_of, grown_and_stopped, user_monitor


async def test_jobs_and_state_while_another_process_works(
    q: qmpsnap.Controller, capfd: pytest.CaptureFixture[str]
) -> None:
    vm, _, _ = await grown_and_stopped(q)
    await vm.start(paused=True)
    async with stopped_at(Call(JOBS, "follow", "before", 1), "stream", "still", "vda", "--progress", "none") as process:
        (job,) = await vm.jobs()
        assert job.type == "stream"
        assert await vm.state() in ("paused", "prelaunch")
        assert f"'stream' (pid {process.pid} " in str(job.waiting)
        with pytest.raises(LockHeld, match=rf"'stream' \(pid {process.pid} ") as held:
            await vm.recover()
        assert "kill -INT" in held.value.hint
        with anyio.move_on_after(0.5) as waiting:
            await vm.wait()
        assert waiting.cancelled_caught, "it waits for that process"
        (view,) = await vm.chains()
        assert (view.running, view.busy, view.problems) == (False, job.waiting, ())
        assert await anyio.to_thread.run_sync(main, ["chain", "still"]) == 0
        assert f"in use by {job.waiting}; store and headers agree" in capfd.readouterr().out
        assert await anyio.to_thread.run_sync(main, ["check", "still"]) == 0
        assert f"machine-busy (I6): it is in use by {job.waiting}" in capfd.readouterr().out
    assert capfd.readouterr().err == ""
    assert await vm.jobs() == ()


async def test_a_paused_guest_cannot_hear_the_power_button(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.start()
    await vm.pause()
    with pytest.raises(StateError, match=r"is not running \(paused\)") as refused:
        await vm.stop()
    assert as_typed(refused.value.hint) == "qmpsnap resume still"
    await vm.stop(force=True)
    with pytest.raises(StateError, match="is not running") as refused:
        await vm.stop()
    assert as_typed(refused.value.hint) == "qmpsnap start still"


WISHES: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "frozen, without a guest": ({"quiesce": "require"}, StateError),
    "frozen for too long": ({"quiesce": "prefer", "freeze_window": 100}, UsageError),
    "inside, frozen with memory": ({"kind": "internal", "quiesce": "require"}, UsageError),
    "inside, frozen, without a guest": ({"kind": "internal", "quiesce": "require", "memory": False}, StateError),
    "memory, without a guest": ({"kind": "full"}, StateError),
    "a word that is none": ({"quiesce": "required"}, UsageError),
}


@pytest.mark.parametrize("wish", WISHES)
async def test_a_snapshots_preview_refuses_what_the_snapshot_refuses(
    q: qmpsnap.Controller, still_spec: MachineSpec, wish: str
) -> None:
    options, family = WISHES[wish]
    vm = await q.define(still_spec)
    with pytest.raises(family) as run:
        await vm.snapshot("s", **options)
    with pytest.raises(family) as look:
        await vm.plan_snapshot("s", **options)
    assert str(look.value) == str(run.value)


async def test_a_preview_sees_that_qemu_has_other_chains(
    q: qmpsnap.Controller, still_spec: MachineSpec, home: Path
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        arguments = {"node-name": "vda-1", "snapshot-file": str(home / "x"), "snapshot-node-name": "theirs"}
        await qemu.execute("blockdev-snapshot-sync", arguments)
    for kind in ("disk", "internal"):
        with pytest.raises(StoreMismatch):
            await vm.plan_snapshot("s", kind=kind)


async def test_a_preview_sees_that_there_is_no_room(
    q: qmpsnap.Controller, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _, _ = await grown_and_stopped(q)
    context = context_of(vm)
    await commit.preview(context, "still", CommitRequest(disk="vda", base="s1", consume=True))
    real = free_space.room
    monkeypatch.setattr(free_space, "room", lambda folder: free_space.Room(real(folder).device, 4096))
    for attempt in (
        commit.preview(context, "still", CommitRequest(disk="vda", base="s1", consume=True)),
        delete.preview(context, "still", DeleteRequest(names=("s2",))),
        mirror.preview(context, "still", MirrorRequest(disk="vda", target=str(home / "copy"), mode="pivot")),
        vm.plan_snapshot("s", kind="internal"),
    ):
        with pytest.raises(HostCannot):
            await attempt


async def test_the_options_of_a_dry_run_are_the_runs(
    q: qmpsnap.Controller, still_spec: MachineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    from anyio import to_thread

    await q.define(still_spec)

    def code(words: list[str]) -> int:
        return main(["snapshot", "create", "still", *words])

    for words, why in (
        (("--quiesce", "require"), "is stopped"),
        (("--quiesce", "prefer", "--freeze-window", "100"), "at most 60"),
        (("--kind", "internal", "--max-pause", "5"), "need a full snapshot"),
        (("--kind", "internal", "--file", "vda=/x"), "creates no layers"),
        (("--no-memory",), "only internal snapshots"),
        (("--no-snapshot", "--degrade"), "--no-snapshot takes neither"),
    ):
        codes = [await to_thread.run_sync(code, [*words, *more]) for more in ((), ("--dry-run",))]
        run, look = capsys.readouterr().err.split("qmpsnap: ")[1:]
        assert codes[0] == codes[1] > 0
        assert run == look
        assert why in run
