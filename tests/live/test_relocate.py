"""Homes that were moved, copied or put back from a backup, and single files: told, refused, and a way to go on."""

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError, StoreMismatch
from qmpsnap.model.home import Home
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.base import relocate
from qmpsnap.ops.base.context import opened
from qmpsnap.ops.rebuild import rebuild
from tests.harness.deaths import STORE, Call, die_at
from tests.live.machine import (
    MIB,
    Hashes,
    active_hash,
    hold_invariants,
    snapshot_hashes,
    user_monitor,
)

SPEC = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),))


@pytest.fixture
def first(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that can be moved: the fixture's folder stays around it."""
    folder = home / "first"
    monkeypatch.setenv("QMPSNAP_HOME", str(folder))
    return folder


def at(home: Path) -> Home:
    return Home.from_environment({"QMPSNAP_HOME": str(home)}, uid=os.geteuid())


def img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def write(path: str | Path, pattern: int, offset: int) -> None:
    """What a guest would write; QEMU is not running."""
    command = f"write -q -P {pattern} {offset}k 64k"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, path], check=True, capture_output=True)


async def two_snapshots(q: qmpsnap.Controller, spec: MachineSpec = SPEC) -> tuple[Hashes, str]:
    """A stopped machine with s1 and s2, each with a text, and other content in each layer; their hashes, the disk's."""
    vm = await q.define(spec)
    for number, name in enumerate(("s1", "s2"), start=1):
        write((await vm.chains())[0].active.path, number, number * 64)
        await vm.snapshot(name, description=f"text of {name}")
    write((await vm.chains())[0].active.path, 9, 0)
    return await snapshot_hashes(vm), await active_hash(vm)


async def is_as_before(before: tuple[Hashes, str], *, name: str = "still") -> None:
    """Names, texts, tree and content are what they were, all promises hold, and the machine takes one more."""
    async with qmpsnap.open() as q:
        vm = await q.machine(name)
        assert [(s.name, s.parent, s.description) for s in await vm.snapshots()] == [
            ("s1", None, "text of s1"), ("s2", "s1", "text of s2"),
        ]  # fmt: skip
        assert (await snapshot_hashes(vm), await active_hash(vm)) == before
        await hold_invariants(vm, before[0])
        await vm.snapshot("next")
        await vm.revert("s1")
        await vm.delete_snapshots("next")
        await hold_invariants(vm)


async def moved(*, accept_copies: bool = False, dry_run: bool = False) -> relocate.Relocated:
    async with opened() as context:
        return await relocate.run(context, accept_copies=accept_copies, dry_run=dry_run)


async def is_refused_by_all(how: str) -> None:
    """No verb changes anything, and each names the way on."""
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        verbs: list[Callable[[], Awaitable[object]]] = [
            vm.start,
            lambda: vm.snapshot("no"),
            lambda: vm.revert("s1"),
            lambda: vm.delete_snapshots("s1"),
            lambda: vm.commit("vda", consume=True),
        ]
        if how == "home-moved":  # else it leaves them alone
            verbs.append(lambda: vm.undefine(disks="remove"))
        for verb in verbs:
            with pytest.raises(StoreMismatch) as caught:
                await verb()
            assert "qmpsnap relocate" in as_typed(caught.value.hint), caught.value
        for mend in (False, True):
            found = await vm.check(repair=mend)
            assert how in {finding.code for finding in found.findings}
    with pytest.raises(StateError, match="nothing was changed") as refused:
        await rebuild.run(at(Path(os.environ["QMPSNAP_HOME"])), set_aside=True)
    assert "qmpsnap relocate" in as_typed(refused.value.hint)


def headers(home: Path) -> set[str | None]:
    return {header.read(path).backing for path in home.rglob("*.qcow2")}


