"""An adopted machine is started on old images: told while it runs, and afterwards by what was overwritten."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.usage import survey, users
from qmpsnap.block.usage.survey import Asked
from qmpsnap.cli.main import main
from qmpsnap.errors import ImageInUse, StateError, StoreMismatch
from qmpsnap.host import files
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.outside import other_programs
from tests.live.machine import context_of
from tests.live.outsider import outsider
from tests.live.test_outsiders import layers, stopped


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_programs, "PATIENCE", 0.0)


def write(path: str, kib: int = 0) -> None:
    subprocess.run(["qemu-io", "-c", f"write -q -P 7 {kib}k 64k", path], check=True, capture_output=True)


async def codes(vm: qmpsnap.MachineHandle) -> set[str]:
    return {finding.code for finding in (await vm.check()).findings}


async def states(vm: qmpsnap.MachineHandle) -> dict[str, str]:
    return {snapshot.name: snapshot.state for snapshot in await vm.snapshots()}


def seen(vm: qmpsnap.MachineHandle) -> survey.Seen:
    store = context_of(vm).store
    return survey.glance({vm.name: survey.wanted(store.images.read_by(vm.name), None)})[vm.name]


async def test_what_was_written_to_a_frozen_image_is_told_and_its_snapshots_are_marked(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    assert (await codes(vm), seen(vm).word) == (set(), "ok")
    write((await layers(vm))[1])
    assert (await codes(vm), seen(vm).word) == ({"frozen-written"}, "overwritten")
    assert await states(vm) == {"s1": "ok", "s2": "ok"}
    with pytest.raises(StoreMismatch, match=r"vda-2\.qcow2 .* overwrites snapshot s2"):
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


async def test_each_overwriting_is_told_of_what_was_taken_before_it(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    base = Path((await layers(vm))[0])
    first, before = base.read_bytes(), base.stat()
    write(str(base))
    with pytest.raises(StoreMismatch, match="overwrites snapshot s1, s2"):
        await vm.snapshot("s3")
    await vm.snapshot("s3")
    assert await states(vm) == {"s1": "overwritten", "s2": "overwritten", "s3": "ok"}
    write(str(base), 64)
    assert (await codes(vm), seen(vm).word) == ({"frozen-written"}, "overwritten")
    with pytest.raises(StoreMismatch, match="which overwrites snapshot s3"):
        await vm.snapshot("s4")
    await vm.snapshot("s4")
    assert await states(vm) == {"s1": "overwritten", "s2": "overwritten", "s3": "overwritten", "s4": "ok"}
    base.write_bytes(first)
    os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreMismatch, match="which overwrites snapshot s4"):
        await vm.snapshot("s5")
    assert await states(vm) == {"s1": "ok", "s2": "ok", "s3": "overwritten", "s4": "overwritten"}


async def test_another_change_time_alone_is_no_verdict(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    path = Path((await layers(vm))[0])
    before = path.stat()
    path.chmod(0o400)
    path.chmod(0o600)
    os.link(path, path.with_name("link"))
    path.with_name("link").unlink()
    assert path.stat().st_ctime_ns != before.st_ctime_ns
    assert (await codes(vm), seen(vm).word) == (set(), "ok")
    write(str(path))
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (await codes(vm), seen(vm).word) == ({"frozen-written"}, "overwritten")
    with pytest.raises(StoreMismatch, match="overwrites snapshot s1, s2"):
        await vm.snapshot("s3")


async def test_where_births_are_not_kept_a_file_of_another_size_is_not_removed(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "born", lambda _: 0)
    vm = await stopped(q)
    await vm.revert("s1")
    store = context_of(vm).store
    gone = store.layer(LayerId("vda-2"))
    Path(gone.path).unlink()
    Path(gone.path).write_bytes(b"mine")
    store.apply(vm.name, Change(layers=(replace(gone, inode=Path(gone.path).stat().st_ino),)))  # as ext4 gives it anew
    with pytest.raises(StoreMismatch, match="which overwrites snapshot s2"):
        await vm.delete_snapshots("s2")
    with pytest.raises(StoreMismatch, match="is not the recorded image"):
        await vm.delete_snapshots("s2")
    assert Path(gone.path).read_bytes() == b"mine"


async def test_the_list_tells_what_check_tells(q: qmpsnap.Controller, capsys: pytest.CaptureFixture[str]) -> None:
    vm = await stopped(q)
    path = Path((await layers(vm))[1])

    async def listed() -> tuple[str, dict[str, str]]:
        assert await to_thread.run_sync(main, ["snapshot", "list", "small", "-o", "json"]) == 0
        told = capsys.readouterr()
        return told.err, {one["name"]: one["state"] for one in json.loads(told.out)["snapshots"]}

    assert await listed() == ("", {"s1": "ok", "s2": "ok"})
    path.rename(away := path.with_name("away"))
    err, found = await listed()
    assert found == {"s1": "ok", "s2": "missing"}
    assert "an image of s2 is missing; qmpsnap check small" in err
    assert seen(vm).word == "missing"
    shutil.copy2(away, path)
    assert (await listed())[1] == {"s1": "ok", "s2": "replaced"}
    for words in (["tree", "small"], ["snapshot", "show", "small", "s2"], ["list"], ["show", "small"]):
        assert await to_thread.run_sync(main, words) == 0
        told = capsys.readouterr()
        assert "replaced" in told.out + told.err, words
    away.rename(path)
    assert await listed() == ("", {"s1": "ok", "s2": "ok"})
    write(str(path))
    assert (await listed())[1] == {"s1": "ok", "s2": "overwritten"}
    assert await states(vm) == {"s1": "ok", "s2": "ok"}, "a look records nothing"


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


async def test_what_asks_for_the_state_says_that_nobody_knows_it(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await stopped(q)
    assert await vm.state() == "stopped"
    for force in (False, True):
        with pytest.raises(StateError, match="machine small is not running"):
            await vm.stop(force=force)
    with outsider((await layers(vm))[-1]):
        assert await vm.state() == "stopped", "a process that can be seen is none of its QEMUs"
        monkeypatch.setattr(users, "_pids", lambda: iter(()))  # as from another PID namespace
        assert await vm.state() == "unknown"
        for way in (vm.stop, vm.resume):
            with pytest.raises(StateError, match="state of machine small is unknown") as refused:
                await way()
            assert (refused.value.exit_code, refused.value.effect) == (4, "none")


async def test_a_qemu_in_another_pid_namespace_is_not_said_to_be_stopped(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    await vm.start(paused=True)
    aside = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (await anyio.run_process([*aside, "true"], check=False)).returncode:
        pytest.skip("this user cannot make a PID namespace")
    for words in (["stop", "small"], ["stop", "small", "--force"]):
        argv = [*aside, sys.executable, "-m", "qmpsnap", *words]
        done = await anyio.run_process(argv, check=False)
        assert done.returncode == 4, done
        assert b"state of machine small is unknown" in done.stderr
    shown = await anyio.run_process([*aside, sys.executable, "-m", "qmpsnap", "show", "small", "-o", "json"])
    assert json.loads(shown.stdout)["state"] == "unknown"
    assert await vm.is_running()


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
        monkeypatch.setattr(survey, "look", lambda _: fifo.read_bytes())
        monkeypatch.setattr(survey, "DEADLINE", 0.2)
        wanted = {name: Asked({LayerId("vda-1"): str(fifo)}, frozenset(), (), {}) for name in ("a", "b")}
        assert {name: found.word for name, found in survey.glance(wanted).items()} == {
            "a": "not asked",
            "b": "not asked",
        }
