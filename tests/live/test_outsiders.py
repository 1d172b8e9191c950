"""Other programs on the images of a stopped machine: found before anything is changed, named, and left alone."""

import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.usage import users
from qmpsnap.errors import ImageInUse
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.outside import other_programs
from tests.live.machine import MIB, context_of
from tests.live.outsider import WAYS, outsider

SMALL = MachineSpec(name="small", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),))

Verb = Callable[[qmpsnap.MachineHandle], Awaitable[object]]

VERBS: dict[str, Verb] = {
    "create": lambda vm: vm.snapshot("s3"),
    "create --dry-run": lambda vm: vm.plan_snapshot("s3"),
    "create internal": lambda vm: vm.snapshot("s3", kind="internal"),
    "push": lambda vm: vm.push("s3"),
    "pop": lambda vm: vm.pop(),
    "add-layers": lambda vm: vm.add_layers(),
    "revert": lambda vm: vm.revert("s1"),
    "revert --dry-run": lambda vm: vm.plan_revert("s1"),
    "revert --discard": lambda vm: vm.revert("s1", discard=True),
    "delete": lambda vm: vm.delete_snapshots("s1"),
    "commit": lambda vm: vm.commit("vda", consume=True),
    "stream": lambda vm: vm.stream("vda"),
    "rename": lambda vm: vm.rename_snapshot("s1", "other"),
    "start": lambda vm: vm.start(paused=True),
    "undefine": lambda vm: vm.undefine(disks="remove"),
}
CHANGING = ("revert --discard", "delete", "commit", "undefine")
"""They write to or remove an image: a reader is in the way as well."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_programs, "PATIENCE", 0.0)


def make_base(path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)


@contextmanager
def qemu_io(path: str) -> Iterator[int]:
    """QEMU's own tool, with its image locks; its pid."""
    with subprocess.Popen(["qemu-io", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"length\n")
        process.stdin.flush()
        process.stdout.readline()
        yield process.pid
        process.communicate(timeout=20)


async def stopped(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    """A machine that never ran, with two snapshots: three layers, the two lower ones frozen."""
    vm = await q.define(SMALL)
    await vm.snapshot("s1")
    await vm.snapshot("s2")
    return vm


async def layers(vm: qmpsnap.MachineHandle) -> list[str]:
    return [view.layer.path for view in (await vm.chains())[0].layers]


async def state_of(vm: qmpsnap.MachineHandle) -> object:
    """All that a refused verb must leave: files, their content, and what the store says."""
    store, folder = context_of(vm).store, context_of(vm).home.machine_dir(vm.name)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return files, store.machine(vm.name), store.chains(vm.name), store.snapshots(vm.name), store.forest()


@pytest.mark.parametrize("verb", VERBS)
async def test_a_writer_without_locks_is_named_before_anything_is_changed(q: qmpsnap.Controller, verb: str) -> None:
    vm = await stopped(q)
    before = await state_of(vm)
    for path in await layers(vm):
        with outsider(path) as pid:
            with pytest.raises(ImageInUse, match=rf"{path}, an image of machine small, is open for writing in .*{pid}"):
                await VERBS[verb](vm)
            assert {finding.code for finding in (await vm.check()).findings} == {"image-in-use"}
    assert await state_of(vm) == before
    assert not (await vm.check()).findings


@pytest.mark.parametrize("verb", CHANGING)
async def test_a_reader_of_what_would_change_or_go_is_named(q: qmpsnap.Controller, verb: str) -> None:
    vm = await stopped(q)
    if verb == "revert --discard":  # what is discarded is the active layer, which nobody has to write to for that
        touched = await layers(vm)
    else:
        touched = (await layers(vm))[:2]
    before = await state_of(vm)
    with outsider(touched[-1], "reads") as pid:
        with pytest.raises(ImageInUse, match=rf"is read by .*process {pid}"):
            await VERBS[verb](vm)
        assert await state_of(vm) == before
        await vm.snapshot("s3")  # which changes nothing that is there: a reader is welcome


@pytest.mark.parametrize("way", [way for way in WAYS if way != "reads"])
async def test_every_way_of_writing_is_seen_without_a_look_at_processes(q: qmpsnap.Controller, way: str) -> None:
    vm = await stopped(q)
    path = (await layers(vm))[-1]
    assert users.look([path], readers=True) == users.Found()
    with outsider(path, way) as pid:
        found = users.look([path]).users[path]
        assert (found.how, [process.pid for process in found.by]) == ("writes", [pid])
        assert users.look([path], ours=[pid]) == users.Found()
    assert users.look([path], readers=True) == users.Found()


async def test_processes_are_looked_through_once_for_all_disks(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each active image is open for writing in the machine's QEMU, whose name has to be found."""
    vm = await q.define(still_spec)
    process = await vm.start(paused=True)
    looks = Mock(side_effect=users._pids)
    monkeypatch.setattr(users, "_pids", looks)
    assert not (await vm.check()).findings
    assert looks.call_count == 1
    active = [chain.active.path for chain in await vm.chains()]
    found = users.look(active).users
    assert [[one.pid for one in found[path].by] for path in active] == [[process.pid]] * 2


async def test_a_base_or_an_image_that_is_written_to_is_refused(q: qmpsnap.Controller, place: Path) -> None:
    base = place / "base.qcow2"
    make_base(base)
    for disk in (DiskSpec(name="vda", base=str(base)), DiskSpec(name="vda", image=str(base))):
        with outsider(base), pytest.raises(ImageInUse, match=r"base\.qcow2"):
            await q.define(replace(SMALL, disks=(disk,)), folders=[place])
    vm = await q.define(replace(SMALL, disks=(DiskSpec(name="vda", base=str(base)),)), folders=[place])
    with outsider(base):
        (finding,) = (await vm.check()).findings
        assert (finding.code, finding.file) == ("image-in-use", str(base))


async def test_a_second_writer_beside_a_running_machine_is_told_of(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    await vm.start(paused=True)
    active = (await layers(vm))[-1]
    assert not (await vm.check()).findings
    with outsider(active) as pid:
        (finding,) = (await vm.check()).findings
        assert (finding.code, finding.file) == ("image-in-use", active)
        assert f"(process {pid})" in finding.text
        assert "qemu" not in finding.text
    assert not (await vm.check()).findings


async def test_a_frozen_layer_under_a_running_machine_is_watched_too(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    await vm.start(paused=True)
    assert not (await vm.check()).findings
    with outsider((await layers(vm))[0]), pytest.raises(ImageInUse, match=r"vda-1"):
        await vm.snapshot("s3")
    await vm.snapshot("s3")


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="no qemu-io")
async def test_a_program_with_qemus_locks_is_named(q: qmpsnap.Controller) -> None:
    vm = await stopped(q)
    path = (await layers(vm))[-1]
    with qemu_io(path) as pid, pytest.raises(ImageInUse, match=rf"qemu-io \(process {pid}\)"):
        await vm.snapshot("s3")
    await vm.snapshot("s3")
