"""The store is lost, damaged or old: it is made again from the disks, and what the guest wrote is all there."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, NotFoundError, StateError, StoreMismatch
from qmpsnap.machine import statefile
from qmpsnap.model.home import Home
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import OperationId
from qmpsnap.ops.rebuild import rebuild
from tests.live.machine import (
    MIB,
    ONE_DISK,
    active_hash,
    context_of,
    fill,
    grown,
    hold_invariants,
    snapshot_hashes,
    user_monitor,
)
from tests.live.test_mirror import make_image
from tests.machine.test_statefile import MANIFEST

NOBODY = 65534


def at(home: Path) -> Home:
    return Home.from_environment({"QMPSNAP_HOME": str(home)}, uid=os.geteuid())


def lose(home: Path) -> None:
    for file in home.glob("qmpsnap.db*"):
        file.unlink()


async def test_a_tree_of_snapshots_comes_back_with_names_texts_and_marks(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1", "s2")
        await vm.snapshot("lost", description="Übung")
        await fill(vm, "vda", 3, offset=3 * MIB)
        await vm.snapshot("over")
        await vm.commit("vda", base="lost", consume=True)
        async with user_monitor(vm) as qemu:
            await qemu.execute("cont")
        await vm.snapshot("warm", kind="full")
        await fill(vm, "vda", 4, offset=4 * MIB)
        await vm.revert("s1", state="paused")
        await fill(vm, "vda", 5, offset=5 * MIB)
        await vm.stop(force=True)
        before, active = await snapshot_hashes(vm), await active_hash(vm)
        snapshots, chains, record = await vm.snapshots(), await vm.chains(), await vm.record()
        assert {found.name: found.state for found in snapshots if found.state != "ok"} == {
            "lost": "consumed", "over": "consumed",
        }  # fmt: skip
    lose(home)
    done = await rebuild.run(at(home), set_aside=False)
    assert [(made.name, made.notes) for made in done.machines] == [("still", ())]
    assert (done.left_out, done.aside) == ((), None)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (await vm.snapshots(), await vm.chains(), await vm.record()) == (snapshots, chains, record)
        assert (await snapshot_hashes(vm), await active_hash(vm)) == (before, active)
        assert (await vm.check(deep=True)).findings == ()
        assert (await vm.revert("warm")).state == "running"
        await vm.stop(force=True)
        await vm.delete_snapshots("s2")
        await hold_invariants(vm)


async def test_what_a_running_machine_writes_to_is_asked_of_its_qemu(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1", "s2")
        # The base has the lowest number, and after the commit it is what the guest writes to.
        await vm.commit("vda", consume=True)
        active = (await vm.chains())[0].active.id
    lose(home)
    await rebuild.run(at(home), set_aside=False)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (await vm.is_running(), (await vm.chains())[0].active.id) == (True, active)
        await hold_invariants(vm)
        await vm.snapshot("after")
        await hold_invariants(vm)


async def test_names_that_qemu_has_given_are_asked_of_it(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        await vm.snapshot("s2", by="blockdev-snapshot-sync")
        layer, process = (await vm.chains())[0].active.id, (await vm.record()).process
        assert process
        assert process.nodes.keys() == {f"{layer}.file"}
    lose(home)
    await rebuild.run(at(home), set_aside=False)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (found := (await vm.record()).process)
        assert found.nodes == process.nodes
        await vm.snapshot("s3")
        await fill(vm, "vda", 6, offset=6 * MIB)
        await vm.snapshot("s4")
        await vm.commit("vda", base=layer, top="s4", consume=True)  # which opens that layer anew
        await hold_invariants(vm)


async def test_clones_two_disks_and_chosen_places_come_back(home: Path, place: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(replace(ONE_DISK, disks=(*ONE_DISK.disks, DiskSpec(name="vdb", size=MIB, format="raw"))))
        await vm.start(paused=True)
        await fill(vm, "vda", 1)
        await fill(vm, "vdb", 2, length=MIB // 2)
        await vm.snapshot("golden", files={"vda": place / "mine", "vdb": place / "other"})
        await fill(vm, "vda", 3)
        await vm.stop(force=True)
        base = (await vm.chains())[0].layers[0].layer.path
        (disk,) = ONE_DISK.disks
        clone = await q.define(replace(ONE_DISK, name="clone", disks=(replace(disk, size=None, base=base),)))
        before = [(view.disk, view.ids) for machine in (vm, clone) for view in await machine.chains()]
        hashes, active = await snapshot_hashes(vm), await active_hash(vm)
    lose(home)
    await rebuild.run(at(home), set_aside=False)
    async with qmpsnap.open() as q:
        vm, clone = await q.machine("still"), await q.machine("clone")
        assert [(view.disk, view.ids) for machine in (vm, clone) for view in await machine.chains()] == before
        assert (await clone.snapshots(), await snapshot_hashes(vm)) == ((), hashes)
        assert await active_hash(vm) == active
        for machine in (vm, clone):
            await hold_invariants(machine)


async def test_a_machine_that_the_store_has_lost_is_not_made_anew(home: Path) -> None:
    async with qmpsnap.open() as q:
        await q.define(ONE_DISK)
    lose(home)
    async with qmpsnap.open() as q:
        with pytest.raises(NotFoundError) as caught:
            await q.machine("still")
        assert "check --rebuild" in as_typed(caught.value.hint)
        with pytest.raises(StoreMismatch, match="was defined before"):
            await q.define(ONE_DISK)
    await rebuild.run(at(home), set_aside=False)
    async with qmpsnap.open() as q:
        await hold_invariants(await q.machine("still"))


async def test_a_whole_store_is_refused_and_a_damaged_one_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with qmpsnap.open() as q:
        await q.define(ONE_DISK)
    with pytest.raises(StateError, match="is intact"):
        await rebuild.run(at(home), set_aside=False)
    (home / "qmpsnap.db").write_bytes(b"no database " * 1000)
    await anyio.to_thread.run_sync(lambda: main(["check", "still"]))
    assert "check --rebuild" in capsys.readouterr().err
    assert await anyio.to_thread.run_sync(lambda: main(["check", "--rebuild"])) == 0
    (aside,) = home.glob("qmpsnap.db.aside-*")
    assert aside.read_bytes() == b"no database " * 1000
    async with qmpsnap.open() as q:
        await hold_invariants(await q.machine("still"))


async def test_files_with_numbers_that_none_can_have_are_no_layers(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        await vm.stop(force=True)
        before = [view.ids for view in await vm.chains()]
        uuid = (await vm.record()).uuid
    folder = home / "machines" / "still"
    for name in ("vda-99999999999999999999.qcow2", "vars-99999999999999999999.fd", "vda-\u0667.qcow2"):
        shutil.copy2(folder / "vda-1.qcow2", folder / name)
    (folder / "m.part").write_bytes(b"QEVM")
    hardware = replace(MANIFEST.hardware, uuid=uuid)
    manifest = replace(MANIFEST, hardware=hardware, operation=OperationId(1 << 63))
    statefile.finish(str(folder / "m.part"), str(folder / "m.vmstate"), manifest)
    lose(home)
    done = await rebuild.run(at(home), set_aside=False)
    assert [made.name for made in done.machines] == ["still"]
    assert done.left_out == ()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert [view.ids for view in await vm.chains()] == before
        await vm.snapshot("next")


@pytest.mark.parametrize("closed", ["machines/still", "machines"])
async def test_a_folder_that_may_not_be_read_ends_it_before_anything_is_changed(home: Path, closed: str) -> None:
    async with qmpsnap.open() as q:
        await q.define(ONE_DISK)
    lose(home)
    with as_nobody(home):
        (home / closed).chmod(0)
        try:
            with pytest.raises(HostCannot, match=f"{home}/{closed} cannot be read: Permission denied") as caught:
                await rebuild.run(at(home), set_aside=False)
        finally:
            (home / closed).chmod(0o700)
        assert "let this user read" in caught.value.hint
        assert not (home / "qmpsnap.db").exists()
        assert len((await rebuild.run(at(home), set_aside=False)).machines) == 1


@contextlib.contextmanager
def as_nobody(home: Path) -> Iterator[None]:
    """Root may read everything; the block is run by a user who may not, and whose the home is."""
    if os.geteuid():
        yield
        return
    for path in (home, *home.rglob("*")):
        os.chown(path, NOBODY, -1)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def backed_up(home: Path, *, records: bool) -> Callable[[], None]:
    """Copy the store, and with ``records`` those; returns what puts the copies back."""
    files = [home / "qmpsnap.db", *(home.glob("machines/*/record.json") if records else ())]
    copies = {path: path.read_bytes() for path in files}

    def put_back() -> None:
        lose(home)
        for path, said in copies.items():
            path.write_bytes(said)

    return put_back


@pytest.mark.parametrize("records", [False, True], ids=["the store alone", "with the records"])
async def test_an_old_copy_of_the_store_is_noticed_and_replaced(home: Path, *, records: bool) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        await vm.stop(force=True)
    put_back = backed_up(home, records=records)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.start(paused=True)
        await vm.snapshot("s2")
        await fill(vm, "vda", 7, offset=7 * MIB)
        await vm.stop(force=True)
        active, newest = await active_hash(vm), Path((await vm.chains())[0].active.path)
    put_back()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        for verb in (vm.start, vm.recover, lambda: vm.snapshot("s3"), lambda: vm.commit("vda", consume=True)):
            with pytest.raises(StoreMismatch, match="old copy"):
                await verb()
        assert {finding.code for finding in (await vm.check()).findings} == {"store-older", "unreferenced-file"}
    if records:  # nobody knows names and chain any more: what is newer is told, and never overwritten
        with pytest.raises(StateError, match=f"images are newer than its record: {newest}") as caught:
            await rebuild.run(at(home), set_aside=True)
        assert "nothing was changed" in str(caught.value)
        lose(home)
        ((name, why),) = (await rebuild.run(at(home), set_aside=False)).left_out
        assert (name, "'image:' in a spec" in why) == ("still", True)
        return
    await rebuild.run(at(home), set_aside=True)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert await active_hash(vm) == active
        assert [found.name for found in await vm.snapshots()] == ["s1", "s2"]
        await hold_invariants(vm)


async def test_a_change_that_made_no_layer_tells_that_the_store_is_old(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1", "s2")
        await vm.stop(force=True)
    put_back = backed_up(home, records=False)
    async with qmpsnap.open() as q:
        await (await q.machine("still")).rename_snapshot("s1", "first")
    put_back()
    async with qmpsnap.open() as q:
        with pytest.raises(StoreMismatch, match="old copy"):
            await (await q.machine("still")).delete_snapshots("s2")
    await rebuild.run(at(home), set_aside=True)
    async with qmpsnap.open() as q:
        assert [found.name for found in await (await q.machine("still")).snapshots()] == ["first", "s2"]


async def test_a_qemu_that_writes_elsewhere_than_the_record_says_is_left_alone(home: Path) -> None:
    async with qmpsnap.open() as q:
        await grown(q, "s1")
    put_back = backed_up(home, records=True)
    async with qmpsnap.open() as q:
        await (await q.machine("still")).snapshot("s2")
    put_back()
    lose(home)
    ((name, why),) = (await rebuild.run(at(home), set_aside=False)).left_out
    assert (name, why) == ("still", "its QEMU writes to vda-3, its record says vda-2")


async def test_an_image_of_the_users_that_a_disk_went_on_with_is_active_again(home: Path, place: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        await vm.stop(force=True)
        make_image(vm, place / "mine")
        await vm.mirror("vda", place / "mine", mode="pivot", reuse=True)
        before, active = await snapshot_hashes(vm), await active_hash(vm)
    lose(home)
    assert (await rebuild.run(at(home), set_aside=False)).left_out == ()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        layer = (await vm.chains())[0].active
        assert (layer.path, layer.owned) == (str(place / "mine"), False)
        assert await active_hash(vm) == active
        assert list((await snapshot_hashes(vm)).values()) == list(before.values())
        await hold_invariants(vm)


def _damaged(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(72)
        file.write(b"\xff" * 8)  # incompatible features that nobody knows


@pytest.mark.parametrize("what", ["the folder is not there", "the header is broken", "what it reads is not there"])
async def test_a_layer_below_the_active_one_never_takes_its_place(
    home: Path, place: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        await vm.snapshot("s2", files={"vda": place / "mine"})
        await vm.snapshot("s3", files={"vda": place / "top"} if what == "the folder is not there" else {})
        await fill(vm, "vda", 5, offset=5 * MIB)
        await vm.stop(force=True)
        before, active = await snapshot_hashes(vm), await active_hash(vm)
        top = Path((await vm.chains())[0].active.path)
    saved = top.read_bytes()
    if what == "the header is broken":
        _damaged(top)
    else:
        place.rename(home / "away")
    lose(home)
    assert await anyio.to_thread.run_sync(lambda: main(["check", "--rebuild"])) == 0
    assert (f"{place}/mine does not exist" in capsys.readouterr().err) == (what != "the header is broken")
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (await vm.chains())[0].active.path == str(top)
        with pytest.raises(StoreMismatch):
            await vm.start()
        assert "layer-missing" in {finding.code for finding in (await vm.check()).findings}
    if what == "the header is broken":
        top.write_bytes(saved)
    else:
        (home / "away").rename(place)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert (await snapshot_hashes(vm), await active_hash(vm)) == (before, active)
        await hold_invariants(vm)


async def test_what_was_removed_at_chosen_places_is_not_missed(home: Path, place: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(ONE_DISK)
        await vm.start(paused=True)
        await vm.snapshot("s1", files={"vda": place / "mine"})
        await fill(vm, "vda", 1)
        saved = await vm.save(place / "state")
        await vm.commit("vda", consume=True)
        await vm.delete_snapshots("s1", saved.name)
        active = await active_hash(vm)
    assert list(place.iterdir()) == []
    place.rmdir()
    lose(home)
    done = await rebuild.run(at(home), set_aside=False)
    assert ([made.name for made in done.machines], done.left_out) == (["still"], ())
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert await active_hash(vm) == active
        await hold_invariants(vm)


@pytest.mark.parametrize("how", ["absorbed", "undefined"])
async def test_what_a_clone_removed_is_not_missed_where_it_was_made(home: Path, place: Path, how: str) -> None:
    """The name is one that a layer in the machine's folder could have, of a number that the store never gave."""
    async with qmpsnap.open() as q:
        vm = await q.define(ONE_DISK)
        await vm.mirror("vda", place / "copy-999.qcow2", mode="pivot")
        await vm.snapshot("s1")
        (disk,) = ONE_DISK.disks
        base = replace(disk, size=None, base=str(place / "copy-999.qcow2"))
        clone = await q.define(replace(ONE_DISK, name="clone", disks=(base,)))
        await vm.stream("vda")
        await vm.delete_snapshots("s1")
        assert [file.name for file in place.iterdir()] == ["copy-999.qcow2"]
        if how == "undefined":
            await clone.undefine(disks="remove")
        else:
            await clone.stream("vda")
        assert list(place.iterdir()) == []
        await hold_invariants(vm)
        await vm.snapshot("s2")
    lose(home)
    done = await rebuild.run(at(home), set_aside=False)
    assert done.left_out == ()


