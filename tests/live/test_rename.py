"""``rename``: the folder, the record, the headers of what is based on the images, and what is refused."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, LockHeld, NameRefused, NameTaken, NotFoundError, StateError, UsageError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base.context import locked
from qmpsnap.ops.lifecycle import rename
from tests.live.machine import MIB, context_of, fill, hold_invariants, snapshot_hashes
from tests.live.test_dry_runs import dry, told

pytestmark = pytest.mark.version

SPEC = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=(DiskSpec(name="vda", size=MIB), DiskSpec(name="vdb", size=MIB, format="raw")),
)


async def grown(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    """A stopped machine with a snapshot of each kind that has files of its own."""
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("disk")
    await vm.resume()  # an early QEMU saves the memory of no guest that has not run
    await vm.snapshot("full", kind="full")
    await vm.stop(force=True)
    await vm.snapshot("inside", kind="internal")
    return vm


async def clone(q: qmpsnap.Controller, vm: qmpsnap.MachineHandle) -> qmpsnap.MachineHandle:
    """A machine whose disk is based on the first one's oldest layer."""
    layer = context_of(vm).store.snapshots(vm.name)[0].points[0].layer
    base = context_of(vm).store.layer(layer).path
    return await q.define(replace(SPEC, name="clone", disks=(DiskSpec(name="vda", base=base),)))


def backings(home: Path) -> set[str]:
    """What the headers of all images name as their backing files."""
    found = {header.read(str(path), format="qcow2").backing for path in home.glob("machines/*/*.qcow2")}
    return {path for path in found if path}


async def test_everything_goes_on_by_the_new_name(q: qmpsnap.Controller, home: Path) -> None:
    vm = await grown(q)
    hashes, uuid = await snapshot_hashes(vm), (await vm.record()).uuid
    operations = len(context_of(vm).store.operations("still"))
    renamed = await vm.rename("other")
    assert (renamed.name, renamed.spec.name, renamed.uuid) == ("other", "other", uuid)
    assert not [path for path in home.glob("*/still") if path.is_dir() or path.is_file()]
    assert {str(Path(path).parent) for path in backings(home)} == {f"{home}/machines/other"}
    with pytest.raises(NotFoundError):
        await q.machine("still")
    now = await q.machine("other")
    assert await snapshot_hashes(now) == hashes
    found = context_of(now).store.operations("other")
    assert (len(found), found[-1].outcome) == (operations + 1, "the machine is other")
    assert (await now.check(deep=True)).findings == ()
    record = (home / "machines" / "other" / "record.json").read_text()
    assert json.loads(record)["machine"]["spec"]["name"] == "other"
    assert "/machines/still" not in record
    await now.revert("full", state="paused")
    await hold_invariants(now)
    await now.stop(force=True)
    await now.delete_snapshots("disk")
    await q.define(SPEC)
    assert [vm.name for vm in await q.machines()] == ["other", "still"]


async def test_what_is_based_on_its_images_reads_them_at_their_new_place(q: qmpsnap.Controller, home: Path) -> None:
    vm = await grown(q)
    child = await clone(q, vm)
    await child.snapshot("own")
    await child.start(paused=True)
    with pytest.raises(StateError, match="machine clone reads images of machine still"):
        await vm.rename("other")
    await child.stop(force=True)
    async with locked(context_of(vm), "clone", "test"):
        with pytest.raises(LockHeld):
            await vm.rename("other")
    assert await q.machine("still") == vm
    hashes = await snapshot_hashes(child)
    assert (await vm.plan_rename("other")).details.plan.others == ("clone",)
    await vm.rename("other")
    assert not [path for path in backings(home) if "/still/" in path]
    assert "/machines/still" not in (home / "machines" / "clone" / "record.json").read_text()
    await child.start(paused=True)
    await hold_invariants(child, hashes)
    await hold_invariants(await q.machine("other"))


async def test_a_fork_says_what_its_parent_is_called_now(q: qmpsnap.Controller) -> None:
    vm = await grown(q)
    await vm.start()
    await vm.snapshot("warm", kind="full")
    (fork,) = await vm.fork("warm", "child", paused=True)
    child = await q.machine(fork.machine.name)
    await child.stop(force=True)
    await vm.stop(force=True)
    await vm.rename("other")
    origin = (await child.record()).origin
    assert origin
    assert (origin.machine, origin.snapshot) == ("other", "warm")
    await child.rename("grown-up")
    child = await q.machine("grown-up")
    await child.start(paused=True)
    await hold_invariants(child)
    await (await q.machine("other")).fork("warm", "second", paused=True)


def test_the_command_line_tells_what_it_does(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "s.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n")
    told(capsys, f"define {spec}")
    told(capsys, "snapshot create still a")
    would = dry(capsys, home, "rename still other")
    assert (would["old"], would["machine"], len(would["rewritten"])) == ("still", "other", 1)
    assert told(capsys, "rename still other -o json") == would | {"dry_run": False}
    assert [one["name"] for one in told(capsys, "list -o json")["machines"]] == ["other"]
    assert told(capsys, "snapshot list other -o name").split() == ["a"]
    assert main(["rename", "still", "x"]) == 3


async def test_what_is_refused_changes_nothing(q: qmpsnap.Controller, home: Path) -> None:
    vm = await q.define(SPEC)
    await q.define(replace(SPEC, name="taken"))
    (home / "machines" / "folder").mkdir()
    for name, error in (("taken", NameTaken), ("folder", NameTaken), ("Bad!", NameRefused), ("still", UsageError)):
        for attempt in (vm.plan_rename(name), vm.rename(name)):
            with pytest.raises(error):
                await attempt
    await vm.start(paused=True)
    with pytest.raises(StateError, match="machine still runs"):
        await vm.rename("other")
    await hold_invariants(vm)
    assert not (home / "locks" / "other").exists()
    assert not [one for one in context_of(vm).store.operations("still") if one.verb == "rename"]


async def test_a_header_that_cannot_be_written_leaves_it_for_the_next_command(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await grown(q)
    hashes = await snapshot_hashes(vm)

    async def refuses(*_: object, **__: object) -> None:
        raise HostCannot("no")

    with monkeypatch.context() as patch:
        patch.setattr(rename, "set_backing", refuses)
        with pytest.raises(HostCannot) as failed:
            await vm.rename("other")
    assert failed.value.effect == "unknown"
    with pytest.raises(NotFoundError):  # the interrupted rename is ended first
        await vm.start(paused=True)
    now = await q.machine("other")
    await hold_invariants(now, hashes)
    await now.start(paused=True)