async def test_a_home_that_was_moved(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first / "chosen").mkdir(parents=True)
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
        clone = replace(SPEC.disks[0], size=None, base=str(first / "machines/still/vda-1.qcow2"))
        await q.define(replace(SPEC, name="clone", disks=(clone,)))
    there = first.rename(first.with_name("there"))
    monkeypatch.setenv("QMPSNAP_HOME", str(there))
    await is_refused_by_all("home-moved")
    async with opened() as context:
        home_id = context.store.home.record()
    looked = await moved(dry_run=True)
    assert headers(there) > {str(first / "machines/still/vda-1.qcow2")}, "only looked at"
    done = await moved()
    assert (done.done, looked.rewritten, done.original) == (True, done.rewritten, None)
    assert {one.verdict for one in done.compared} == {"recorded"}
    async with opened() as context:
        assert (await moved()).done is False, "there is nothing left to do"
        record = context.store.home.record()
        assert record
        assert home_id
        assert (record.id, record.path, record.moving) == (home_id.id, str(there), None)
        spec = context.store.machine("clone").spec
    assert spec.disks[0].base == str(there / "machines/still/vda-1.qcow2")
    await is_as_before(before)
    async with qmpsnap.open() as q:
        vm = await q.machine("clone")
        await vm.start(paused=True)
        await vm.stop(force=True)
        await hold_invariants(vm)


