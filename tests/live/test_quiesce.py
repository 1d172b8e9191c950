"""A guest's file systems frozen for a snapshot: what is in it then, and that they are thawed whatever becomes of us."""

import hashlib
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.block.image import content
from qmpsnap.errors import DeadlinePassed, QmpError, StateError, UsageError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.session import quiesce
from tests.harness.deaths import Call, die_at, stopped_at
from tests.harness.processes import no_guards
from tests.live.booted import start_booted
from tests.live.machine import context_of, hold_invariants

MOUNT = "mkfs.ext4 -q -E lazy_itable_init=0 /dev/vda && mount -t ext4 /dev/vda /mnt && sync"
WRITE = "dd if=/dev/urandom of=/mnt/file bs=64k count=16 2>/dev/null; sha256sum /mnt/file | cut -c1-64"
LONG = 60.0
"""Seconds no test waits for."""


@pytest.fixture
async def vm(q: qmpsnap.Controller, guest_spec: MachineSpec) -> qmpsnap.MachineHandle:
    """The small guest with ext4 on its first disk, mounted."""
    handle = await q.define(guest_spec)
    await start_booted(handle)
    await handle.run(MOUNT)
    return handle


async def written(vm: qmpsnap.MachineHandle) -> str:
    """The guest writes a file and flushes nothing; the file's hash."""
    return (await vm.run(WRITE)).stdout.strip()


async def writes(vm: qmpsnap.MachineHandle) -> None:
    """Return once the guest writes to its file system again: its agent takes no program while it is frozen."""
    with anyio.fail_after(LONG):
        while True:
            try:
                await vm.run("echo more > /mnt/more && sync", timeout=5)
            except (QmpError, DeadlinePassed):
                await anyio.sleep(0.05)
            else:
                return


async def in_snapshot(vm: qmpsnap.MachineHandle, name: str, folder: Path) -> tuple[bool, str]:
    """Whether the file system in a snapshot is clean as it lies there, and its file's hash without its journal."""
    snapshot = next(found for found in await vm.snapshots() if found.name == name)
    point = snapshot.point("vda")
    assert point
    copy, file = folder / "copy", folder / "file"
    await content.copy_out(context_of(vm).store.layer(point.layer), copy, qemu_img=context_of(vm).image.binary)
    features = (await anyio.run_process(["debugfs", "-R", "features", copy])).stdout.decode()
    await anyio.run_process(["debugfs", "-R", f"dump /file {file}", copy])
    checked = await anyio.run_process(["e2fsck", "-fn", copy], check=False)
    clean = "needs_recovery" not in features and checked.returncode == 0
    return clean, hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


async def test_what_the_guest_has_not_flushed_is_in_the_snapshot(vm: qmpsnap.MachineHandle, tmp_path: Path) -> None:
    first = await written(vm)
    without = await vm.snapshot("without")
    with_it = await vm.snapshot("with", quiesce="require")
    assert (without.level, with_it.level, with_it.unquiesced) == ("crash", "fs", "")
    assert without.frozen_ms is None
    assert with_it.frozen_ms is not None
    assert with_it.pause_ms is not None
    assert with_it.frozen_ms > with_it.pause_ms  # which lies within it
    await writes(vm)
    clean, found = await in_snapshot(vm, "without", tmp_path)
    assert not clean
    assert found != first
    assert await in_snapshot(vm, "with", tmp_path) == (True, first)
    await hold_invariants(vm)


async def test_memory_that_was_frozen_is_thawed_where_it_is_loaded(vm: qmpsnap.MachineHandle, tmp_path: Path) -> None:
    first = await written(vm)
    full = await vm.snapshot("full", kind="full", quiesce="require")
    assert (full.level, full.vmstate is not None and full.vmstate.frozen) == ("ram", True)
    assert (await vm.snapshots())[-1].frozen_ms == full.frozen_ms is not None
    await writes(vm)
    assert await in_snapshot(vm, "full", tmp_path) == (True, first)
    with pytest.raises(StateError, match="can only be thawed in a running guest"):
        await vm.revert("full", state="paused")
    await vm.revert("full", after=False)
    await writes(vm)
    await hold_invariants(vm)