async def test_an_old_copy_of_the_store_is_noticed_by_a_copy_that_reads_nothing(home: Path, place: Path) -> None:
    async with qmpsnap.open() as q:
        (disk,) = ONE_DISK.disks
        with (place / "theirs").open("wb") as image:
            image.truncate(disk.size or 0)
        vm = await q.define(
            replace(ONE_DISK, disks=(replace(disk, size=None, image=str(place / "theirs"), format="raw"),))
        )
    shutil.copy2(home / "qmpsnap.db", home / "backup")
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.mirror("vda", place / "mine", mode="pivot")
    lose(home)
    shutil.copy2(home / "backup", home / "qmpsnap.db")
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        with pytest.raises(StoreMismatch, match="old copy"):
            await vm.start(paused=True)
        assert not (await vm.chains())[0].running


async def test_numbers_go_on_after_those_of_tags(home: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q)
        for name in ("one", "two"):
            await vm.snapshot(name, kind="internal")
        await vm.stop(force=True)
        serial = context_of(vm).store.next_serial()
    lose(home)
    await rebuild.run(at(home), set_aside=False)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert context_of(vm).store.next_serial() >= serial
        await hold_invariants(vm)


async def _cloned(q: qmpsnap.Controller, base: qmpsnap.MachineHandle) -> qmpsnap.MachineHandle:
    (disk,) = ONE_DISK.disks
    path = (await base.chains())[0].layers[0].layer.path
    return await q.define(replace(ONE_DISK, name="clone", disks=(replace(disk, size=None, base=path),)))


