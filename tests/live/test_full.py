"""Full snapshots of a booted guest: memory and disks of one instant, saved behind its back or while it stands still."""

import errno
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import anyio
import msgspec
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed, HostCannot, StateError, StoreMismatch, UsageError
from qmpsnap.machine import statefile
from qmpsnap.model.layers.vmstate import Manifest
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base import free_space
from qmpsnap.ops.memory import save, strategy
from qmpsnap.ops.snapshot import plan
from qmpsnap.qmp import migration
from tests.live.booted import start_booted
from tests.live.machine import MIB, context_of, fill, hold_invariants, user_monitor

pytestmark = pytest.mark.version

COUNT = """
mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && test -b /dev/vda || exit 1
cat >/run/count <<'END'
i=0
while :; do
    i=$((i + 1))
    echo $i >>/mnt/log
    sync /mnt/log
    echo $i >/run/count.new
    mv /run/count.new /run/count.now
done
END
setsid sh /run/count >/dev/null 2>&1 </dev/null &
echo $! >/run/counter
"""
"""Counts for ever: in its memory, and on the disk with fsync before the next number."""


BLOCKS = """
test -b /dev/vda || exit 1
dd if=/dev/urandom of=/dev/shm/large bs=1M count=80 2>/dev/null
cat >/run/blocks <<'END'
i=0
while :; do
    i=$((i + 1))
    printf '%4095d\\n' $i | dd of=/dev/vda bs=4096 seek=$i conv=notrunc,fsync 2>/dev/null
    echo $i >/run/count.new
    mv /run/count.new /run/count.now
done
END
setsid sh /run/blocks >/dev/null 2>&1 </dev/null &
echo $! >/run/counter
"""
"""Counts for ever, each number to a block of its own: one that was lost is not written again with the next."""


async def booted(q: qmpsnap.Controller, spec: MachineSpec) -> qmpsnap.MachineHandle:
    vm = await q.define(spec)
    await start_booted(vm)
    await vm.run(COUNT)
    await counted(vm, 3)
    return vm


async def say(vm: qmpsnap.MachineHandle, command: str) -> str:
    return (await vm.run(command)).stdout.strip()


async def count(vm: qmpsnap.MachineHandle) -> int:
    return int(await say(vm, "cat /run/count.now 2>/dev/null || echo 0") or 0)


async def counted(vm: qmpsnap.MachineHandle, at_least: int) -> int:
    """The count, once it has come so far: the guest runs."""
    while (now := await count(vm)) < at_least:
        await anyio.sleep(0.02)
    return now


async def require_a_whole_disk(vm: qmpsnap.MachineHandle) -> None:
    """What the disk holds, not what the guest remembers of it: every number once, and a clean file system."""
    await vm.run("kill -9 -$(cat /run/counter); while kill -0 -$(cat /run/counter) 2>/dev/null; do usleep 1000; done")
    memory_says = await count(vm)
    await vm.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    numbers = [int(line) for line in (await say(vm, "cat /mnt/log")).split()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) - memory_says in (0, 1)
    await vm.run("umount /mnt && e2fsck -fn /dev/vda >/run/fsck 2>&1")


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.grid) for first in (5, 10, 15))])
async def test_memory_and_disk_are_of_one_instant(q: qmpsnap.Controller, guest_spec: MachineSpec, first: int) -> None:
    vm = await booted(q, guest_spec)
    for number in range(first, first + 5):
        name = f"round-{number}"
        snapshot = await vm.snapshot(name, kind="full")
        assert snapshot.vmstate is not None
        assert snapshot.vmstate.mode == "background"
        assert snapshot.pause_ms is not None
        assert await vm.state() == "running"
        await counted(vm, await count(vm) + 2)  # it has run on
        await vm.run("touch /dev/shm/later")
        await vm.revert(name, discard=True, after=False)
        assert await say(vm, "ls /dev/shm") == ""
        await counted(vm, await count(vm) + 2)  # it goes on where it was
        await require_a_whole_disk(vm)
        await vm.revert(name, discard=True, after=False)
        await counted(vm, 1)
        await hold_invariants(vm)
        await vm.delete_snapshots(name)
    assert [snapshot.name for snapshot in await vm.snapshots()] == []
    assert list(context_of(vm).home.machine_dir("guest").glob("*.vmstate*")) == []
    await hold_invariants(vm)