async def test_inside_the_images(vm: qmpsnap.MachineHandle) -> None:
    taken = await vm.snapshot("inside", kind="internal", memory=False, quiesce="require")
    assert taken.level == "fs"
    assert taken.frozen_ms is not None
    await writes(vm)
    with pytest.raises(UsageError, match="would stay frozen"):
        await vm.snapshot("more", kind="internal", quiesce="prefer")
    await hold_invariants(vm)


FROZEN = {
    "disk": Call("qmpsnap.machine.agent", "Agent.freeze", "after", 1),
    "full, frozen": Call("qmpsnap.machine.agent", "Agent.freeze", "after", 1),
    "full, held": Call("qmpsnap.ops.memory.save", "fixed", "after", 1),
}


@pytest.mark.parametrize("case", FROZEN)
async def test_killed_while_the_guest_is_frozen(vm: qmpsnap.MachineHandle, case: str) -> None:
    """No command of ours comes after it: the guest writes again because of the guard alone."""
    kind = case.partition(",")[0]
    await die_at(FROZEN[case], "snapshot", "create", "guest", "s", "--kind", kind, "--quiesce", "require")
    assert await vm.state() == "running"
    await writes(vm)
    await vm.recover()
    assert await vm.snapshots() == ()  # nobody can tell whether it would have been of frozen file systems
    await vm.snapshot("next", kind=kind, quiesce="require")  # type: ignore[call-overload]
    await writes(vm)
    await hold_invariants(vm)


async def test_stopped_while_the_guest_is_frozen(vm: qmpsnap.MachineHandle) -> None:
    words = ("snapshot", "create", "guest", "s", "--quiesce", "require", "--freeze-window", "0.5")
    async with stopped_at(FROZEN["disk"], *words) as process:
        await writes(vm)  # thawed by time
    assert process.returncode == 6
    await no_guards()
    assert await vm.snapshots() == ()
    await hold_invariants(vm)


async def test_a_guest_whose_agent_does_not_answer(
    vm: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiesce, "AGENT_DEADLINE", 0.3)
    await vm.run("(sleep 0.2; kill -STOP $(pidof qemu-ga)) >/dev/null 2>&1 </dev/null &")
    with anyio.fail_after(LONG):
        while True:  # until it is stopped
            try:
                await vm.run("true", timeout=1)
            except DeadlinePassed:
                break
    before = await vm.chains()
    with pytest.raises(DeadlinePassed, match="did not finish guest-sync") as caught:
        await vm.snapshot("s", quiesce="require")
    assert (caught.value.effect, await vm.chains()) == ("none", before)
    taken = await vm.snapshot("s", quiesce="prefer")
    assert taken.level == "crash"
    assert "did not finish guest-sync" in taken.unquiesced
    await hold_invariants(vm)


async def test_without_a_guest_that_runs(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    for state in ("stopped", "paused"):
        if state == "paused":
            await vm.start(paused=True)
        with pytest.raises(StateError, match=f"still is {state}: only a running guest") as caught:
            await vm.snapshot("s", quiesce="require")
        assert caught.value.effect == "none"
        taken = await vm.snapshot(quiesce="prefer")
        assert (taken.level, state in taken.unquiesced) == ("crash", True)
    with pytest.raises(UsageError, match="freeze window"):
        await vm.snapshot("s", quiesce="require", freeze_window=0)
    await hold_invariants(vm)


async def test_killed_while_a_merge_holds_the_guest(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)
    await vm.start()  # its firmware runs
    await vm.snapshot("one")
    # The first of these is the step before the guest is stopped, the second that it is.
    for point in (
        Call("qmpsnap.qmp.commands", "control", "after", 1),
        Call("qmpsnap.qmp.jobs", "finalize", "after", 1),
    ):
        await die_at(point, "stream", "still", "vda", "--progress", "none")
        assert await vm.state() == "running"
        await vm.wait()
        await hold_invariants(vm)
        await vm.snapshot()


async def test_a_trim(vm: qmpsnap.MachineHandle) -> None:
    found = {one.path: one for one in await vm.fstrim()}
    assert list(found) == ["/mnt"]
    assert found["/mnt"].trimmed is not None or found["/mnt"].error
