"""An adopted machine is started on old images: told while it runs, and afterwards by what was overwritten."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.block import images, users
from qmpsnap.block.images import Asked
from qmpsnap.errors import ImageInUse, StateError, StoreMismatch
from qmpsnap.model.names import LayerId
from qmpsnap.ops import frozen, outsiders
from tests.live.machine import context_of
from tests.live.outsider import outsider
from tests.live.test_outsiders import layers, stopped


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outsiders, "PATIENCE", 0.0)


def write(path: str) -> None:
    subprocess.run(["qemu-io", "-c", "write -q -P 7 0 64k", path], check=True, capture_output=True)


async def codes(vm: qmpsnap.MachineHandle) -> set[str]:
    return {finding.code for finding in (await vm.check()).findings}


async def states(vm: qmpsnap.MachineHandle) -> dict[str, str]:
    return {snapshot.name: snapshot.state for snapshot in await vm.snapshots()}


def seen(vm: qmpsnap.MachineHandle) -> images.Seen:
    store = context_of(vm).store
    return images.glance({vm.name: frozen.asked(store, store.machine(vm.name), None)})[vm.name]


async def test_what_was_written_to_a_frozen_image_is_told_and_its_snapshots_are_marked(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    assert (await codes(vm), seen(vm).word) == (set(), "ok")
    write((await layers(vm))[1])
    assert (await codes(vm), seen(vm).word) == ({"frozen-written"}, "overwritten")
    assert await states(vm) == {"s1": "ok", "s2": "ok"}
    with pytest.raises(StoreMismatch, match=r"vda-2\.qcow2 .* snapshot s2 .* marked overwritten"):
        await vm.snapshot("s3")
    assert await states(vm) == {"s1": "ok", "s2": "overwritten"}
    with pytest.raises(StateError, match="overwritten"):
        await vm.revert("s2")
    await vm.revert("s1")
    await vm.delete_snapshots("s2")


async def test_what_only_got_another_time_is_ok_again_when_it_has_its_own(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    path = Path((await layers(vm))[0])
    before = path.stat()
    os.utime(path)
    with pytest.raises(StoreMismatch):
        await vm.snapshot("s3")
    assert await states(vm) == {"s1": "overwritten", "s2": "overwritten"}
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    await vm.snapshot("s3")
    assert set((await states(vm)).values()) == {"ok"}
    assert await codes(vm) == set()


async def test_our_own_writing_to_frozen_images_is_no_outsiders(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    write((await layers(vm))[-1])
    await vm.snapshot("s3")
    write((await layers(vm))[-1])
    for verb in (
        lambda: vm.snapshot("i1", kind="internal"),
        lambda: vm.snapshot("s4"),
        lambda: vm.delete_snapshots("i1"),
        lambda: vm.delete_snapshots("s2"),
        lambda: vm.revert("s3"),
        lambda: vm.delete_snapshots("s3"),
        lambda: vm.stream("vda"),
        lambda: vm.start(paused=True),
        lambda: vm.snapshot("s5"),
        lambda: vm.commit("vda", consume=True),
        lambda: vm.stop(force=True),
    ):
        await verb()
        assert await codes(vm) == set()
        assert "overwritten" not in (await states(vm)).values()


async def test_a_qemu_that_cannot_be_seen_makes_the_state_unknown(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await stopped(q)
    with outsider((await layers(vm))[-1]):
        assert (seen(vm).word, seen(vm).unseen) == ("in use", False)
        monkeypatch.setattr(users, "_pids", lambda: iter(()))  # as from another PID namespace
        assert (seen(vm).word, seen(vm).unseen) == ("in use", True)
        with pytest.raises(ImageInUse, match="a process that cannot be seen from here"):
            await vm.snapshot("s3")


@contextmanager
def hanging(path: Path) -> Iterator[None]:
    """A file whose opening waits, as of a file server that is gone: a writer who is asked to give its lease back."""
    os.mkfifo(path)
    yield
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.close(descriptor)


def test_storage_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    with hanging(fifo):
        monkeypatch.setattr(images, "look", lambda _: fifo.read_bytes())
        wanted = {name: Asked({LayerId("vda-1"): str(fifo)}, frozenset(), (), {}) for name in ("a", "b")}
        assert {name: found.word for name, found in images.glance(wanted).items()} == {
            "a": "not asked",
            "b": "not asked",
        }
