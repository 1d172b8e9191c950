"""Snapshots inside the images: with and without memory, gone back to in place or taken out, deleted, mixed."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import internal_snapshots
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, NameTaken, QmpError, QmpsnapError, StateError
from qmpsnap.machine.starting.run_files import CONSOLE_LOG
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec, NicSpec
from qmpsnap.model.names import LayerId
from qmpsnap.ops.base.free_space import Need
from qmpsnap.ops.internal import tags as tagging
from qmpsnap.ops.revert import revert
from tests.harness.deaths import Call, die_at
from tests.harness.processes import kill_qemu
from tests.live.booted import start_booted
from tests.live.digest import raw_digest
from tests.live.machine import MIB, content_hash, context_of, fill, hold_invariants, user_monitor
from tests.live.test_full import COUNT, count, counted, require_a_whole_disk, say

pytestmark = pytest.mark.version

QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"


@pytest.fixture
def qcow2_spec() -> MachineSpec:
    return MachineSpec(
        name="still",
        memory=64 * MIB,
        disks=(DiskSpec(name="vda", size=16 * MIB), DiskSpec(name="vdb", size=16 * MIB)),
    )


def tags_in(vm: qmpsnap.MachineHandle, layer: str) -> list[dict[str, Any]]:
    path = context_of(vm).store.layer(LayerId(layer)).path
    said = subprocess.run([QEMU_IMG, "info", "-U", "--output=json", path], check=True, capture_output=True).stdout
    found: list[dict[str, Any]] = json.loads(said).get("snapshots", [])
    return found


async def tag_hash(vm: qmpsnap.MachineHandle, layer: LayerId, tag: str) -> str:
    """Digest of what a layer held when the tag was made, read by qemu-img from the tag itself."""
    found = context_of(vm).store.layer(layer)
    copy = Path(found.path).with_suffix(".raw")
    argv = [QEMU_IMG, "convert", "-U", "-f", "qcow2", "-l", f"snapshot.name={tag}", "-O", "raw", found.path, str(copy)]
    await anyio.run_process(argv)
    digest = raw_digest(copy)
    copy.unlink()
    return digest


async def test_memory_and_disks_inside_in_the_same_process(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run(COUNT)
    await counted(vm, 3)
    snapshot = await vm.snapshot("inside", kind="internal")
    assert snapshot.inside is not None
    assert snapshot.inside.bytes > 8 * MIB
    assert snapshot.pause_ms is not None
    tag = snapshot.points[0].tag
    assert str(tag).startswith("qs-3-")
    assert [(p.disk, p.layer, p.tag) for p in snapshot.points] == [("vda", "vda-1", tag), ("vdb", "vdb-2", tag)]
    assert (await vm.snapshots())[-1] == snapshot
    await vm.run("touch /dev/shm/later")
    process = (await vm.record()).process
    reverted = await vm.revert("inside")
    assert (reverted.state, reverted.memory) == ("running", True)
    assert reverted.kept is not None  # what ran a moment ago, memory included
    assert (reverted.kept.kind, reverted.kept.inside is not None) == ("internal", True)
    assert (await vm.record()).process == process  # the same QEMU
    assert await say(vm, "ls /dev/shm") == ""
    await counted(vm, await count(vm) + 2)
    await hold_invariants(vm)
    await vm.revert(reverted.kept.name, discard=True)  # the revert undone
    assert await say(vm, "ls /dev/shm") == "later"
    await counted(vm, await count(vm) + 2)
    await require_a_whole_disk(vm)
    await vm.revert("inside", discard=True)
    await require_a_whole_disk(vm)
    await vm.delete_snapshots("inside", reverted.kept.name)
    assert await vm.snapshots() == ()
    assert [tags_in(vm, layer) for layer in ("vda-1", "vdb-2")] == [[], []]
    await hold_invariants(vm)


async def test_in_place_nothing_is_flushed_between_the_two(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    console = context_of(vm).home.log_dir("guest") / CONSOLE_LOG
    await start_booted(vm)
    await vm.run(COUNT.replace("    sync /mnt/log", "    sync /mnt/log; echo @$i >/dev/ttyS0"))  # flushed, so told
    await counted(vm, 3)
    await vm.snapshot("inside", kind="internal")
    await counted(vm, await count(vm) + 5)
    async with user_monitor(vm) as qemu:
        with qemu.listener(("STOP", "RESUME")) as heard:
            reverted = await vm.revert("inside", state="paused")
            assert [event["event"] for event in heard.clear()] == ["STOP"]  # held all the while
        assert reverted.kept is not None
        until = console.stat().st_size  # what it said before the snapshot was loaded
        await qemu.execute("cont")
    await counted(vm, await count(vm) + 2)
    await vm.revert(reverted.kept.name, discard=True, state="paused")
    since = console.stat().st_size
    async with user_monitor(vm) as qemu:
        await qemu.execute("cont")
    await counted(vm, await count(vm) + 2)
    await require_a_whole_disk(vm)
    text = console.read_bytes()
    told = [int(number) for number in re.findall(rb"@(\d+)\r\n", text[:until] + text[since:])]
    assert told == list(range(1, len(told) + 1))


async def test_below_a_layer_it_is_taken_out(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run(COUNT)
    await counted(vm, 3)
    await vm.snapshot("inside", kind="internal")
    await vm.run("touch /dev/shm/later")
    await vm.snapshot("above")  # now a layer lies on the image with the tag
    held = await content_hash(vm, "vda-1")
    reverted = await vm.revert("inside")
    assert (reverted.state, reverted.memory) == ("running", True)
    assert await content_hash(vm, "vda-1") == held  # never rolled back: "above" reads it
    assert await say(vm, "ls /dev/shm") == ""
    await counted(vm, await count(vm) + 2)
    assert [tags_in(vm, chain.active.id) for chain in await vm.chains()] == [[], []]
    await hold_invariants(vm)
    await vm.stop(force=True)
    again = await vm.revert("inside")  # of a stopped machine
    assert (again.state, again.memory) == ("running", True)
    await counted(vm, 1)
    await require_a_whole_disk(vm)
    await hold_invariants(vm)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
async def test_disks_alone(q: qmpsnap.Controller, qcow2_spec: MachineSpec, *, running: bool) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await fill(vm, "vdb", 2)
    if not running:
        await vm.stop(force=True)
    snapshot = await vm.snapshot("inside", kind="internal", memory=False)
    assert snapshot.inside is None
    hashes = {point.disk: await tag_hash(vm, point.layer, str(point.tag)) for point in snapshot.points}
    if not running:
        await vm.start(paused=True)
    await fill(vm, "vda", 3)
    await fill(vm, "vdb", 4)
    if not running:
        await vm.stop(force=True)
    reverted = await vm.revert("inside")
    assert reverted.state == ("paused" if running else "stopped")
    assert reverted.memory is False
    assert reverted.kept is not None  # what was written since, wherever that lies
    kept = {point.disk: await content_hash(vm, point.layer) for point in reverted.kept.points}
    assert kept["vda"] != hashes["vda"]
    chains = await vm.chains()
    if running:
        await vm.stop(force=True)
    for chain in chains:
        assert await content_hash(vm, chain.active.id) == hashes[chain.disk]
        assert tags_in(vm, chain.active.id) == []
    for point in snapshot.points:
        assert await tag_hash(vm, point.layer, str(point.tag)) == hashes[point.disk]
    await hold_invariants(vm)
    await vm.delete_snapshots("inside")
    forest = context_of(vm).store.forest()
    assert all(tags_in(vm, layer) == [] for layer in forest.layers)
    await hold_invariants(vm)


@pytest.mark.parametrize("why", ["no room", "a file is another", "something comes in between"])
async def test_a_refused_revert_puts_nothing_on_top_or_says_so(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    await vm.snapshot("inside", kind="internal", memory=False)
    needs = revert._needs
    before, active = [chain.ids for chain in await vm.chains()], Path((await vm.chains())[0].active.path)
    if why == "no room":
        huge = Need(str(active.parent), 1 << 60, "a copy")
        monkeypatch.setattr(revert, "_needs", lambda *given: [*needs(*given), huge])
    elif why == "a file is another":
        active.rename(active.with_suffix(".mine"))
        active.write_bytes(active.with_suffix(".mine").read_bytes())
    else:
        monkeypatch.setattr(revert, "require_kept", partial(_refuse, iter([False, True])))
    with pytest.raises(QmpsnapError, match=r"nothing was changed|created for it") as refused:
        await vm.revert("inside")
    monkeypatch.setattr(revert, "_needs", needs)
    if why == "something comes in between":
        assert (refused.value.effect, refused.value.hint) == ("applied", "")
        tops = ", ".join(chain.active.id for chain in await vm.chains())
        assert f"the overlay {tops}, created for it, stays" in refused.value.message
    else:
        assert refused.value.effect == "none"
        assert [chain.ids for chain in await vm.chains()] == before
    if why == "a file is another":
        active.with_suffix(".mine").rename(active)
    await hold_invariants(vm)


def _refuse(answers: Iterator[bool], *_: object) -> None:
    if next(answers):
        raise StateError("somebody was here")


async def test_a_mixed_tree_keeps_every_invariant(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start()
    hashes: dict[tuple[str, str], str] = {}
    inside: dict[tuple[LayerId, str], str] = {}

    async def taken(snapshot: qmpsnap.Snapshot) -> None:
        for point in snapshot.points:
            if point.tag:
                inside[point.layer, point.tag] = await tag_hash(vm, point.layer, point.tag)
            else:
                hashes[snapshot.name, point.disk] = await content_hash(vm, point.layer)

    async def hold() -> None:
        await hold_invariants(vm, hashes)
        for (layer, tag), digest in inside.items():
            assert await tag_hash(vm, layer, tag) == digest

    for number, kind in enumerate(("disk", "internal", "full", "internal", "disk", "full"), start=1):
        await fill(vm, "vda", number)
        await taken(await vm.snapshot(f"s{number}", kind=kind))  # type: ignore[call-overload]
        await hold()
    assert [s.kind for s in await vm.snapshots()] == ["disk", "internal", "full", "internal", "disk", "full"]
    await vm.stream("vda")  # the active layer has no tag; those below stay as they are
    await hold()
    for name in ("s2", "s3", "s4", "s1"):
        await vm.revert(name)
        await hold()
    await vm.stop(force=True)
    await vm.delete_snapshots("s3")
    hashes = {key: value for key, value in hashes.items() if key[0] != "s3"}
    await hold()
    await vm.delete_snapshots("s2", "s4")
    inside.clear()
    await hold()


async def test_a_commit_names_what_it_would_take_from_inside(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    tag = str((await vm.snapshot("base", kind="internal", memory=False)).points[0].tag)  # inside vda-1
    await vm.snapshot("one")  # freezes vda-1
    await vm.snapshot("two", kind="internal", memory=False)  # inside vda-4
    kept = await tag_hash(vm, LayerId("vda-1"), tag)
    with pytest.raises(StateError, match="one, two") as refused:
        await vm.commit("vda")
    assert "base" not in refused.value.message
    await vm.commit("vda", consume=True)
    states = {s.name: s.state for s in await vm.snapshots()}
    assert states == {"base": "ok", "one": "consumed", "two": "consumed"}
    assert await tag_hash(vm, LayerId("vda-1"), tag) == kept  # an image's own tags survive a commit into it
    await hold_invariants(vm)


async def test_a_stream_never_moves_the_ground_below_a_tag(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("one")
    await vm.snapshot("two")
    await vm.snapshot("inside", kind="internal", memory=False)
    with pytest.raises(StateError, match="holds internal snapshot inside"):
        await vm.stream("vda")
    await hold_invariants(vm)
    await vm.snapshot("three")
    with pytest.raises(StateError, match="can only read it"):
        await vm.delete_snapshots("inside")
    await vm.delete_snapshots("inside", metadata=True)
    await hold_invariants(vm)


async def test_deleting_never_takes_another_snapshot_along(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    await vm.snapshot("one")
    await fill(vm, "vda", 2)
    inside = await vm.snapshot("inside", kind="internal", memory=False)
    held = {point.disk: await tag_hash(vm, point.layer, str(point.tag)) for point in inside.points}
    await fill(vm, "vda", 3)
    await vm.delete_snapshots("one")
    assert [(s.name, s.state) for s in await vm.snapshots()] == [("inside", "ok")]
    for point in inside.points:
        assert await tag_hash(vm, point.layer, str(point.tag)) == held[point.disk]
    await hold_invariants(vm)


async def test_a_load_that_fails_leaves_no_guest_running(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start()
    await fill(vm, "vda", 1)
    snapshot = await vm.snapshot("inside", kind="internal")
    held = await tag_hash(vm, snapshot.points[0].layer, str(snapshot.points[0].tag))
    await vm.stop(force=True)
    store: Any = context_of(vm).store
    text = msgspec.json.encode(replace((await vm.record()).spec, memory=96 * MIB)).decode()
    store._database.connection.execute("UPDATE machine SET spec = ? WHERE name = 'still'", (text,))
    store.records.write("still")
    await vm.start()
    await fill(vm, "vda", 2)
    with pytest.raises(StateError, match="different virtual hardware"):
        await vm.revert("inside", discard=True)
    assert await vm.state() == "running"
    monkeypatch.setattr("qmpsnap.ops.revert.in_place.require_fits", lambda *_, **__: None)
    with pytest.raises(QmpError, match="failed") as failed:
        await vm.revert("inside", discard=True)
    assert failed.value.effect == "applied"
    assert await vm.state() == "stopped"  # half of it was loaded: nothing of that runs
    assert await content_hash(vm, "vda-1") == held
    await hold_invariants(vm)


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_what_cannot_be_kept_is_not_left(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start()
    await vm.snapshot("inside", kind="internal")
    if state == "paused":
        async with user_monitor(vm) as qemu:
            await qemu.execute("stop")
    await fill(vm, "vda", 2)
    real = tagging.tag_live

    async def fails(*arguments: Any) -> None:
        await real(*arguments)
        raise HostCannot("no room")

    monkeypatch.setattr(tagging, "tag_live", fails)
    with pytest.raises(HostCannot, match="no room") as failed:
        await vm.revert("inside")
    monkeypatch.undo()
    assert failed.value.effect == "none"
    assert await vm.state() == state
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["inside"]
    assert [len(tags_in(vm, layer)) for layer in ("vda-1", "vdb-2")] == [1, 1]
    await hold_invariants(vm)
    kept = (await vm.revert("inside")).kept
    assert kept is not None
    assert kept.mode == ("live" if state == "running" else "paused")
    assert await vm.state() == "running"


async def test_on_another_branch_a_tag_is_deleted_while_the_machine_runs(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start(paused=True)
    await vm.snapshot("first")
    inside = await vm.snapshot("inside", kind="internal", memory=False)
    await vm.snapshot("above")
    await vm.revert("first")  # the guest is on another branch now
    await vm.delete_snapshots("inside")
    assert all(tags_in(vm, point.layer) == [] for point in inside.points)
    await hold_invariants(vm)


async def test_another_machines_base_keeps_its_tags(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    vm = await q.define(qcow2_spec)
    await vm.snapshot("inside", kind="internal")
    await vm.snapshot("frozen")
    base = context_of(vm).store.layer(LayerId("vda-1")).path
    await q.define(
        replace(qcow2_spec, name="clone", disks=(DiskSpec(name="vda", base=base),)), folders=[Path(base).parent]
    )
    with pytest.raises(StateError, match="is read by machine clone"):
        await vm.delete_snapshots("inside")
    assert len(tags_in(vm, "vda-1")) == 1
    await vm.delete_snapshots("inside", metadata=True)


async def test_what_cannot_be(q: qmpsnap.Controller, still_spec: MachineSpec) -> None:
    vm = await q.define(still_spec)  # its vdb is raw
    with pytest.raises(StateError, match="vdb of machine still is raw"):
        await vm.snapshot("inside", kind="internal")
    await vm.snapshot("inside", kind="internal", disks=["vda"])
    with pytest.raises(NameTaken):
        await vm.snapshot("inside", kind="internal", disks=["vda"])
    with pytest.raises(StateError, match="has no memory to save"):
        await vm.snapshot("more", kind="internal", disks=["vda"], memory=True)
    await vm.start()
    with pytest.raises(StateError, match="must include vdb"):
        await vm.snapshot("more", kind="internal", disks=["vda"])
    await hold_invariants(vm)


async def test_the_command_line(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    async def said(line: str) -> str:
        assert await anyio.to_thread.run_sync(main, line.split()) == 0
        return capsys.readouterr().out

    vm = await q.define(qcow2_spec)
    await vm.start()
    assert "snapshot-save" in await said("snapshot create still --kind internal --dry-run")
    assert await vm.snapshots() == ()
    assert "and memory taken" in await said("snapshot create still a --kind internal")
    shown = json.loads(await said("snapshot show still a -o json"))["snapshot"]
    assert shown["disks"]["vda"]["tag"].startswith("qs-3-")
    assert shown["inside"]["layer"] == "vda-1"
    assert "inside vda-1" in await said("snapshot show still a")
    assert "internal" in await said("snapshot list still")
    would = json.loads(await said("snapshot revert still a --dry-run -o json"))
    assert [command["execute"] for command in would["qmp"]] == ["stop", "snapshot-save", "snapshot-load", "cont"]
    assert (would["files"], would["kept"], would["start"]) == ([], "auto-4", None)
    assert [snapshot.name for snapshot in await vm.snapshots()] == ["a"]
    assert "the running QEMU would load" in await said("snapshot revert still a --dry-run --discard")
    assert "with its memory" in await said("snapshot revert still a --discard")
    await said("snapshot create still above")
    assert "vda-1.qcow2 was at its snapshot qs-3-" in await said("snapshot revert still a --dry-run")
    await said("stop still --force")
    assert "deleted a" in await said("snapshot delete still a")


async def test_the_network_is_told(q: qmpsnap.Controller, qcow2_spec: MachineSpec, tmp_path: Path) -> None:
    dump = tmp_path / "packets"
    extra = ("-object", f"filter-dump,id=dump,netdev=net0,file={dump}")
    vm = await q.define(replace(qcow2_spec, nics=(NicSpec(),), extra=extra), allow_extra=True)
    await vm.start()
    await vm.snapshot("inside", kind="internal")
    rarp = bytes.fromhex("8035 0001 0800")  # a card that says where it is
    (same,) = (await vm.revert("inside", discard=True, after=False)).notes
    assert "generation ID" in same
    assert rarp not in dump.read_bytes()
    # The agent's port is there and no agent: the clock of such a guest is not set, and the revert says so.
    _, *notes = (await vm.revert("inside", discard=True)).notes
    assert [note.partition(":")[0] for note in notes] == ["the guest's clock was not set"]
    with anyio.fail_after(30):
        while rarp not in dump.read_bytes():
            await anyio.sleep(0.05)


# --- UEFI -------------------------------------------------------------------------------------------------------------


async def test_uefi_with_a_raw_variable_store(q: qmpsnap.Controller, qcow2_spec: MachineSpec) -> None:
    if not Path("/usr/share/OVMF/OVMF_CODE_4M.fd").exists() and not os.environ.get("CI"):
        pytest.skip("ovmf is missing: scripts/setup test installs it")
    vm = await q.define(replace(qcow2_spec, firmware="uefi", memory=256 * MIB))
    variables = context_of(vm).home.variables("still")
    fresh = variables.read_bytes()
    await vm.start()
    log = context_of(vm).home.log_dir("still") / CONSOLE_LOG
    while b"BdsDxe" not in log.read_bytes() and variables.read_bytes() == fresh:
        await anyio.sleep(0.1)  # the firmware writes variables on its first boot
    snapshot = await vm.snapshot("inside", kind="internal")
    assert snapshot.variables is not None
    held = Path(snapshot.variables).read_bytes()
    await hold_invariants(vm)
    assert {layer["node-name"] for layer in await nodes_with_tags(vm)} == {"vda-1", "vdb-2"}  # never the flash

    def written() -> None:
        """As if the guest had written there: to the last byte of all."""
        with variables.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([held[-1] ^ 0xFF]))

    written()
    await vm.revert("inside", discard=True)  # in place: the flash is memory, which QEMU writes back
    assert variables.read_bytes()[-1] == held[-1]
    await vm.snapshot("all", kind="full")
    written()
    await vm.revert("all", discard=True)
    assert variables.read_bytes()[-1] == held[-1]
    await hold_invariants(vm)
    await vm.stop(force=True)
    written()
    await vm.revert("inside", state="paused")
    assert variables.read_bytes() == held
    await hold_invariants(vm)
    await vm.delete_snapshots("inside", *[s.name for s in await vm.snapshots() if s.name != "inside"])
    assert not Path(snapshot.variables).exists()
    await vm.stop(force=True)
    assert len(await vm.undefine(disks="remove")) == 2
    assert not context_of(vm).home.machine_dir("still").exists()


async def nodes_with_tags(vm: qmpsnap.MachineHandle) -> list[dict[str, Any]]:
    async with user_monitor(vm) as qemu:
        nodes: Any = await qemu.execute("query-named-block-nodes", {"flat": True})
    return [node for node in nodes if node["image"].get("snapshots")]


# --- deaths -----------------------------------------------------------------------------------------------------------


KEEPING = {
    "with the guest held": Call("qmpsnap.qmp.commands", "control", "after", 1),
    "with the memory on its way": Call("qmpsnap.qmp.jobs", "follow", "before", 1),
    "with the memory inside": Call("qmpsnap.qmp.jobs", "follow", "after", 1),
    "marked loading": Call("qmpsnap.store.sqlite.backend", "SqliteStore.mark", "after", 2),
    "loading": Call("qmpsnap.qmp.jobs", "follow", "before", 2),
    "settled": Call("qmpsnap.store.sqlite.backend", "SqliteStore.settle", "after", 1),
}
LOADED = ("loading", "settled")
"""From here on the machine is where it goes, and what it did before is kept."""


@pytest.mark.grid
@pytest.mark.parametrize("qemu", ["lives", "dies too"])
@pytest.mark.parametrize("step", KEEPING)
async def test_killed_while_what_runs_is_kept(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, step: str, qemu: str
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start()
    await fill(vm, "vda", 1)
    tag = str((await vm.snapshot("first", kind="internal")).points[0].tag)
    first = await tag_hash(vm, LayerId("vda-1"), tag)
    await fill(vm, "vda", 2)
    await die_at(KEEPING[step], "snapshot", "revert", "still", "first", "--no-after", qemu_too=qemu == "dies too")
    await vm.recover()
    assert await vm.recover() == []
    assert await vm.state() == ("stopped" if qemu == "dies too" else "running")
    snapshots = await vm.snapshots()
    loaded = step in LOADED or (qemu == "dies too" and step == "marked loading")
    assert [snapshot.name for snapshot in snapshots] == (["first", "auto-4"] if loaded else ["first"])
    assert [len(tags_in(vm, layer)) for layer in ("vda-1", "vdb-2")] == [len(snapshots)] * 2
    assert (await vm.record()).current == "first"
    assert await tag_hash(vm, LayerId("vda-1"), tag) == first
    await hold_invariants(vm)
    for snapshot in snapshots:
        await vm.revert(snapshot.name, discard=True)
        assert await vm.state() == "running"
    await hold_invariants(vm)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        ("running", "with the guest held", "running"),
        ("running", "with the memory on its way", "running"),
        ("running", "loading", "paused"),
        ("paused", "with the memory inside", "paused"),
    ],
)
async def test_the_guard_also_watches_a_guest_that_is_to_stand_still_afterwards(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, before: str, step: str, after: str
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start()
    await vm.snapshot("first", kind="internal")
    if before == "paused":
        async with user_monitor(vm) as qemu:
            await qemu.execute("stop")
    await die_at(KEEPING[step], "snapshot", "revert", "still", "first", "--paused")
    async with user_monitor(vm) as qemu:  # nobody has recovered but the guard
        status: Any = await qemu.execute("query-status")
    assert status["status"] == after
    operations = context_of(vm).store.operations("still", only_open=True)
    assert len(operations) == (before == "paused")  # there is nothing that would have to be watched
    await vm.recover()
    assert await vm.state() == after
    assert [s.name for s in await vm.snapshots()] == (["first", "auto-4"] if step in LOADED else ["first"])
    await hold_invariants(vm)


@pytest.mark.parametrize("qemu", ["lives", "dies too"])
@pytest.mark.parametrize(
    "point",
    [
        Call("qmpsnap.block.image.internal_snapshots", "take_out", "after", 1),
        Call("qmpsnap.block.image.internal_snapshots", "take_out", "after", 2),
        Call("qmpsnap.ops.internal.tags", "load_into", "before", 1),
        Call("qmpsnap.ops.internal.tags", "load_into", "after", 1),
        Call("qmpsnap.qmp.commands", "delete_tag", "after", 1),
    ],
    ids=lambda point: f"{point.function}-{point.when}-{point.nth}",
)
async def test_killed_while_it_is_taken_out(
    q: qmpsnap.Controller, qcow2_spec: MachineSpec, point: Call, qemu: str
) -> None:
    vm = await q.define(qcow2_spec)
    await vm.start()
    await fill(vm, "vda", 1)
    tag = str((await vm.snapshot("inside", kind="internal")).points[0].tag)
    held = await tag_hash(vm, LayerId("vda-1"), tag)
    await vm.stop(force=True)
    await die_at(point, "snapshot", "revert", "still", "inside", "--no-after")
    if qemu == "dies too":
        kill_qemu(vm)
    await vm.recover()
    assert await vm.recover() == []
    assert await tag_hash(vm, LayerId("vda-1"), tag) == held
    await hold_invariants(vm)
    active = [chain.active.id for chain in await vm.chains()]
    assert all(tags_in(vm, layer) == [] for layer in active if layer not in ("vda-1", "vdb-2"))
    await vm.revert("inside")
    assert await vm.state() == "running"
    await hold_invariants(vm)


def test_the_copy_keeps_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"a" * 5000)
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b"b" * 5000)
    identity = (source.stat().st_dev, source.stat().st_ino)
    internal_snapshots._copy(str(source), str(tmp_path / "copy"), identity)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 4 * MIB
    with pytest.raises(StateError, match="exists already"):
        internal_snapshots._copy(str(source), str(tmp_path / "copy"), identity)