@pytest.mark.parametrize("verb", ["snapshot", "save"])
async def test_no_flushed_block_is_lost(q: qmpsnap.Controller, guest_spec: MachineSpec, verb: str) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run(BLOCKS)
    await counted(vm, 20)
    if verb == "save":
        await vm.save()
        await vm.restore()
    else:
        await vm.snapshot("all", kind="full")
        await vm.revert("all")
    last = await counted(vm, 21)
    await vm.run("kill -9 -$(cat /run/counter); sync; echo 3 >/proc/sys/vm/drop_caches")
    there = await say(vm, f"dd if=/dev/vda bs=4096 skip=1 count={last} 2>/dev/null | tr -d '\\000'")
    assert [int(number) for number in there.split()] == list(range(1, last + 1))


async def test_what_the_list_says_of_it(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    with pytest.raises(StateError, match="is stopped and has no memory"):
        await vm.snapshot("early", kind="full")
    await start_booted(vm)
    await vm.run("true")
    machine, planned = await vm.record(), (await vm.plan_snapshot("all", kind="full")).details
    assert planned.memory is not None
    commands = plan.qmp_commands(planned, machine)
    give = "getfd" if planned.memory.hardware.qemu_version.startswith("7.") else "add-fd"
    assert [name for name, _ in commands] == [*["blockdev-add"] * 2, give, "stop", "transaction", "migrate", "cont"]
    assert commands[-2][1] == migration.address(None if give == "getfd" else 0)  # a descriptor, never a command line
    assert (planned.memory.mode, planned.memory.why) == ("background", "")
    snapshot = await vm.snapshot("all", kind="full", description="with memory")
    assert (await vm.snapshots())[-1] == snapshot
    state = snapshot.vmstate
    assert state is not None
    assert (snapshot.kind, snapshot.mode, state.mode, state.layout) == ("full", "live", "background", "stream")
    stream = Path(state.path).read_bytes()[: state.bytes]
    assert hashlib.sha256(stream).hexdigest() == state.digest
    assert set(state.steps_ms) == {"stop", "transaction", "migrate", "tracking", "cont"}
    assert state.hardware.memory == guest_spec.memory
    assert state.hardware.machine_type.startswith("pc-q35-")
    found, manifest = statefile.find(state.path)
    assert (found, manifest.snapshot, manifest.operation) == (state, "all", snapshot.operation)
    await hold_invariants(vm)
    with pytest.raises(StateError, match="must include vdb"):
        await vm.snapshot("some", kind="full", disks=["vda"])


async def test_reverted_to_from_anywhere(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await booted(q, guest_spec)
    await vm.snapshot("disks")
    full = await vm.snapshot("all", kind="full", compression="zstd")
    assert full.vmstate is not None
    assert full.vmstate.compression == "zstd"
    assert full.vmstate.bytes < 64 * MIB
    await vm.run("touch /dev/shm/later")
    assert (await vm.revert("disks")).memory is False  # a fresh boot
    assert await count(vm) == 0
    await vm.stop(force=True)
    reverted = await vm.revert("all", state="paused")  # of a stopped machine
    assert (reverted.state, reverted.memory, reverted.notes) == ("paused", True, ())
    assert await vm.state() == "paused"
    async with user_monitor(vm) as qemu:
        await qemu.execute("cont")
    assert await say(vm, "ls /dev/shm") == ""
    await counted(vm, await count(vm) + 2)
    back = await vm.revert("all")  # while another state runs
    assert back.state == "running"
    assert back.kept is not None
    await counted(vm, 1)
    await require_a_whole_disk(vm)
    await hold_invariants(vm)


async def test_the_guest_is_told_the_time(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    await vm.run("date -s '2001-02-03 04:05:06'")
    await vm.snapshot("then", kind="full")
    await vm.revert("then", after=False)
    assert (await say(vm, "date +%Y")) == "2001"
    # The agent answers only when hwclock has ended, which says nothing of the clock.
    await vm.run(
        "printf '#!/bin/sh\\nsleep 6\\nexit 1\\n' >/run/slow; chmod +x /run/slow; ln -sf /run/slow /sbin/hwclock"
    )
    await vm.snapshot("slow", kind="full")
    for name in ("then", "slow"):
        back = await vm.revert(name)
        assert {note.partition(",")[0] for note in back.notes} <= {"the guest's clock was set"}
        assert back.clock_error_ms is not None
        assert abs(back.clock_error_ms) < 200
        assert int(await say(vm, "date +%Y")) >= 2026


async def test_a_pause_is_foreseen_by_those_before(still: qmpsnap.MachineHandle) -> None:
    """The store is told that they took longer than the little memory here does."""
    store = context_of(still).store

    async def take(name: str, pause_ms: float) -> None:
        taken = await still.snapshot(name, kind="full", max_pause_ms=300)
        await anyio.to_thread.run_sync(
            lambda: store.apply("still", Change(snapshots=(replace(taken, pause_ms=pause_ms),)))
        )

    await take("s1", 9000)
    await take("s2", 20)  # one outlier refuses nothing
    await take("s3", 1500)
    with pytest.raises(
        StateError, match=r"about 1500 ms .* last full snapshots: 9000, 20, 1500 ms\), but 300 ms are allowed"
    ):
        await still.snapshot("s4", kind="full", max_pause_ms=300)
    assert len(await still.snapshots()) == 3
    await still.snapshot("s4", kind="full")


async def test_a_longer_pause_than_agreed_is_told(
    still: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strategy, "BACKGROUND_MS", 0.0)
    monkeypatch.setattr(strategy, "BACKGROUND_MS_PER_GIB", 0.0)
    words = ["snapshot", "create", "still", "quick", "--kind", "full", "--max-pause", "0.01", "-o", "json"]
    code = await anyio.to_thread.run_sync(main, words)
    said = capsys.readouterr()
    if await survives_failure(still):
        assert (code, await still.snapshots()) == (6, ())
        return
    assert code == 0
    assert json.loads(said.out)["snapshot"]["pause_exceeded"] is True
    assert "above the 0.01 ms of --max-pause; the snapshot is kept" in said.err
    assert await anyio.to_thread.run_sync(main, ["snapshot", "show", "still", "quick"]) == 0
    assert "above the limit of 0.01 ms" in capsys.readouterr().out


async def test_a_guest_without_an_agent_is_not_waited_for(
    still: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its firmware never opens the port: QEMU knows, and nobody connects to wait for an answer."""

    def connect(*_: object, **__: object) -> NoReturn:
        pytest.fail("connected to an agent that is not there")

    await still.snapshot("then", kind="full")
    monkeypatch.setattr("qmpsnap.machine.agent.connect", connect)
    back = await still.revert("then")
    assert back.notes == ("the guest's clock was not set: no guest agent runs",)


# --- save and restore -------------------------------------------------------------------------------------------------


async def test_saved_started_afresh_and_restored(
    q: qmpsnap.Controller, guest_spec: MachineSpec, tmp_path: Path
) -> None:
    vm = await booted(q, guest_spec)
    before = await count(vm)
    saved = await vm.save(tmp_path / "evening.vmstate")
    assert (saved.name, saved.kind) == ("saved-1", "full")
    assert await vm.state() == "stopped"
    await hold_invariants(vm)

    await vm.start()
    assert await count(vm) == 0  # a fresh boot, without the process
    await vm.run("mkdir -p /mnt && mount /dev/vda /mnt && echo afresh >/mnt/afresh && sync")

    restored = await vm.restore()
    assert (restored.state, restored.memory) == ("running", True)
    assert restored.kept is not None  # what the fresh boot has written
    assert await counted(vm, before + 1) > before
    assert await say(vm, "ls /mnt/afresh 2>/dev/null || echo none") == "none"
    await require_a_whole_disk(vm)
    await hold_invariants(vm)

    moved = tmp_path / "moved"
    (tmp_path / "evening.vmstate").rename(moved)
    with pytest.raises(HostCannot, match=r"evening\.vmstate"):
        await vm.restore()
    await vm.restore(moved, discard=True)
    await counted(vm, before + 1)


async def test_a_paused_guest_is_saved_too(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await booted(q, guest_spec)
    async with user_monitor(vm) as qemu:
        await qemu.execute("stop")
    version = (await vm.record()).process
    assert version is not None
    if version.qemu_version.startswith("7."):
        with pytest.raises(StateError, match="would resume it"):
            await vm.snapshot("all", kind="full")
    else:
        await vm.snapshot("all", kind="full")
        assert await vm.state() == "paused"
        await hold_invariants(vm)
    await vm.save(name="asleep")
    await vm.restore()
    await counted(vm, 1)


# --- what is refused before any QEMU is started or ended --------------------------------------------------------------


def flipped(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_and_sealed(path: Path) -> None:
    """100 bytes are missing from the middle of the stream; the manifest is whole."""
    content = path.read_bytes()
    path.write_bytes(content[:4096] + content[4196:])


def manifest_changed(path: Path) -> None:
    content = path.read_bytes()
    place = content.rindex(b'"memory":')
    path.write_bytes(content[:place] + b'"mEmory":' + content[place + 9 :])


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture
async def small(q: qmpsnap.Controller, still_spec: MachineSpec) -> qmpsnap.MachineHandle:
    """A machine under -S with a full snapshot ``all``; its guest is firmware that waits, which is as good here."""
    vm = await q.define(replace(still_spec, name="small"))
    await vm.start()
    await vm.snapshot("all", kind="full")
    return vm


@pytest.mark.parametrize(
    "spoil", [flipped, cut, cut_and_sealed, manifest_changed, emptied, a_folder], ids=lambda f: f.__name__
)
async def test_a_spoiled_file_is_never_loaded(small: qmpsnap.MachineHandle, spoil: Callable[[Path], None]) -> None:
    state = (await small.snapshots())[-1].vmstate
    assert state is not None
    spoil(Path(state.path))
    process = (await small.record()).process
    with pytest.raises(StoreMismatch):
        await small.revert("all")
    with pytest.raises(StoreMismatch):
        await small.restore(state.path)
    assert (await small.record()).process == process  # the guest that runs has noticed nothing
    assert await small.state() == "running"
    assert len(await small.snapshots()) == 1


async def test_another_file_in_its_place_is_noticed(small: qmpsnap.MachineHandle) -> None:
    state = (await small.snapshots())[-1].vmstate
    assert state is not None
    shutil.copy(state.path, f"{state.path}.copy")
    Path(f"{state.path}.copy").rename(state.path)
    with pytest.raises(StoreMismatch, match="not the recorded file"):
        await small.revert("all")
    await small.restore(state.path)  # named by its owner, and its content is what was recorded


async def test_another_machines_file_is_refused(
    q: qmpsnap.Controller, small: qmpsnap.MachineHandle, still_spec: MachineSpec
) -> None:
    other = await q.define(replace(still_spec, name="other"))
    state = (await small.snapshots())[-1].vmstate
    assert state is not None
    with pytest.raises(StateError, match="memory of another machine"):
        await other.restore(state.path)
    assert await other.state() == "stopped"


async def test_a_file_of_a_snapshot_that_is_gone_is_refused(small: qmpsnap.MachineHandle, tmp_path: Path) -> None:
    state = (await small.snapshots())[-1].vmstate
    assert state is not None
    shutil.copy(state.path, tmp_path / "stale")
    await small.delete_snapshots("all")
    assert not Path(state.path).exists()
    with pytest.raises(StateError, match="no longer has"):
        await small.restore(tmp_path / "stale")
    with pytest.raises(StoreMismatch, match="not a state file"):
        await small.restore(context_of(small).home.store)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: replace(spec, memory=128 * MIB), "memory 67108864, now 134217728"),
        (lambda spec: replace(spec, cpus=2), "vCPUs 1, now 2"),
        (lambda spec: replace(spec, cpu="qemu64"), " properties, now qemu64"),
        (lambda spec: replace(spec, machine="pc-i440fx-7.2"), "machine type"),
        (lambda spec: replace(spec, agent=False), 'device "agent\'s port", now missing'),
        (lambda spec: replace(spec, disks=spec.disks[::-1]), "devices in another order"),
        (
            lambda spec: replace(spec, disks=(replace(spec.disks[0], bus="nvme"), spec.disks[1])),
            "no device 'disk vda on nvme', now present",
        ),
    ],
)
async def test_other_hardware_is_refused(
    small: qmpsnap.MachineHandle, change: Callable[[MachineSpec], MachineSpec], said: str
) -> None:
    record = await small.record()
    text = msgspec.json.encode(change(record.spec)).decode()
    store: Any = context_of(small).store
    store._database.connection.execute("UPDATE machine SET spec = ? WHERE name = 'small'", (text,))
    with pytest.raises(StateError) as refused:
        await small.revert("all")
    assert said in refused.value.message
    assert (await small.record()).process == record.process


# --- the ladder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_userfaultfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """QEMU as an ordinary user has it: no right to userfaultfd's write protection."""
    if os.geteuid() != 0:
        pytest.skip("taking the right away from QEMU needs root")
    real = shutil.which(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64")
    wrapper = tmp_path / "qemu-system-x86_64"
    wrapper.write_text(
        "#!/bin/sh\n"
        "exec unshare -m sh -c 'test ! -e /dev/userfaultfd || mount --bind /dev/null /dev/userfaultfd || exit 1\n"
        'exec setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace -- "$@"\' sh '
        f'{real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("QMPSNAP_QEMU", str(wrapper))


async def test_without_the_right_the_guest_stands_still(
    without_userfaultfd: None, home: Path, guest_spec: MachineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    async with qmpsnap.open() as q:
        vm = await booted(q, guest_spec)
        planned = (await vm.plan_snapshot("all", kind="full")).details.memory
        assert planned is not None
        assert planned.mode == "stopped"
        assert "not supported by host kernel" in planned.why
        with pytest.raises(StateError, match="has to be paused"):
            await vm.snapshot("quick", kind="full", max_pause_ms=20)
        assert await vm.snapshots() == ()

        snapshot = await vm.snapshot("all", kind="full")
        assert snapshot.vmstate is not None
        assert snapshot.vmstate.mode == "stopped"
        version = (await vm.record()).process
        assert version is not None
        assert snapshot.vmstate.layout == ("stream" if version.qemu_version.startswith("7.") else "mapped-ram")
        assert snapshot.pause_ms is not None
        await counted(vm, await count(vm) + 2)
        await hold_invariants(vm)
        await vm.revert("all")
        await counted(vm, 1)
        await require_a_whole_disk(vm)
        await hold_invariants(vm)
    await anyio.to_thread.run_sync(main, ["doctor"])
    told = capsys.readouterr().out
    assert "limited background-snapshot" in told
    assert "sysctl vm.unprivileged_userfaultfd=1" in told.partition("background-snapshot")[2]


async def test_a_device_that_cannot_be_saved_is_named(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    peer = ("-object", "memory-backend-ram,id=shared,size=1M,share=on", "-device", "ivshmem-plain,memdev=shared")
    vm = await q.define(replace(still_spec, disks=still_spec.disks[:1], extra=peer), allow_extra=True)
    await vm.start()
    for attempt in (
        vm.plan_snapshot("all", kind="full"),
        vm.snapshot("all", kind="full"),
        vm.save(),
        vm.plan_snapshot("all", kind="internal"),
        vm.snapshot("all", kind="internal"),
    ):
        with pytest.raises(StateError, match="device 'ivshmem'; nothing was changed") as refused:
            await attempt
        assert "qmpsnap snapshot create" in as_typed(refused.value.hint)
    await vm.snapshot("disk")
    await vm.snapshot("inside", kind="internal", memory=False)
    assert await vm.state() == "running"
    await hold_invariants(vm)


@pytest.mark.parametrize("pause", [0, -5, math.nan, math.inf])
async def test_a_pause_that_is_none(small: qmpsnap.MachineHandle, pause: float) -> None:
    with pytest.raises(UsageError, match="the pause limit cannot be"):
        await small.snapshot("quick", kind="full", max_pause_ms=pause)


async def test_a_pause_that_gets_too_long_is_given_up(
    q: qmpsnap.Controller, guest_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await booted(q, guest_spec)
    with pytest.raises(StateError, match="1 ms are allowed"):
        await vm.snapshot("quick", kind="full", max_pause_ms=1)

    async def never(*_: Any) -> migration.Migration:
        await anyio.sleep_forever()
        raise AssertionError

    chain = (await vm.chains())[0].ids
    if await survives_failure(vm):
        monkeypatch.setattr(save, "fixed", never)
        with pytest.raises(DeadlinePassed, match="took longer than 500 ms") as given_up:
            await vm.snapshot("slow", kind="full", max_pause_ms=500)
        monkeypatch.undo()
        assert given_up.value.effect == "none"
        assert await vm.snapshots() == ()
        assert (await vm.chains())[0].ids == chain  # merged back: no trace
        await counted(vm, await count(vm) + 2)
        await hold_invariants(vm)
    await vm.snapshot("now", kind="full", max_pause_ms=5000)
    await hold_invariants(vm)


# --- what fails in the middle -----------------------------------------------------------------------------------------


@pytest.fixture
def little_space(home: Path) -> Iterator[None]:
    """The machines' folder has room for images, and not for a guest's memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    machines = home / "machines"
    machines.mkdir(mode=0o700, parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", machines], check=True)
    yield
    subprocess.run(["umount", "--lazy", machines], check=True)


async def test_no_space_is_known_before_anything_is_done(
    little_space: None, q: qmpsnap.Controller, guest_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await booted(q, guest_spec)
    chain = (await vm.chains())[0].ids
    with pytest.raises(HostCannot, match=r"the guest's memory .*may need .*; nothing was changed"):
        await vm.snapshot("all", kind="full")
    with pytest.raises(HostCannot, match=r"the guest's memory .*may need .*; nothing was changed"):
        await vm.plan_snapshot("all", kind="full")
    monkeypatch.setattr(free_space, "require", lambda *_, **__: None)  # it was free a moment ago
    with pytest.raises(HostCannot, match="No space left"):
        await vm.snapshot("all", kind="full")
    assert await vm.snapshots() == ()
    assert (await vm.chains())[0].ids == chain
    await counted(vm, await count(vm) + 2)
    await hold_invariants(vm)


@pytest.fixture
def no_space(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """QEMU runs out of space while it writes the memory, as on a file system that does not keep what it promised."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", small], check=True)

    def elsewhere(path: str) -> int:
        Path(path).touch(0o600)
        return os.open(small / Path(path).name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    monkeypatch.setattr(statefile, "create", elsewhere)
    monkeypatch.setattr(statefile, "reserve", lambda *_: None)
    yield
    subprocess.run(["umount", "--lazy", small], check=True)


async def survives_failure(vm: qmpsnap.MachineHandle) -> bool:
    process = (await vm.record()).process
    assert process is not None
    return tuple(map(int, process.qemu_version.split("."))) >= strategy.CANCELLABLE_SINCE


async def test_no_space_for_the_memory_leaves_no_trace(
    no_space: None, q: qmpsnap.Controller, guest_spec: MachineSpec
) -> None:
    vm = await booted(q, guest_spec)
    chain = (await vm.chains())[0].ids
    if await survives_failure(vm):
        with pytest.raises(HostCannot) as failed:
            await vm.snapshot("all", kind="full")
        assert failed.value.effect == "none"
        assert await vm.snapshots() == ()
        assert (await vm.chains())[0].ids == chain
        await counted(vm, await count(vm) + 2)
    with pytest.raises(HostCannot):
        await vm.save()
    assert await vm.state() == "running"
    await counted(vm, await count(vm) + 2)
    assert (await vm.chains())[0].ids == chain
    await hold_invariants(vm)
    await require_a_whole_disk(vm)


async def test_no_space_for_the_memory_leaves_the_disks_if_asked(
    no_space: None, q: qmpsnap.Controller, guest_spec: MachineSpec
) -> None:
    vm = await booted(q, guest_spec)
    if not await survives_failure(vm):
        return  # the room is promised there before anything is done, as the tests above say
    snapshot = await vm.snapshot("all", kind="full", degrade=True)
    assert (snapshot.kind, snapshot.vmstate) == ("disk", None)
    assert await vm.snapshots() == (snapshot,)
    await counted(vm, await count(vm) + 2)
    await hold_invariants(vm)


async def test_a_cancelled_scope_leaves_no_trace(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await booted(q, guest_spec)
    chain = (await vm.chains())[0].ids
    with anyio.CancelScope() as scope:
        await vm.snapshot("all", kind="full", report=lambda _: scope.cancel())
    assert scope.cancelled_caught
    assert await vm.snapshots() == ()
    assert (await vm.chains())[0].ids[:-1] == chain  # a layer without a name: what the guest wrote meanwhile
    await counted(vm, await count(vm) + 2)
    await hold_invariants(vm)
    await vm.snapshot("all", kind="full")
    await hold_invariants(vm)


# --- a file that cannot be had; none of these needs a guest -----------------------------------------------------------


@pytest.fixture
async def still(q: qmpsnap.Controller, still_spec: MachineSpec) -> qmpsnap.MachineHandle:
    """A machine whose firmware runs and waits."""
    vm = await q.define(still_spec)
    await vm.start()
    return vm


async def require_untouched(vm: qmpsnap.MachineHandle, chain: tuple[str, ...]) -> None:
    """The guest runs, nothing is left to be ended, and there is no trace of a save."""
    assert await vm.state() == "running"
    assert await vm.recover() == []
    assert await vm.snapshots() == ()
    assert (await vm.chains())[0].ids == chain
    assert list(context_of(vm).home.machine_dir(vm.name).glob("*.vmstate*")) == []
    await hold_invariants(vm)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
async def test_saved_only_where_nothing_is(still: qmpsnap.MachineHandle, tmp_path: Path, kind: str) -> None:
    chain = (await still.chains())[0].ids
    taken = tmp_path / "taken"
    if kind == "folder":
        taken.mkdir()
    elif kind == "file":
        taken.touch()
    else:
        taken.symlink_to("nowhere")
    with pytest.raises(StateError, match="taken exists already; nothing was changed"):
        await still.save(taken)
    assert list(tmp_path.iterdir()) == [taken]
    await require_untouched(still, chain)


@pytest.mark.parametrize("verb", ["snapshot", "save"])
@pytest.mark.parametrize("failing", ["taken meanwhile", "no room"])
async def test_a_state_that_cannot_be_finished_is_given_up(
    still: qmpsnap.MachineHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, verb: str
) -> None:
    chain = (await still.chains())[0].ids
    theirs = []
    real = statefile.finish

    def fails(written: str, path: str, manifest: Manifest, *digest: Any) -> Any:
        if failing == "taken meanwhile":
            Path(path).write_text("mine")
            theirs.append(Path(path))
            return real(written, path, manifest, *digest)
        raise HostCannot(failing)

    monkeypatch.setattr(statefile, "finish", fails)
    with pytest.raises(StateError if failing == "taken meanwhile" else HostCannot) as failed:
        await (still.save(tmp_path / "state") if verb == "save" else still.snapshot("all", kind="full"))
    monkeypatch.undo()
    assert failed.value.effect == "none"
    for file in theirs:
        assert file.read_text() == "mine"
        file.unlink()
    assert list(tmp_path.iterdir()) == []
    await require_untouched(still, chain)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_cancelled_save_lets_the_guest_run(
    still: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real = save.finish
    with anyio.CancelScope() as scope:

        async def cancelled(*arguments: Any, **more: Any) -> Any:
            state = await real(*arguments, **more) if when == "after" else None
            scope.cancel()
            await anyio.lowlevel.checkpoint()
            return state

        monkeypatch.setattr(save, "finish", cancelled)
        await still.save()
    assert scope.cancelled_caught
    assert await still.state() == "running"
    assert await still.recover() == []
    assert await still.snapshots() == ()
    assert list(context_of(still).home.machine_dir("still").glob("*.vmstate*")) == []
    monkeypatch.undo()
    await still.save()
    assert await still.state() == "stopped"


async def test_somebody_elses_migration_is_left_alone(still: qmpsnap.MachineHandle, tmp_path: Path) -> None:
    chain = (await still.chains())[0].ids
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        async with user_monitor(still) as qemu:
            await qemu.execute("migrate-set-parameters", {"max-bandwidth": 4096})
            await qemu.execute("migrate", {"uri": f"unix:{path}"})
        with pytest.raises(StateError, match="another migration"):
            await still.snapshot("all", kind="full")
        with pytest.raises(StateError, match="another migration"):
            await still.save()
        async with user_monitor(still) as qemu:
            found: Any = await qemu.execute("query-migrate")
            assert found["status"] in ("setup", "active")
            await qemu.execute("migrate_cancel")
            while (await qemu.execute("query-migrate"))["status"] != "cancelled":  # type: ignore[index]
                await anyio.sleep(0.01)
    await require_untouched(still, chain)
    await still.snapshot("all", kind="full")


@pytest.mark.parametrize("verb", ["delete", "undefine"])
async def test_a_file_in_a_states_place_is_left_alone(
    q: qmpsnap.Controller, still: qmpsnap.MachineHandle, tmp_path: Path, verb: str
) -> None:
    state = (await still.snapshot("all", kind="full")).vmstate
    assert state is not None
    file = Path(state.path)
    file.rename(tmp_path / "moved")
    file.write_text("mine")
    if verb == "delete":
        await still.delete_snapshots("all")
        assert await still.snapshots() == ()
        assert await still.recover() == []
    else:
        await still.stop(force=True)
        assert str(file) not in await still.undefine(disks="remove")
        assert await q.machines() == ()
    assert file.read_text() == "mine"


async def test_the_state_goes_with_the_name_alone(still: qmpsnap.MachineHandle) -> None:
    snapshot = await still.snapshot("all", kind="full")
    assert snapshot.vmstate is not None
    await still.delete_snapshots("all", metadata=True)
    assert not Path(snapshot.vmstate.path).exists()
    await hold_invariants(still)


async def test_a_qemu_that_was_found_again_is_asked_what_it_is(still: qmpsnap.MachineHandle) -> None:
    record = await still.record()
    assert record.process is not None
    lost = replace(record.process, qemu_version="", accel="auto")
    context_of(still).store.set_process(still.name, lost)
    snapshot = await still.snapshot("all", kind="full")
    assert snapshot.vmstate is not None
    hardware = snapshot.vmstate.hardware
    assert (hardware.qemu_version, hardware.accel) == (record.process.qemu_version, record.process.accel)


async def test_a_paused_guest_is_not_left_unable_to_write(
    still: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_right(*_: Any, **__: Any) -> str:
        return "no right"

    monkeypatch.setattr(strategy, "_why_not_behind_it", no_right)
    async with user_monitor(still) as qemu:
        await qemu.execute("stop")
    with pytest.raises(StateError, match="is paused"):
        await still.snapshot("all", kind="full")
    assert await still.state() == "paused"
    await fill(still, "vda", 1)


@pytest.mark.parametrize("state", ["prelaunch", "paused"])
async def test_a_paused_guest_whose_save_fails_is_as_it_was(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=state == "prelaunch")
    if state == "paused":
        async with user_monitor(vm) as qemu:
            await qemu.execute("stop")
    assert await vm.state() == state
    chain = (await vm.chains())[0].ids
    if state == "prelaunch":  # QEMU would abort
        with pytest.raises(StateError, match="machine still is prelaunch"):
            await vm.snapshot("all", kind="full")

    def fails(*_: Any) -> None:
        raise HostCannot("no room")

    monkeypatch.setattr(statefile, "finish", fails)
    with pytest.raises(HostCannot, match="no room") as failed:
        await vm.save()
    monkeypatch.undo()
    background = state == "paused" and await survives_failure(vm)
    assert ("ran for an instant" in failed.value.message) is not background
    assert failed.value.effect == "none"
    assert await vm.state() == "paused"
    assert (await vm.chains())[0].ids == chain
    await fill(vm, "vda", 1)  # QEMU would abort, had it not its disks back
    await hold_invariants(vm)
    await vm.snapshot("disks")
    await vm.save()
    await vm.restore(paused=True)
    assert await vm.state() == "paused"
    await hold_invariants(vm)


async def test_saved_where_there_are_no_hard_links(
    still: qmpsnap.MachineHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuses)
    await still.save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    assert (await still.restore(tmp_path / "state")).state == "running"
    await hold_invariants(still)
