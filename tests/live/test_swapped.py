"""Another file in the place of one of ours, between our look at it and the act: refused, and it stays as it was."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.block.image import staged as places
from qmpsnap.errors import HostCannot, QmpsnapError, StoreMismatch
from qmpsnap.machine import statefile, worker
from qmpsnap.machine.starting import privileges
from qmpsnap.machine.starting.logs import QEMU_LOG
from qmpsnap.machine.starting.run_files import CONSOLE_LOG, PID_FILE
from qmpsnap.ops.lifecycle import power
from qmpsnap.ops.merge import job
from qmpsnap.ops.revert import cutover
from qmpsnap.qmp import commands
from tests.live.machine import (
    MIB,
    ONE_DISK,
    context_of,
    fill,
    grown,
    grown_and_stopped,
    hold_invariants,
    snapshot_hashes,
)

Put = Callable[[Path, Path], object]

WAYS: dict[str, Put] = {
    "symlink": lambda victim, at: at.symlink_to(victim),
    "hard link": lambda victim, at: at.hardlink_to(victim),
    "another inode": lambda victim, at: victim.rename(at),
}


def make(path: Path) -> None:
    """An image as large as the machine's disk."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(16 * MIB)], check=True)


class Victim:
    """A file of somebody else's; a qcow2 image that QEMU would gladly open, as large as the machine's disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make(path)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", path], check=True, capture_output=True)
        self._bytes, self._status = path.read_bytes(), path.stat()

    @contextmanager
    def instead_of(self, path: Path, way: str) -> Iterator[None]:
        """Have it at ``path`` for the block; what was there comes back."""
        away = path.with_name(f"{path.name}.away")
        if path.exists():
            path.rename(away)
        WAYS[way](self.path, path)
        try:
            yield
        finally:
            self.is_untouched(path if way == "another inode" else self.path)
            if way == "another inode":
                path.rename(self.path)
            else:
                path.unlink()
            if away.exists():
                away.rename(path)

    def is_untouched(self, at: Path | None = None) -> None:
        found = (at or self.path).stat()
        assert (at or self.path).read_bytes() == self._bytes
        same = ("st_ino", "st_size", "st_mtime_ns", "st_mode", "st_uid")
        assert [getattr(found, name) for name in same] == [getattr(self._status, name) for name in same]


@pytest.fixture
def victim(place: Path) -> Victim:
    return Victim(place / "victim.qcow2")


class Swap:
    """Puts the victim somewhere right before, or after, the next call of a function of the real code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, victim: Victim) -> None:
        self._monkeypatch, self._victim = monkeypatch, victim
        self._open: Any = None

    def __call__(self, owner: Any, name: str, path: Path, way: str, *, when: str = "before") -> None:
        real = getattr(owner, name)

        def put() -> None:
            self._monkeypatch.setattr(owner, name, real)
            self._open = self._victim.instead_of(path, way)
            self._open.__enter__()

        async def swapping(*arguments: Any, **options: Any) -> Any:
            if when == "before":
                put()
            result = await real(*arguments, **options)
            if when == "after":
                put()
            return result

        self._monkeypatch.setattr(owner, name, swapping)

    def put_back(self) -> None:
        assert self._open is not None, "it never came to that"
        self._open.__exit__(None, None, None)
        self._open = None


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch, victim: Victim) -> Swap:
    return Swap(monkeypatch, victim)


def next_layer(vm: qmpsnap.MachineHandle) -> Path:
    context = context_of(vm)
    return context.home.machine_dir(vm.name) / f"vda-{context.store.next_serial()}.qcow2"


