"""Full disks: a guest that QEMU has paused for one says so and runs on later; a store without room loses nothing."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, OperationPending, StateError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base import free_space
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.live.machine import MIB, ONE_DISK, active_hash, context_of, fill, grown, hold_invariants, snapshot_hashes

HOLE = "dd if=/dev/urandom of=/dev/vdb bs=1M count=30 oflag=direct conv=fsync"


def mount(folder: Path, size: int) -> None:
    if os.geteuid():
        pytest.skip("mounting a small tmpfs needs root")
    folder.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True)


@pytest.fixture
def small(home: Path) -> Iterator[Path]:
    """The machines' folder on a file system of 24 MiB."""
    mount(home / "machines", 24 * MIB)
    yield home / "machines"
    subprocess.run(["umount", "--lazy", home / "machines"], check=True)


def occupy(folder: Path) -> Path:
    """A file that takes all that is free there."""
    file = folder / "filler"
    with file.open("ab") as more:
        more.write(bytes(shutil.disk_usage(folder).free))
    return file


async def test_a_guest_whose_disk_is_full_is_paused_and_says_so(
    small: Path, q: qmpsnap.Controller, guest_spec: MachineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    with pytest.raises(StateError, match="is not paused"):
        await vm.resume()
    (short,) = await vm.shortage()
    assert (short.kind, short.folder, short.disks) == (qmpsnap.ShortageKind.LOW, f"{small}/guest", ("vda", "vdb"))
    assert 0 < short.free < short.needed <= 128 * MIB
    assert f"MiB are free at {small}/guest, where the guest may write" in str(short)
    await vm.run(f"(sleep 0.3; {HOLE}) >/tmp/said 2>&1 </dev/null &")
    while await vm.state() == "running":
        await anyio.sleep(0.1)
    assert await vm.state() == "paused: no space"
    with pytest.raises(StateError, match=r"is not running \(paused: no space\)") as deaf:
        await vm.run("true")
    assert "qmpsnap resume guest" in as_typed(deaf.value.hint)
    with pytest.raises(StateError, match=r"paused: no space"):
        await vm.stop(timeout=60)
    with pytest.raises(StateError, match=r"is not running \(paused: no space\)"):
        await vm.pause()
    with pytest.raises(HostCannot, match="paused again at once") as still:
        await vm.resume()
    assert (still.value.exit_code, still.value.effect) == (9, "none")

    assert await _cli("list", "-o", "json", capsys=capsys) == ('"state": "paused: no space"', "")
    shown, said = await _cli("show", "guest", "-o", "json", capsys=capsys)
    assert shown == '"state": "paused: no space"'
    assert "warning: only 0 MiB are free" in said
    assert "hint: free some space for the disks' active layers, then qmpsnap resume guest" in said

    subprocess.run(["mount", "-o", f"remount,size={128 * MIB}", small], check=True)  # noqa: ASYNC221
    await vm.resume()
    assert await vm.state() == "running"
    done = await vm.run("while pidof dd >/dev/null; do sleep 0.1; done; tail -1 /tmp/said")
    assert "30+0 records out" in done.stdout  # nothing that the guest wrote was lost or refused
    await vm.pause()
    assert await vm.state() == "paused"
    with pytest.raises(StateError, match="is not running"):
        await vm.run("true")
    await vm.resume()
    await vm.snapshot("s")
    await hold_invariants(vm)
    await vm.stop(force=True)


async def test_a_machines_folder_on_another_disk_has_its_quarantine_there(
    small: Path, place: Path, q: qmpsnap.Controller
) -> None:
    vm = await grown(q, "s1")
    (stray := small / "still" / "stray").write_bytes(b"mine")
    (moved,) = (await vm.check(repair=True)).moved
    assert Path(moved.new).is_relative_to(small / ".quarantine" / "still")
    assert (Path(moved.new).read_bytes(), stray.exists()) == (b"mine", False)
    assert not (small.parent / "quarantine").exists(), "where it was tried in vain nothing is left"
    mount(place, 8 * MIB)  # where neither is
    try:
        await vm.snapshot("s2", files={"vda": place / "mine"})
        (part := place / "mine.qs-9.part").touch()
        done = await vm.check(repair=True)
        assert ([found.code for found in done.findings], part.exists()) == (["part-left"], True)
        assert "is on another file system" in done.failed[0]
        await vm.stop(force=True)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # noqa: ASYNC221


async def _cli(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The line with the state, and what was said beside it."""
    from anyio import to_thread

    capsys.readouterr()
    assert await to_thread.run_sync(main, words) == 0
    said: Any = capsys.readouterr()
    return next(line.strip(" ,") for line in said.out.splitlines() if '"state"' in line), said.err


# --- the store's own file system ------------------------------------------------------------------------------------


@pytest.fixture
def tight(home: Path) -> Iterator[Path]:
    """A store on a file system of 24 MiB, its images on another."""
    mount(home, 24 * MIB)
    mount(home / "machines", 64 * MIB)
    mount(home / "run", 8 * MIB)
    yield home
    for folder in (home / "run", home / "machines", home):
        subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_store_without_room_refuses_before_anything_begins(
    tight: Path, q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await grown(q, "s1")
    hashes = await snapshot_hashes(vm)
    filler = occupy(tight)
    for refused in (vm.snapshot("s2"), vm.snapshot("s2", kind="internal"), vm.revert("s1"), vm.stream("vda")):
        with pytest.raises(HostCannot, match=r"the store.* may need 262144 bytes, but only \d+ are free") as full:
            await refused
        assert (full.value.exit_code, full.value.effect) == (9, "none")
    monkeypatch.setattr(free_space, "require", lambda *_, **__: None)  # it was free a moment ago
    with pytest.raises(HostCannot, match="nothing was changed"):
        await _snapshots_without_end(vm)
    filler.unlink()
    await vm.recover()
    await hold_invariants(vm, hashes)
    await vm.stop(force=True)


async def _snapshots_without_end(vm: qmpsnap.MachineHandle) -> None:
    """As long as SQLite's log has pages of earlier changes to write over."""
    while True:
        await vm.snapshot()


async def test_a_store_that_fills_in_the_middle_holds_the_operation_at_its_job(
    tight: Path, q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await grown(q, "s1")
    hashes, settle = await snapshot_hashes(vm), SqliteStore.settle

    def full(self: SqliteStore, *arguments: Any, **named: Any) -> None:
        self._database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        occupy(tight)
        settle(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(SqliteStore, "settle", full)
        with pytest.raises(HostCannot, match="refused a change: database or disk is full") as middle:
            await vm.stream("vda")
    assert (middle.value.exit_code, middle.value.effect) == (9, "unknown")
    assert [(job.type, job.status) for job in await vm.jobs()] == [("stream", "concluded")]
    with pytest.raises((HostCannot, OperationPending)):
        await vm.recover()
    await fill(vm, "vda", 5, offset=9 * MIB)  # the guest runs on
    (tight / "filler").unlink()
    await vm.recover()
    assert (await vm.chains())[0].ids == ("vda-2",)
    await hold_invariants(vm, hashes)
    now = await active_hash(vm)
    await vm.snapshot("after")
    await hold_invariants(vm, hashes | {("after", "vda"): now})
    await vm.stop(force=True)


# --- all of it on one full disk --------------------------------------------------------------------------------------

READING = ("list", "show still", "tree still", "snapshot list still", "chain still", "log still", "check still")
WRITING = ("snapshot create still s2", "start still", "undefine still --remove-disks")


@pytest.fixture
def one_disk(home: Path) -> Iterator[Path]:
    """Everything on a file system of 8 MiB."""
    mount(home, 8 * MIB)
    yield home
    subprocess.run(["umount", "--lazy", home], check=True)


async def _said(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = await anyio.to_thread.run_sync(main, words.split())
    out, err = capsys.readouterr()
    return code, out, err


async def test_what_only_reads_works_while_the_disk_is_full_and_the_rest_says_where_to_make_room(
    one_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with qmpsnap.open() as q:
        await grown(q, "s1")
    filler = occupy(one_disk)  # nobody has the store open, and SQLite wants room to open it
    for words in READING:
        code, out, err = await _said(words, capsys)
        assert (code, "still" in out or "vda-1" in out or "s1" in out or "create" in out) == (0, True), (words, err)
    code, out, _ = await _said("doctor", capsys)
    assert code == 9
    assert "the disk is full; it can be read, 1 machine(s)\n" in out
    assert f"remedy: free some space in {one_disk}\n" in out
    assert await _said("resume still", capsys) == (0, "", "machine still is running\n")
    assert await _said("stop still --force", capsys) == (0, "", "machine still is stopped\n")
    for words in WRITING:
        code, out, err = await _said(words, capsys)
        assert (code, out) == (9, ""), words
        assert re.fullmatch(rf"qmpsnap: .*{one_disk}.*; nothing was changed\nhint: free some space .*\n", err), words
    assert '"state": "stopped"' in (await _said("list -o json", capsys))[1]
    filler.unlink()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (await vm.record()).process is None or not await vm.is_running()
        await vm.snapshot("s2")
        await hold_invariants(vm)


async def test_a_store_that_can_only_be_read_is_written_again_once_there_is_room(one_disk: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        await vm.stop(force=True)
    filler = occupy(one_disk)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        with pytest.raises(HostCannot, match="only 0 are free") as full:
            await vm.snapshot("s2")
        assert full.value.effect == "none"
        filler.unlink()
        async with qmpsnap.open() as other:
            await (await other.machine("still")).snapshot("s2")
        assert [found.name for found in await vm.snapshots()] == ["s1", "s2"], "what others have done since is seen"
        await vm.snapshot("s3")
        await hold_invariants(vm)


async def test_a_data_folder_that_is_mounted_read_only_says_so(
    one_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with qmpsnap.open() as q:
        await q.define(ONE_DISK)
    subprocess.run(["mount", "-o", "remount,ro", one_disk], check=True)  # noqa: ASYNC221
    assert (await _said("check still", capsys))[:2] == (0, "still: no finding(s)\n")
    for words in ("snapshot create still s1", "start still"):
        code, _, err = await _said(words, capsys)
        assert code == 9
        assert "mounted read-only" in err
        assert f"then mount {one_disk}" in err
    code, out, _ = await _said("doctor", capsys)
    assert (code, "its file system is mounted read-only" in out) == (9, True)
    subprocess.run(["mount", "-o", "remount,rw", one_disk], check=True)  # noqa: ASYNC221


async def test_a_guest_is_let_run_and_ended_while_the_data_folder_is_read_only(
    one_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [one_disk / "run", one_disk / "machines"]
    for folder in others:
        mount(folder, 4 * MIB)
    try:
        async with qmpsnap.open() as q:
            vm = await q.define(ONE_DISK)
            logs = context_of(vm).home.log_dir("still").parent
            logs.symlink_to(one_disk / "run")  # while files are open for writing nobody makes their disk read-only
            await vm.start(paused=True)
        subprocess.run(["mount", "-o", "remount,ro", one_disk], check=True)  # noqa: ASYNC221
        assert (await _said("resume still", capsys))[0] == 0
        assert (await _said("stop still --force", capsys))[0] == 0
    finally:
        subprocess.run(["mount", "-o", "remount,rw", one_disk], check=True)  # noqa: ASYNC221
        for folder in others:
            subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: ASYNC221


async def test_a_full_run_folder_is_told_of(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mount(home / "run", MIB)
    try:
        async with qmpsnap.open() as q:
            vm = await q.define(ONE_DISK)
            await vm.start(paused=True)
            await vm.stop(force=True)
        shutil.rmtree(home / "run" / "still")
        (home / "run" / "still").mkdir(mode=0o700)
        occupy(home / "run")
        code, _, err = await _said("start still", capsys)
        assert (code, "the disk is full; nothing was changed" in err) == (9, True), err
        assert f"hint: free some space in {home}/run/still\n" in err
        for words in ("snapshot create still s1", "check still --repair"):
            assert (await _said(words, capsys))[0] == 0  # neither needs it
    finally:
        subprocess.run(["umount", "--lazy", home / "run"], check=True)  # noqa: ASYNC221
