"""Going back: content, branches, what is kept and what goes, every run state, and a death at each step."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed, NameRefused, NameTaken, NotFoundError, QemuGone, StateError, StoreMismatch
from qmpsnap.model.home import RECORD
from qmpsnap.model.layers.snapshot import Point
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.operations.operation import Change
from qmpsnap.ops.base.overlays import make_overlays
from qmpsnap.ops.revert.plan import Run
from qmpsnap.qmp import commands
from tests.harness.deaths import STORE, Call, die_at
from tests.live.booted import start_booted
from tests.live.machine import Hashes, content_hash, context_of, fill, hold_invariants, user_monitor

pytestmark = pytest.mark.version


async def taken(vm: qmpsnap.MachineHandle, name: str, hashes: Hashes, disks: Sequence[str] | None = None) -> None:
    """Take a snapshot and record what it holds."""
    snapshot = await vm.snapshot(name, disks=disks)
    for point in snapshot.points:
        hashes[name, point.disk] = await content_hash(vm, point.layer)


async def two_snapshots(q: qmpsnap.Controller, spec: MachineSpec) -> tuple[qmpsnap.MachineHandle, Hashes]:
    """A paused machine with snapshots ``a`` and ``b``, and writes after both, on both disks."""
    vm = await q.define(spec)
    await vm.start(paused=True)
    hashes: Hashes = {}
    for number, name in enumerate(("a", "b"), start=1):
        await fill(vm, "vda", number)
        await fill(vm, "vdb", number + 100, offset=number << 20)
        await taken(vm, name, hashes)
    await fill(vm, "vda", 3)
    await fill(vm, "vdb", 103)
    return vm, hashes


async def bring(vm: qmpsnap.MachineHandle, state: str) -> None:
    if state == "running":
        async with user_monitor(vm) as qemu:
            await qemu.execute("cont")
    elif state == "stopped":
        await vm.stop(force=True)


def files(vm: qmpsnap.MachineHandle) -> set[str]:
    return {path.name for path in context_of(vm).home.machine_dir(vm.name).iterdir()} - {RECORD}


async def parents(vm: qmpsnap.MachineHandle) -> dict[str, str | None]:
    return {snapshot.name: snapshot.parent for snapshot in await vm.snapshots()}


async def require_content_of(vm: qmpsnap.MachineHandle, name: str, hashes: Hashes, *, taking: str) -> None:
    """Assert that the disks hold what that snapshot holds, by a new snapshot that grows from it."""
    await taken(vm, taking, hashes)
    wanted = {disk: value for (found, disk), value in hashes.items() if found == name}
    assert {disk: hashes[taking, disk] for disk in wanted} == wanted
    assert (await parents(vm))[taking] == name
    await hold_invariants(vm, hashes)


# --- content, branches, run states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, "paused", "running"])
@pytest.mark.parametrize("state", ["running", "paused", "stopped"])
async def test_the_disks_hold_what_the_snapshot_holds_and_the_tree_branches(
    q: qmpsnap.Controller, still_spec: MachineSpec, state: str, wanted: Run | None
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await bring(vm, state)
    before = context_of(vm).process(await vm.record())

    done = await vm.revert("a", state=wanted)
    assert done.state == (wanted or state)
    found = await vm.state()
    assert {"prelaunch": "paused"}.get(found, found) == done.state
    after = context_of(vm).process(await vm.record())
    assert (after is None) == (done.state == "stopped")
    assert after is None or after != before
    assert done.kept is not None
    assert (done.kept.parent, done.kept.mode) == ("b", {"running": "live"}.get(state, state))
    assert (await vm.record()).current == "a"
    for point in done.kept.points:
        hashes[done.kept.name, point.disk] = await content_hash(vm, point.layer)
    await hold_invariants(vm, hashes)
    await require_content_of(vm, "a", hashes, taking="c")
    assert await parents(vm) == {"a": None, "b": "a", done.kept.name: "b", "c": "a"}


async def test_a_revert_is_undone_by_reverting_to_what_it_kept(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await vm.stop(force=True)
    for view in await vm.chains():
        hashes["left", view.disk] = await content_hash(vm, view.layers[-1].layer.id)
    left = {disk: value for (name, disk), value in hashes.items() if name == "left"}
    assert left["vda"] not in (hashes["a", "vda"], hashes["b", "vda"])

    kept = (await vm.revert("a")).kept
    assert kept is not None
    again = await vm.revert(kept)
    assert again.kept is None
    await vm.start(paused=True)
    hashes = {(kept.name if name == "left" else name, disk): value for (name, disk), value in hashes.items()}
    await require_content_of(vm, kept.name, hashes, taking="c")


async def test_the_snapshot_reverted_to_can_be_left_and_reached_again(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    for number, name in enumerate(("a", "b", "a"), start=1):
        await vm.revert(name)
        await fill(vm, "vda", 10 + number, offset=number << 20)
        await hold_invariants(vm, hashes)
    autos = [name for name in await parents(vm) if name.startswith("auto-")]
    assert len(autos) == 3
    assert [(await parents(vm))[name] for name in autos] == ["b", "a", "b"]


async def test_a_snapshot_of_one_disk_leaves_the_other_alone(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await taken(vm, "half", hashes, disks=["vda"])
    await fill(vm, "vda", 50)
    await fill(vm, "vdb", 60)
    other = context_of(vm).store.chains(vm.name)[1]
    done = await vm.revert("half")
    assert context_of(vm).store.chains(vm.name)[1] == other
    assert done.kept is not None
    assert [point.disk for point in done.kept.points] == ["vda"]
    await vm.stop(force=True)
    expected = await content_hash(vm, other.active.id)
    await vm.start(paused=True)
    await require_content_of(vm, "half", hashes, taking="c")
    assert hashes["c", "vdb"] == expected


# --- what is kept and what goes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["paused", "stopped"])
async def test_discarding_removes_what_was_active(q: qmpsnap.Controller, still_spec: MachineSpec, state: str) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await bring(vm, state)
    before = files(vm)
    gone = {chain.active.id for chain in context_of(vm).store.chains(vm.name)}
    done = await vm.revert("a", discard=True)
    assert done.kept is None
    assert set(done.removed) == gone
    assert before - files(vm) == {f"{layer}.qcow2" for layer in gone}
    assert len(files(vm)) == len(before)
    assert await parents(vm) == {"a": None, "b": "a"}
    await require_content_of(vm, "a", hashes, taking="c")


async def test_discarding_takes_the_steps_below_with_it_that_no_snapshot_lists(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    before = len(files(vm))
    await vm.add_layers()
    await fill(vm, "vda", 4)
    await vm.add_layers(disks=["vda"])
    assert len(files(vm)) == before + 3
    done = await vm.revert("b", discard=True)
    assert len(done.removed) == 5
    assert len(files(vm)) == before
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("state", ["running", "paused", "stopped"])
async def test_repeated_reverts_leave_no_litter(q: qmpsnap.Controller, still_spec: MachineSpec, state: str) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await bring(vm, state)
    await vm.revert("a")
    before, snapshots = len(files(vm)), await parents(vm)
    for name in ("a", "b", "a", "a", "b"):
        done = await vm.revert(name)
        assert done.kept is None
        assert len(done.removed) == 2
        assert len(files(vm)) == before
    assert await parents(vm) == snapshots
    await hold_invariants(vm, hashes)


async def test_an_empty_layer_over_content_that_no_snapshot_lists_is_kept(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await vm.add_layers()
    found = (await vm.plan_revert("a")).details
    assert not found.unwritten
    kept = (await vm.revert("a")).kept
    assert kept is not None
    assert kept.name == found.kept
    assert await content_hash(vm, kept.points[0].layer) not in hashes.values()
    await hold_invariants(vm, hashes)


async def test_a_write_after_the_plan_was_made_is_kept(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await vm.revert("b")
    assert (await vm.plan_revert("a")).details.unwritten

    async def late(*arguments: Any) -> Any:
        await fill(vm, "vda", 77)
        return await make_overlays(*arguments)

    monkeypatch.setattr("qmpsnap.ops.revert.revert.make_overlays", late)
    kept = (await vm.revert("a")).kept
    monkeypatch.undo()
    assert kept is not None
    assert await content_hash(vm, kept.points[0].layer) != hashes["b", "vda"]


async def test_a_dry_run_tells_what_the_run_then_does(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    for discard in (False, True):
        process, before = context_of(vm).process(await vm.record()), files(vm)
        found = (await vm.plan_revert("a", discard=discard)).details
        assert (files(vm), context_of(vm).process(await vm.record())) == (before, process)
        done = await vm.revert("a", discard=discard)
        assert (done.kept and done.kept.name) == found.kept
        assert list(done.removed) == [layer.id for layer in found.removed]
        await fill(vm, "vda", 5)
    await hold_invariants(vm, hashes)


# --- refusals and failures ------------------------------------------------------------------------------------------


async def _nothing_changed(vm: qmpsnap.MachineHandle, before: tuple[Any, ...], hashes: Hashes) -> None:
    assert await _picture(vm) == before
    await hold_invariants(vm, hashes)


async def _picture(vm: qmpsnap.MachineHandle) -> tuple[Any, ...]:
    return await vm.record(), files(vm), await vm.snapshots(), await vm.is_running()


async def test_what_cannot_be_reverted_to_is_refused_and_the_guest_runs_on(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    for name, points, state in (("lost", "b", "consumed"), ("tagged", "b", "ok")):
        like = next(snapshot for snapshot in await vm.snapshots() if snapshot.name == points)
        tags = tuple(Point(disk=p.disk, layer=p.layer, tag="t" if name == "tagged" else None) for p in like.points)
        made = replace(like, name=name, state=state, points=tags)
        context_of(vm).store.apply(vm.name, Change(snapshots=(made,)))
    before = await _picture(vm)
    with pytest.raises(NotFoundError, match="no snapshot 'zzz'"):
        await vm.revert("zzz")
    with pytest.raises(StateError, match=r"snapshot lost .* was invalidated") as caught:
        await vm.revert("lost")
    assert (caught.value.exit_code, "qmpsnap snapshot list" in as_typed(caught.value.hint)) == (4, True)
    with pytest.raises(StoreMismatch, match="has no internal snapshot t;"):
        await vm.revert("tagged")
    assert await _picture(vm) == before
    assert {finding.code for finding in (await vm.check()).findings} == {"tag-missing"}
    context_of(vm).store.apply(vm.name, Change(removed_snapshots=("tagged",)))
    await _nothing_changed(vm, await _picture(vm), hashes)


async def test_a_disk_that_a_job_holds_is_refused(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    before = await _picture(vm)
    active = context_of(vm).store.chains(vm.name)[0].active.id
    async with user_monitor(vm) as qemu:
        arguments = {"job-id": "theirs", "device": active, "auto-finalize": False, "speed": 1}
        await qemu.execute("block-stream", arguments)
        with pytest.raises(StateError, match="busy with job theirs"):
            await vm.revert("a")
        await qemu.execute("block-job-cancel", {"device": "theirs", "force": True})
        with anyio.fail_after(10):
            while await qemu.execute("query-jobs"):
                await anyio.sleep(0.01)
    await _nothing_changed(vm, before, hashes)


async def test_a_snapshot_whose_file_is_gone_does_not_cost_the_guest(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, _ = await two_snapshots(q, still_spec)
    await vm.revert("a")  # so that the layer of `b` is in no live chain
    snapshot = next(s for s in await vm.snapshots() if s.name == "b")
    Path(context_of(vm).store.layer(snapshot.points[0].layer).path).unlink()
    before = await _picture(vm)
    with pytest.raises(StoreMismatch, match="there is no image"):
        await vm.revert("b")
    assert await _picture(vm) == before


async def test_an_active_layer_that_is_lost_can_be_left_behind(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await vm.stop(force=True)
    Path(context_of(vm).store.chains(vm.name)[0].active.path).unlink()
    await vm.revert("b", discard=True)
    await vm.start(paused=True)
    await require_content_of(vm, "b", hashes, taking="c")


async def test_a_qemu_that_does_not_answer_quit_is_killed(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)

    async def silent(*_: object) -> None:
        raise DeadlinePassed("no answer")

    monkeypatch.setattr(commands, "control", silent)
    await vm.revert("a")
    monkeypatch.undo()
    await require_content_of(vm, "a", hashes, taking="c")


async def test_a_machine_that_does_not_start_again_stands_at_the_snapshot_and_says_so(
    q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)

    async def failing(*_: object, **__: object) -> None:
        raise QemuGone("QEMU did not start", hint="look at its log")

    monkeypatch.setattr("qmpsnap.ops.lifecycle.power.launch", failing)
    with pytest.raises(QemuGone) as caught:
        await vm.revert("a")
    monkeypatch.undo()
    assert caught.value.effect == "applied"
    assert as_typed(caught.value.hint) == "the machine is at a and stopped: qmpsnap start still"
    operation = context_of(vm).store.operations(vm.name)[-1]
    assert operation.state == "settled"
    assert operation.error == "QEMU did not start; the machine was not started again"
    assert await vm.state() == "stopped"
    await vm.start(paused=True)
    await require_content_of(vm, "a", hashes, taking="c")


async def test_a_verb_that_ends_a_broken_revert_finds_the_machine_stopped(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await die_at(Call(STORE, "SqliteStore.mark", "after", 1), "snapshot", "revert", "still", "a")
    assert await vm.is_running()
    assert (await vm.snapshot("c")).mode == "stopped"
    assert not await vm.is_running()
    assert (await parents(vm))["c"] == "a"
    await hold_invariants(vm, hashes)


# --- rename and steps without a name --------------------------------------------------------------------------------


async def test_a_renamed_snapshot_is_followed_by_all_that_grew_from_it(
    q: qmpsnap.Controller, still_spec: MachineSpec
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    assert (await vm.rename_snapshot("a", "first")).name == "first"
    assert (await vm.rename_snapshot("b", "second")).parent == "first"
    assert (await vm.record()).current == "second"
    renamed = {({"a": "first", "b": "second"}[name], disk): value for (name, disk), value in hashes.items()}
    await vm.revert("first")
    await require_content_of(vm, "first", renamed, taking="a")
    before = await _picture(vm)
    with pytest.raises(NameTaken):
        await vm.rename_snapshot("first", "second")
    with pytest.raises(NotFoundError):
        await vm.rename_snapshot("zzz", "y")
    with pytest.raises(NameRefused):
        await vm.rename_snapshot("first", "No!")
    assert await _picture(vm) == before


@pytest.mark.parametrize("state", ["paused", "stopped"])
async def test_a_step_without_a_snapshot_is_in_the_chain_and_not_in_the_list(
    q: qmpsnap.Controller, still_spec: MachineSpec, state: str
) -> None:
    vm, hashes = await two_snapshots(q, still_spec)
    await bring(vm, state)
    snapshots, current = await vm.snapshots(), (await vm.record()).current
    layers = await vm.add_layers()
    assert [view.layers[-1].layer.id for view in await vm.chains()] == [layer.id for layer in layers]
    assert (await vm.snapshots(), (await vm.record()).current) == (snapshots, current)
    await hold_invariants(vm, hashes)
    await taken(vm, "c", hashes)
    assert (await parents(vm))["c"] == "b"
    await hold_invariants(vm, hashes)


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_says_what_was_done(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = home / "s.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n")

    def said(line: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(shlex.split(line)) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    assert main(["define", str(spec)]) == 0
    for name in ("a", "b"):
        assert main(["snapshot", "create", "still", name]) == 0
    made = said("snapshot create still --no-snapshot -o json")
    assert (made["snapshot"], [layer["layer"] for layer in made["layers"]]) == (None, ["vda-4"])
    foretold = said("snapshot revert still a --dry-run -o json")
    assert (foretold["kept"], foretold["removed"], foretold["qmp"], foretold["start"]) == ("auto-5", [], [], None)
    answer = said("snapshot revert still a -o json")
    assert answer == {
        "schema": "qmpsnap/1",
        "machine": "still",
        "snapshot": "a",
        "kept": "auto-5",
        "removed": [],
        "state": "stopped",
        "memory": False,
        "notes": [],
        "clock_error_ms": None,
        "detached": [],
    }
    assert [Path(path).name for path in said("snapshot revert still b --dry-run -o json")["removed"]] == ["vda-5.qcow2"]
    assert main(shlex.split("snapshot revert still b")) == 0
    assert capsys.readouterr().out == "machine still is at b, stopped; vda-5 removed\n"
    assert main(shlex.split("snapshot rename still b second")) == 0
    assert main(shlex.split("snapshot revert still auto-5 --discard")) == 0
    assert capsys.readouterr().out == "machine still is at auto-5, stopped; vda-6 removed\n"
    assert {s["name"]: s["parent"] for s in said("snapshot list still -o json")["snapshots"]} == {
        "a": None,
        "second": "a",
        "auto-5": "second",
    }
    assert main(shlex.split("snapshot create still x --no-snapshot")) == 2
    assert main(shlex.split("snapshot revert still zzz")) == 3
    assert main(shlex.split("snapshot rename still a second")) == 4
    assert main(shlex.split("snapshot rename still a Bad!")) == 2


# --- a guest --------------------------------------------------------------------------------------------------------


async def test_a_guest_finds_its_file_again_after_a_revert(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo kept > /mnt/file && sync")
    await vm.snapshot("with-file", description="the file is there")
    await vm.run("rm /mnt/file && echo other > /mnt/later && sync")
    done = await vm.revert("with-file")
    assert done.state == "running"
    assert done.kept is not None
    await vm.run("e2fsck -fp /dev/vda || test $? -le 1")
    assert (await vm.run("mkdir -p /mnt && mount /dev/vda /mnt && cat /mnt/file && ls /mnt")).stdout.split() == [
        *("kept", "file", "lost+found"),
    ]
    await vm.revert(done.kept)
    await vm.run("e2fsck -fp /dev/vda || test $? -le 1")
    listed = (await vm.run("mkdir -p /mnt && mount /dev/vda /mnt && cat /mnt/later && ls /mnt")).stdout.split()
    assert listed == ["other", "later", "lost+found"]
    await vm.stop(force=True)
    await hold_invariants(vm)
