"""What QEMU or the host refuses before a merge begins changes nothing, whoever refuses it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, ImageInUse, StateError
from qmpsnap.machine import worker
from qmpsnap.model.layers.chain import Layer
from tests.faults import claims, site
from tests.faults.site import KIB, ONE, qemu_io
from tests.live.machine import context_of, hold_invariants

CORRUPT_BIT = 79
"""The byte of a qcow2 header whose second bit says that the image is corrupt."""


async def _made(q: qmpsnap.Controller, *, first: int = 64 * KIB) -> tuple[qmpsnap.MachineHandle, Path]:
    vm = await q.define(ONE)
    await site.grow(vm, "s1", "s2", first=first)
    return vm, Path(_layers(vm)[0].path)


def _layers(vm: qmpsnap.MachineHandle) -> tuple[Layer, ...]:
    return context_of(vm).store.chains(vm.name)[0].layers


@contextmanager
def _open_in_another(path: Path, *flags: str) -> Iterator[None]:
    """Another process has the image open, as QEMU's programs open it."""
    argv = [qemu_io(), *flags, "-f", "qcow2", str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"length\n")
        process.stdin.flush()
        while b"MiB" not in process.stdout.readline():
            assert process.poll() is None
        yield
        process.kill()


@contextmanager
def _immutable(path: Path) -> Iterator[None]:
    if os.geteuid() or subprocess.run(["chattr", "+i", path], check=False, capture_output=True).returncode:
        pytest.skip("chattr +i needs root and a file system that knows it")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextmanager
def _read_only_mount(path: Path) -> Iterator[None]:
    if os.geteuid() or subprocess.run(["mount", "--bind", path, path], check=False, capture_output=True).returncode:
        pytest.skip("a read-only mount needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextmanager
def _corrupt(path: Path) -> Iterator[None]:
    def turn() -> None:
        with path.open("r+b") as file:
            file.seek(CORRUPT_BIT)
            (old,) = file.read(1)
            file.seek(CORRUPT_BIT)
            file.write(bytes([old ^ 2]))
        os.utime(path, ns=times)  # as if QEMU had marked it while it was its own

    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    turn()
    yield
    turn()


IN_THE_WAY: dict[str, Any] = {
    "a reader": _open_in_another,
    "immutable": _immutable,
    "a read-only mount": _read_only_mount,
    "marked corrupt": _corrupt,
}


@pytest.mark.parametrize("why", IN_THE_WAY)
@pytest.mark.parametrize("verb", ["commit", "delete"])
async def test_a_stopped_machines_refused_merge_changes_nothing(q: qmpsnap.Controller, verb: str, why: str) -> None:
    vm, base = await _made(q, first=1024 * KIB)  # so that a delete merges downwards, into the base
    before = await site.look(vm)
    operations = context_of(vm).store.operations(vm.name)
    with IN_THE_WAY[why](base), pytest.raises((StateError, HostCannot), match="nothing was changed") as refused:
        await (vm.commit("vda", consume=True) if verb == "commit" else vm.delete_snapshots("s1"))
    assert refused.value.effect == "none"
    assert refused.value.hint
    assert context_of(vm).store.operations(vm.name) == operations, "it was refused before it was opened"
    after = await site.look(vm)
    assert (after.hashes, after.disks) == (before.hashes, before.disks)
    await hold_invariants(vm)


async def test_a_reader_that_would_share_the_base_is_refused_too(q: qmpsnap.Controller) -> None:
    vm, base = await _made(q)
    with _open_in_another(base, "-r", "-U"), pytest.raises(ImageInUse, match="nothing was changed"):
        await vm.commit("vda", consume=True)
    await hold_invariants(vm)
    await vm.commit("vda", consume=True)


async def test_a_stream_into_an_image_that_another_writes_to_is_refused(q: qmpsnap.Controller) -> None:
    vm, _ = await _made(q)
    active = Path(_layers(vm)[-1].path)
    with _open_in_another(active), pytest.raises(ImageInUse, match=r"is open for writing in .* nothing was changed"):
        await vm.stream("vda")
    await hold_invariants(vm)


async def test_a_reused_copy_that_cannot_be_written_is_refused(q: qmpsnap.Controller, place: Path) -> None:
    vm, _ = await _made(q)
    target = place / "copy"
    await context_of(vm).image.create_base(target, format="qcow2", virtual_size=site.SIZE)
    with _open_in_another(target), pytest.raises(ImageInUse, match=r"is open for writing in .* nothing was changed"):
        await vm.mirror("vda", target, mode="finish", reuse=True)
    await vm.mirror("vda", target, mode="finish", reuse=True)


async def test_a_delete_that_fails_once_its_name_is_gone_says_that(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vm, _ = await _made(q, first=1024 * KIB)
    before = claims.look(vm)

    async def fails(*_: Any, **__: Any) -> NoReturn:
        raise HostCannot("no process can be made")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "launch", fails)
        with pytest.raises(HostCannot, match="no process") as failed:
            await vm.delete_snapshots("s1")
    assert "snapshot s1 is gone" in str(failed.value)
    assert failed.value.effect == "applied"
    claims.heard(failed.value)
    claims.hold_error(vm, before)
    claims.hold_log(vm, before)
    assert main(["log", vm.name]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("snapshot s1 is gone")
    assert "undone" not in last