async def test_a_new_overlay_before_qemu_opens_it(q: qmpsnap.Controller, swap: Swap) -> None:
    vm = await grown(q, "s1")
    hashes = await snapshot_hashes(vm)
    for way in WAYS:
        swap(commands, "blockdev_add", next_layer(vm), way)
        with pytest.raises(StoreMismatch, match="replaced by another file"):
            await vm.snapshot("s")
        swap.put_back()
        await vm.recover()
        await hold_invariants(vm, hashes)
    await vm.snapshot("s")
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("kind", ["disk", "internal"])
async def test_the_layers_below_a_snapshot(q: qmpsnap.Controller, state: str, kind: Any) -> None:
    """A copy, a link and a file of the very same bytes are other files; and nothing has been begun then."""
    vm, hashes, _ = await grown_and_stopped(q)
    if state == "running":
        await vm.start(paused=True)
    context, memory = context_of(vm), False if kind == "internal" else None
    before = context.store.operations(vm.name)
    layers = [Path(at.layer.path) for at in (await vm.chains())[0].layers]
    for path in (layers[-1], layers[0]):
        away = path.rename(path.with_name("away"))
        for put in (shutil.copyfile, lambda old, at: at.symlink_to(old), None):
            if put:
                put(away, path)
            with pytest.raises(
                StoreMismatch, match=rf"{path.name} (is not the recorded file|cannot be read|does not exist)"
            ) as refused:
                await vm.snapshot("s", kind=kind, memory=memory)
            assert (refused.value.effect, refused.value.exit_code) == ("none", 7)
            path.unlink(missing_ok=True)
        away.rename(path)
    assert context.store.operations(vm.name) == before
    await vm.snapshot("s", kind=kind, memory=memory)
    await hold_invariants(vm, hashes)


async def test_a_new_overlay_of_a_stopped_revert(q: qmpsnap.Controller, swap: Swap) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    for way in WAYS:
        swap(cutover, "require_ended", next_layer(vm), way)
        with pytest.raises(StoreMismatch, match="is not a new, empty image"):
            await vm.revert("s1")
        swap.put_back()
        await vm.recover()
        await hold_invariants(vm, hashes)


async def test_a_chosen_place_before_qemu_opens_it(q: qmpsnap.Controller, place: Path, swap: Swap) -> None:
    vm = await grown(q, "s1")
    hashes = await snapshot_hashes(vm)
    for way in WAYS:
        swap(places, "claim", place / "chosen", way, when="after")
        with pytest.raises(StoreMismatch, match="replaced by another file"):
            await vm.snapshot("s", files={"vda": place / "chosen"})
        swap.put_back()
        (place / "chosen").unlink(missing_ok=True)
        await hold_invariants(vm, hashes)


async def test_the_base_of_a_commit(q: qmpsnap.Controller, swap: Swap, victim: Victim) -> None:
    """Whether the worker is not started any more, or has it open already: it is never asked to write."""
    vm, hashes, _ = await grown_and_stopped(q)
    base = Path((await vm.chains())[0].layers[0].layer.path)
    for way in WAYS:
        with victim.instead_of(base, way), pytest.raises(StoreMismatch, match="not the recorded file"):
            await vm.commit("vda", consume=True)
        await hold_invariants(vm, hashes)
        swap(worker, "launch", base, way)
        with pytest.raises(StoreMismatch, match="replaced by another file"):
            await vm.commit("vda", consume=True)
        swap.put_back()
        await hold_invariants(vm, hashes)


async def test_the_base_of_a_start(q: qmpsnap.Controller, swap: Swap) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    layers = [Path(at.layer.path) for at in (await vm.chains())[0].layers]
    for path, way in zip(layers, WAYS, strict=True):
        swap(power, "launch", path, way)
        with pytest.raises(QmpsnapError):
            await vm.start(paused=True)
        swap.put_back()
        assert not await vm.is_running()
        await hold_invariants(vm, hashes)


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_the_target_of_a_mirror(q: qmpsnap.Controller, place: Path, swap: Swap, state: str) -> None:
    vm = await grown(q, "s1")
    hashes = await snapshot_hashes(vm)
    if state == "stopped":
        await vm.stop(force=True)
    for way in WAYS:
        swap(commands, "blockdev_add", place / "copy", way)
        with pytest.raises(StoreMismatch, match="replaced by another file") as refused:
            await vm.mirror("vda", place / "copy", mode="finish")
        assert refused.value.effect == "none"
        swap.put_back()
        (place / "copy").unlink(missing_ok=True)
        await hold_invariants(vm, hashes)


async def test_an_image_to_be_overwritten(q: qmpsnap.Controller, place: Path, swap: Swap) -> None:
    vm = await grown(q, "s1")
    make(place / "mine")
    for way in WAYS:
        swap(commands, "blockdev_add", place / "mine", way)
        with pytest.raises(StoreMismatch, match="replaced by another file"):
            await vm.mirror("vda", place / "mine", mode="pivot", reuse=True)
        swap.put_back()
    await hold_invariants(vm)