async def _refuses_to_merge(vm: qmpsnap.MachineHandle, snapshot: str, place: Path) -> None:
    """Whatever could take a layer away from under a machine that the store has lost; the rest goes on."""
    for verb in (
        lambda: vm.delete_snapshots(snapshot),
        lambda: vm.commit("vda", consume=True),
        lambda: vm.stream("vda"),
        lambda: vm.revert(snapshot, discard=True),
        lambda: vm.mirror("vda", place / "copy", mode="pivot"),
        vm.pop,
        lambda: vm.undefine(disks="remove"),
    ):
        with pytest.raises(StoreMismatch, match=r"lacks clone.*nothing was changed") as caught:
            await verb()
        assert "check --rebuild --set-aside" in as_typed(caught.value.hint)
    assert [(found.code, "clone" in found.text) for found in (await vm.check()).findings] == [("machine-lost", True)]
    await vm.start(paused=True)
    await vm.snapshot("more")
    await vm.stop(force=True)


async def test_what_a_machine_may_read_that_an_old_store_does_not_have_is_neither_merged_nor_removed(
    home: Path, place: Path
) -> None:
    async with qmpsnap.open() as q:
        await (await grown(q, "gold")).stop(force=True)
    put_back = backed_up(home, records=False)
    async with qmpsnap.open() as q:
        before = await active_hash(await _cloned(q, await q.machine("still")))
    put_back()
    async with qmpsnap.open() as q:
        await _refuses_to_merge(await q.machine("still"), "gold", place)
    assert (await rebuild.run(at(home), set_aside=True)).left_out == ()
    async with qmpsnap.open() as q:
        vm, clone = await q.machine("still"), await q.machine("clone")
        await vm.delete_snapshots("gold")
        assert await active_hash(clone) == before
        for machine in (vm, clone):
            await hold_invariants(machine)