async def test_a_home_that_was_moved_before_homes_were_recorded(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
    record = first / "machines/still/record.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "home"}))
    with sqlite3.connect(first / "qmpsnap.db") as sql:
        sql.execute("DELETE FROM home")
    sql.close()
    monkeypatch.setenv("QMPSNAP_HOME", str(first.rename(first.with_name("there"))))
    await is_refused_by_all("home-moved")
    await moved()
    await is_as_before(before)


async def test_another_name_of_the_same_folder_is_the_same_home(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
    alias = first.with_name("alias")
    alias.symlink_to(first)
    monkeypatch.setenv("QMPSNAP_HOME", str(alias))
    assert (await moved(dry_run=True)).new == str(first)
    await is_as_before(before)
    assert not [said for said in headers(first) if said and "alias" in said]


async def test_a_home_that_was_put_back_from_a_copy(first: Path) -> None:
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
    shutil.copytree(first, first.with_name("backup"))
    shutil.rmtree(first)
    first.with_name("backup").rename(first)
    await is_refused_by_all("layer-replaced")
    with pytest.raises(StateError, match="no digest is recorded; last written") as caught:
        await moved()
    assert "--accept-copies" in as_typed(caught.value.hint)
    assert (await moved(accept_copies=True)).done
    await is_as_before(before)


async def test_memory_that_was_put_back_is_proven_by_its_digest(first: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        await vm.start()
        state = (await vm.snapshot("full", kind="full")).vmstate
        await vm.stop(force=True)
    assert state
    for path in (Path(state.path), first / "machines/still/vda-1.qcow2"):
        path.with_suffix(".old").write_bytes(path.read_bytes())  # while the inode is not free
        path.with_suffix(".old").replace(path)
        path.chmod(0o600)
    looked = await moved(dry_run=True)
    assert sorted(one.verdict for one in looked.compared) == ["copy", "proven", "recorded"]
    Path(state.path).write_bytes(bytes(8) + Path(state.path).read_bytes()[8:])
    looked = await moved(dry_run=True)
    assert sorted(one.verdict for one in looked.compared) == ["copy", "differs", "recorded"]


@pytest.mark.parametrize("what", ["size", "backing", "garbage", "gone"])
async def test_what_cannot_be_a_copy_is_never_taken_over(first: Path, what: str) -> None:
    async with qmpsnap.open() as q:
        await two_snapshots(q)
    victim = first / "machines/still/vda-2.qcow2"
    other = victim.with_suffix(".other")
    match what:
        case "size":
            img("create", "-q", "-f", "qcow2", other, "2M")
        case "backing":
            img("create", "-q", "-f", "qcow2", other, "1M")
        case "garbage":
            other.write_bytes(b"mine" * 1000)
        case _:
            other.write_bytes(b"")
    other.replace(victim)
    if what == "gone":
        victim.unlink()
    kept = victim.read_bytes() if victim.exists() else None
    done = await moved(accept_copies=True)
    verdicts = {Path(one.path).name: one.verdict for one in done.compared}
    assert verdicts["vda-2.qcow2"] == ("missing" if what in ("gone", "garbage") else "differs")
    assert await anyio.to_thread.run_sync(lambda: main(["relocate", "--accept-copies"])) == 7
    assert (victim.read_bytes() if victim.exists() else None) == kept
    async with qmpsnap.open() as q:
        with pytest.raises(StoreMismatch):
            await (await q.machine("still")).start()


DEATHS = {
    "before a header": Call("qmpsnap.ops.base.relocate", "set_backing", "before", 1),
    "between two headers": Call("qmpsnap.ops.base.relocate", "set_backing", "after", 1),
    "before the store has it": Call("qmpsnap.store.sqlite.homes", "HomeTable.finish", "before", 1),
    "after it has": Call("qmpsnap.store.sqlite.homes", "HomeTable.finish", "after", 1),
}


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("then", ["the next command", "moved once more"])
async def test_whoever_is_killed_in_between_leaves_it_to_the_next_command(
    first: Path, monkeypatch: pytest.MonkeyPatch, death: str, then: str
) -> None:
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
    there = first.rename(first.with_name("there"))
    monkeypatch.setenv("QMPSNAP_HOME", str(there))
    await die_at(DEATHS[death], "relocate")
    if then == "moved once more":
        monkeypatch.setenv("QMPSNAP_HOME", str(there.rename(there.with_name("elsewhere"))))
        await moved()
    else:
        async with qmpsnap.open() as q:
            await (await q.machine("still")).recover()
    await is_as_before(before)


async def test_an_operation_that_was_open_is_ended_where_the_home_is_now(
    first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
    await die_at(Call(STORE, "SqliteStore.settle", "before", 1), "snapshot", "create", "still", "s3")
    monkeypatch.setenv("QMPSNAP_HOME", str(first.rename(first.with_name("there"))))
    await moved()
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.recover()
        assert [found.name for found in await vm.snapshots()][:2] == ["s1", "s2"]
        await hold_invariants(vm, before[0])


async def test_a_copy_beside_its_original_never_touches_that(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = first.with_name("outside")
    outside.mkdir()
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
        await (await q.define(replace(SPEC, name="far"))).snapshot("x", files={"vda": outside / "far.qcow2"})
        vm = await q.machine("still")
        await vm.start(paused=True)
    copy = first.with_name("copy")
    shutil.copytree(first, copy, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
    original = {path: path.read_bytes() for path in [*first.rglob("*.qcow2"), *outside.iterdir()]}
    monkeypatch.setenv("QMPSNAP_HOME", str(copy))
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert not await vm.is_running(), "that QEMU is the original's"
        with pytest.raises(StateError, match="is not running"):
            await vm.stop(force=True)
    done = await moved(accept_copies=True)
    assert done.original == str(first)
    verdicts = {Path(one.path).name: one.verdict for one in done.compared}
    assert verdicts["far.qcow2"] == "other home's"
    await is_as_before(before)
    async with qmpsnap.open() as q:
        with pytest.raises(StoreMismatch):
            await (await q.machine("far")).start()
        await (await q.machine("far")).undefine(disks="remove")
        await (await q.machine("still")).undefine(disks="remove")
    assert {path: path.read_bytes() for path in original} == original
    monkeypatch.setenv("QMPSNAP_HOME", str(first))
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        assert await vm.is_running()
        await vm.stop(force=True)
    await is_as_before(before)


async def test_a_copy_that_has_lost_its_store_is_made_from_its_own_files(
    first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with qmpsnap.open() as q:
        before = await two_snapshots(q)
    copy = Path(shutil.copytree(first, first.with_name("copy")))
    original = {path: path.read_bytes() for path in first.rglob("*.qcow2")}
    for file in copy.glob("qmpsnap.db*"):
        file.unlink()
    monkeypatch.setenv("QMPSNAP_HOME", str(copy))
    done = await rebuild.run(at(copy), set_aside=False)
    assert (done.left_out, done.moved_from) == ((), str(first))
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        (chain,) = await vm.chains()
        assert {Path(layer.layer.path).parent for layer in chain.layers} == {copy / "machines/still"}
        with pytest.raises(StoreMismatch) as caught:
            await vm.delete_snapshots("s1")
        assert "qmpsnap relocate" in as_typed(caught.value.hint)
    with pytest.raises(StateError, match="no digest is recorded"):
        await moved()
    assert (await moved(accept_copies=True)).original == str(first)
    await is_as_before(before)
    assert {path: path.read_bytes() for path in original} == original


async def test_a_store_that_can_be_read_is_not_put_aside_to_leave_a_machine_out(first: Path) -> None:
    async with qmpsnap.open() as q:
        await two_snapshots(q)
        await q.define(replace(SPEC, name="other"))
    (first / "machines/other/record.json").unlink()
    store = (first / "qmpsnap.db").read_bytes()
    with pytest.raises(StateError, match="has machine other, which a rebuild would lose: it has no record"):
        await rebuild.run(at(first), set_aside=True)
    assert (first / "qmpsnap.db").read_bytes() == store
    assert list(first.glob("*aside*")) == []


async def test_a_file_with_the_same_inode_and_another_birth_is_another_file(first: Path) -> None:
    async with qmpsnap.open() as q:
        await two_snapshots(q)
        vm = await q.machine("still")
        base = (await vm.chains())[0].layers[0].layer
        if not base.birth:
            pytest.skip("the file system keeps no time of birth")
        with sqlite3.connect(first / "qmpsnap.db") as sql:
            sql.execute("UPDATE layer SET birth = birth - 1 WHERE id = ?", (base.id,))
        sql.close()
        assert "layer-replaced" in {finding.code for finding in (await vm.check()).findings}
        for verb in (vm.start, lambda: vm.snapshot("no"), lambda: vm.revert("s1")):
            with pytest.raises(StoreMismatch, match="is not the recorded file"):
                await verb()
        await vm.undefine(disks="remove")
        assert Path(base.path).exists(), "what replaced the layer is somebody's"


async def test_births_that_an_earlier_release_did_not_record_are_recorded_by_repair(first: Path) -> None:
    async with qmpsnap.open() as q:
        vm = await q.define(SPEC)
        layer = (await vm.chains())[0].active
        with sqlite3.connect(first / "qmpsnap.db") as sql:
            sql.execute("UPDATE layer SET birth = 0")
        sql.close()
        await vm.check()
        assert (await vm.chains())[0].active.birth == 0, "looking records nothing"
        await vm.check(repair=True)
        assert (await vm.chains())[0].active == layer


@pytest.mark.parametrize("how", ["stopped", "running"])
async def test_a_disk_that_was_made_larger_goes_on(first: Path, how: str) -> None:
    async with qmpsnap.open() as q:
        before, _ = await two_snapshots(q)
        vm = await q.machine("still")
        active = (await vm.chains())[0].active
        if how == "running":
            await vm.start(paused=True)
            async with user_monitor(vm) as qemu:
                await qemu.execute("block_resize", {"node-name": active.id, "size": 2 * MIB})
        else:
            img("resize", "-q", "-f", "qcow2", active.path, "2M")
        with pytest.raises(StoreMismatch) as caught:
            await vm.snapshot("no")
        assert "--repair" in as_typed(caught.value.hint)
        done = await vm.check(repair=True)
        assert (done.findings, [found.code for found in done.repaired]) == ((), ["size-differs"])
        await vm.snapshot("large")
        await hold_invariants(vm, before)
        if how == "running":
            await vm.stop(force=True)
        await vm.start(paused=True)
        await vm.stop(force=True)
        await vm.revert("s1")
        assert (await vm.chains())[0].active.virtual_size == MIB
        await vm.revert("large")
        assert (await vm.chains())[0].active.virtual_size == 2 * MIB
        await vm.delete_snapshots("s2")
        await hold_invariants(vm, {key: value for key, value in before.items() if key[0] == "s1"})


def test_a_home_that_is_none_and_a_lost_store_are_told(
    first: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words in ("list", "check", "doctor"):
        assert main([words]) == 7
        said = capsys.readouterr()
        assert "there is no home at" in said.out + said.err
    for words in ("tree still", "show still", "snapshot list still", "chain still", "log still", "check still"):
        assert main(words.split()) == 3
    assert not first.exists()
    spec = tmp_path / "still.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n")
    assert main(["define", str(spec)]) == 0
    capsys.readouterr()
    assert main(["list"]) == 0
    for empty in (False, True):
        for file in first.glob("qmpsnap.db*"):
            file.unlink()
        if empty:
            (first / "qmpsnap.db").touch()
        for words in ("list", "check", "doctor"):
            assert main([words]) == 7
            said = capsys.readouterr()
            assert "still" in said.out + said.err
            assert "check --rebuild" in said.out + said.err
        assert main(["list", "-o", "json"]) == 7
        assert json.loads(capsys.readouterr().out)["machines"] == []
    assert main(["check", "--rebuild"]) == 0
    assert main(["list"]) == 0