async def test_layers_that_are_to_go(q: qmpsnap.Controller, swap: Swap) -> None:
    """A delete and a revert with ``discard``: neither removes what has come to lie there."""
    vm, _, _ = await grown_and_stopped(q)
    gone = Path((await vm.chains())[0].active.path)  # its few bytes move into the layer below
    swap(job, "remove_files", gone, "another inode")
    with pytest.raises(StoreMismatch, match="not the recorded image"):
        await vm.delete_snapshots("s2")
    swap.put_back()
    await vm.recover()
    active = Path((await vm.chains())[0].active.path)
    swap(cutover, "remove_files", active, "another inode")
    with pytest.raises(StoreMismatch, match="not the recorded image"):
        await vm.revert("s1", discard=True)
    swap.put_back()
    await vm.recover()
    await hold_invariants(vm)


async def test_a_state_file(q: qmpsnap.Controller, victim: Victim) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    saved = await vm.save()
    assert saved.vmstate is not None
    path = Path(saved.vmstate.path)
    shutil.copyfile(path, path.with_name("copy"))
    for way in WAYS:
        with victim.instead_of(path, way):
            with pytest.raises(QmpsnapError) as refused:
                await vm.restore()
            assert refused.value.effect == "none"
            assert not await vm.is_running()
    path.rename(path.with_name("away"))
    path.with_name("copy").rename(path)  # the very same bytes are another file all the same
    with pytest.raises(StoreMismatch, match="not the recorded file"):
        await vm.restore()
    await vm.delete_snapshots(saved.name)
    assert path.exists()


def test_memory_is_never_sealed_into_a_second_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"somebody's")
    (tmp_path / "memory.part").hardlink_to(victim)
    with pytest.raises(StoreMismatch, match="hard link"):
        statefile.require_own(os.open(tmp_path / "memory.part", os.O_RDONLY), "memory.part", str(tmp_path / "memory"))
    assert victim.read_bytes() == b"somebody's"


async def test_names_in_the_run_folder(q: qmpsnap.Controller, victim: Victim) -> None:
    vm = await q.define(ONE_DISK)
    run_dir, lock = context_of(vm).home.run_dir(vm.name), context_of(vm).home.lock(vm.name)
    logs = context_of(vm).home.log_dir(vm.name)
    logs.mkdir(mode=0o700, parents=True)
    for way in ("symlink", "hard link"):
        for path in (
            logs / QEMU_LOG,
            logs / CONSOLE_LOG,
            run_dir / CONSOLE_LOG,
            run_dir / PID_FILE,
            run_dir / "user.sock",
        ):
            path.unlink(missing_ok=True)
            WAYS[way](victim.path, path)
        await vm.start(paused=True)
        await vm.stop(force=True)
        victim.is_untouched()
        lock.unlink()
        WAYS[way](victim.path, lock)
        with pytest.raises(HostCannot, match="lock"):
            await vm.start(paused=True)
        victim.is_untouched()
        lock.unlink()
    for name in ("run", "worker"):
        folder = run_dir if name == "run" else run_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.symlink_to(victim.path.parent)
        with pytest.raises(HostCannot, match="not private"):
            privileges.make_private(folder, "run folder")
        folder.unlink()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


async def test_the_machines_folder(q: qmpsnap.Controller, place: Path, victim: Victim) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    folder = context_of(vm).home.machine_dir(vm.name)
    folder.rename(place / "away")
    (place / "other").mkdir()
    shutil.copytree(place / "away", place / "other", dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (place / "other").iterdir()}
    folder.symlink_to(place / "other")
    for act in (
        lambda: vm.start(paused=True),
        lambda: vm.snapshot("s"),
        lambda: vm.revert("s1"),
        lambda: vm.delete_snapshots("s2"),
        lambda: vm.commit("vda", consume=True),
        lambda: vm.mirror("vda", place / "copy", mode="finish"),
        lambda: vm.undefine(disks="remove"),
    ):
        with pytest.raises(StoreMismatch, match="replaced by a link"):
            await act()
    assert {path.name: path.read_bytes() for path in (place / "other").iterdir()} == before
    folder.unlink()
    (place / "away").rename(folder)
    await hold_invariants(vm, hashes)
    victim.is_untouched()