async def test_nor_is_it_after_a_rebuild_that_left_the_machine_out(home: Path, place: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await grown(q, "gold")
        await vm.stop(force=True)
    put_back = backed_up(home, records=True)
    async with qmpsnap.open() as q:
        clone = await _cloned(q, await q.machine("still"))
        older = home.joinpath("machines/clone/record.json").read_bytes()
        await clone.snapshot("newer")
    put_back()
    lose(home)
    (home / "machines/clone/record.json").write_bytes(older)
    assert [name for name, _ in (await rebuild.run(at(home), set_aside=False)).left_out] == ["clone"]
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await _refuses_to_merge(vm, "gold", place)
        (home / "machines/clone/record.json").unlink()
        await vm.delete_snapshots("gold")
        await hold_invariants(vm)


async def test_a_tag_made_after_the_copy_tells_that_the_store_is_old(home: Path) -> None:
    async with qmpsnap.open() as q:
        await (await grown(q)).stop(force=True)
    put_back = backed_up(home, records=True)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.snapshot("inside", kind="internal", memory=False)
        await hold_invariants(vm)
    put_back()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        with pytest.raises(StoreMismatch, match="has a tag with a number"):
            await vm.start()
        assert {finding.code for finding in (await vm.check()).findings} == {"store-older"}


@pytest.mark.parametrize("name", ["clone", "zlone"])
async def test_a_base_that_its_clone_has_noted_too_stays_a_layer_of_its_own_machine(
    home: Path, place: Path, name: str
) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(ONE_DISK)
        await vm.snapshot("s1", files={"vda": place / "mine"})
        await vm.snapshot("s2")
        (disk,) = ONE_DISK.disks
        base = replace(disk, size=None, base=str(place / "mine"))
        clone = await q.define(replace(ONE_DISK, name=name, disks=(base,)), folders=[place])
        context_of(clone).store.records.write(name)  # as `check --repair` does
        before = [view.ids for machine in (vm, clone) for view in await machine.chains()]
    lose(home)
    assert (await rebuild.run(at(home), set_aside=False)).left_out == ()
    async with qmpsnap.open() as q:
        machines = [await q.machine("still"), await q.machine(name)]
        assert [view.ids for machine in machines for view in await machine.chains()] == before
        assert [len(await machine.snapshots()) for machine in machines] == [2, 0]
        for machine in machines:
            await hold_invariants(machine)
