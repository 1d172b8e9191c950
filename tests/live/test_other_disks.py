"""What the guest writes to that is no disk of its machine: no memory is taken or loaded beside it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from qemu.qmp import QMPClient

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.snapshot import delete
from qmpsnap.ops.snapshot.delete import DeleteRequest
from tests.live.machine import MIB, context_of, fill, hold_invariants, user_monitor

# "launched" and its "folder" are fixtures
from tests.live.test_adopt import BLOCKDEV, THROTTLED, folder, launched  # noqa: F401

pytestmark = pytest.mark.version


@pytest.fixture
async def scsi(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    """A machine that runs, and whose bus takes more disks while it does."""
    spec = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=16 * MIB, bus="scsi"),))
    vm = await q.define(spec)
    await vm.start()
    return vm


@asynccontextmanager
async def attached(
    vm: qmpsnap.MachineHandle, image: Path, *, driver: str = "scsi-hd", read_only: bool = False
) -> AsyncIterator[None]:
    """Somebody else's device on the machine's bus, with an image of theirs."""
    async with user_monitor(vm) as qemu:
        await qemu.execute(
            "blockdev-add",
            {"driver": "file", "node-name": "theirs", "filename": str(image), "read-only": read_only},
        )
        await qemu.execute("device_add", {"driver": driver, "id": "extra", "bus": "qs-scsi.0", "drive": "theirs"})
    try:
        yield
    finally:
        async with user_monitor(vm) as qemu:
            await _detach(qemu)


async def _detach(qemu: QMPClient) -> None:
    await qemu.execute("device_del", {"id": "extra"})
    with anyio.fail_after(20):
        while "extra" in str(await qemu.execute("query-block")):
            await anyio.sleep(0.01)
    await qemu.execute("blockdev-del", {"node-name": "theirs"})


async def drives(vm: qmpsnap.MachineHandle) -> list[Any]:
    async with user_monitor(vm) as qemu:
        found: Any = await qemu.execute("query-block")
    return list(found)


async def refuses_memory(vm: qmpsnap.MachineHandle, named: str) -> None:
    """Every way to take it is refused, previews alike, and nothing has changed."""
    chain, state, before = (await vm.chains())[0].ids, await vm.state(), await vm.snapshots()
    ways: list[Any] = [partial(way, "s", kind="internal") for way in (vm.plan_snapshot, vm.snapshot)]
    if (await vm.record()).adopted is None:
        ways += [*(partial(way, "s", kind="full") for way in (vm.plan_snapshot, vm.snapshot)), vm.save]
    for way in ways:
        with pytest.raises(StateError, match=rf"also writes to {named}.*; nothing was changed") as refused:
            await way()
        assert (refused.value.exit_code, refused.value.effect) == (4, "none")
        assert "device_del" in refused.value.hint
        assert f"qmpsnap snapshot create {vm.name}" in as_typed(refused.value.hint)
    assert ((await vm.chains())[0].ids, await vm.state(), await vm.snapshots()) == (chain, state, before)


@pytest.fixture
def image(place: Path) -> Path:
    """Somebody else's raw image."""
    (found := place / "extra.img").write_bytes(bytes(MIB))
    return found


async def test_beside_a_disk_that_was_attached_no_memory_is_taken(scsi: qmpsnap.MachineHandle, image: Path) -> None:
    async with attached(scsi, image):
        await refuses_memory(scsi, r"extra \(.*extra\.img\), which is no disk of the machine")
        await scsi.snapshot("inside", kind="internal", memory=False)
        await scsi.snapshot("disks")
        await hold_invariants_but_theirs(scsi)
    await scsi.snapshot("all", kind="full")
    await hold_invariants(scsi)


async def hold_invariants_but_theirs(vm: qmpsnap.MachineHandle) -> None:
    """What was refused has left nothing; that QEMU has another image open is what the test has done."""
    assert {finding.code for finding in (await vm.check()).findings} <= {"node-left", "disk-attached"}


async def test_beside_a_disk_that_was_attached_no_memory_is_loaded(scsi: qmpsnap.MachineHandle, image: Path) -> None:
    await scsi.snapshot("inside", kind="internal")
    await fill(scsi, "vda", 2)
    process = (await scsi.record()).process
    async with attached(scsi, image):
        for way in (scsi.plan_revert, scsi.revert, partial(scsi.revert, discard=True)):
            with pytest.raises(StateError, match=r"also writes to extra .*; nothing was changed") as refused:
                await way("inside")
            assert (refused.value.exit_code, refused.value.effect) == (4, "none")
            assert as_typed(refused.value.hint).endswith("then try again")
        assert ((await scsi.record()).process, await scsi.state()) == (process, "running")
        assert [snapshot.name for snapshot in await scsi.snapshots()] == ["inside"]
    assert (await scsi.revert("inside")).kept is not None
    await hold_invariants(scsi)


@pytest.mark.parametrize(("driver", "read_only"), [("scsi-hd", True), ("scsi-cd", False)], ids=["read-only", "CD"])
async def test_what_the_guest_only_reads_stands_in_no_ones_way(
    scsi: qmpsnap.MachineHandle, image: Path, driver: str, *, read_only: bool
) -> None:
    async with attached(scsi, image, driver=driver, read_only=read_only):
        assert [drive["inserted"]["ro"] for drive in await drives(scsi)] == [False, read_only]
        await scsi.snapshot("inside", kind="internal")
        await scsi.revert("inside", discard=True)
        with pytest.raises(StateError, match="one that loads this memory would lack it"):
            await scsi.snapshot("all", kind="full")
        assert await scsi.state() == "running"


async def test_an_options_disk_of_the_spec_counts_too(q: qmpsnap.Controller, image: Path) -> None:
    vm = await q.define(
        MachineSpec(
            name="still",
            memory=64 * MIB,
            disks=(DiskSpec(name="vda", size=16 * MIB),),
            extra=("-drive", f"file={image},format=raw,if=virtio"),
        ),
        allow_extra=True,
    )
    await vm.start()
    await refuses_memory(vm, r"virtio0 \(")


SLOW = [
    *("-object", "throttle-group,id=tg,x-iops-total=5000", "-blockdev", BLOCKDEV),
    *("-blockdev", THROTTLED, "-device", "virtio-blk,drive=slow"),
]
READ_ONLY = ["-blockdev", "file,node-name=n,filename=floppy.img,read-only=on", "-device", "virtio-blk,drive=n"]
OTHERS = {
    "CD": ["-drive", "if=ide,media=cdrom,format=raw,file=floppy.img"],
    "no medium": ["-drive", "if=floppy"],
    "flash": ["-drive", "if=pflash,format=raw,file=flash.img"],
    "read-only": READ_ONLY,
    "floppy": ["-drive", "if=floppy,format=raw,file=floppy.img"],
}


@pytest.mark.parametrize("other", OTHERS)
async def test_of_an_adopted_machine(
    q: qmpsnap.Controller,
    folder: Path,  # noqa: F811
    launched: Any,  # noqa: F811
    other: str,
) -> None:
    (folder / "floppy.img").write_bytes(bytes(1440 << 10))
    (folder / "flash.img").write_bytes(bytes(MIB))
    theirs = launched([*SLOW, *OTHERS[other]], machine="pc")
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    await vm.snapshot("disks")
    if other == "floppy":
        await refuses_memory(vm, r"floppy0 \(")
        async with theirs.monitor() as qemu:
            await qemu.execute("eject", {"device": "floppy0", "force": True})
    await vm.snapshot("inside", kind="internal")
    await vm.revert("inside", discard=True, state="paused")


# --- what is told of them ---------------------------------------------------------------------------------------------


EXTRA = {"driver": "scsi-hd", "id": "extra", "bus": "qs-scsi.0", "drive": "theirs"}


async def test_a_disk_that_was_attached_is_told_of(scsi: qmpsnap.MachineHandle, image: Path) -> None:
    async with attached(scsi, image):
        for taking in (scsi.snapshot("disk"), scsi.snapshot("internal", kind="internal", memory=False)):
            taken = await taking
            assert [(one.name, one.file) for one in taken.outside] == [("extra", str(image))]
        assert (await scsi.snapshot("named", disks=["vda"])).outside == ()
        found = [(finding.code, finding.file) for finding in (await scsi.check()).findings]
        assert ("disk-attached", str(image)) in found
        done = await scsi.revert("disk")
        assert [(one.name, one.file) for one in done.detached] == [("extra", str(image))]
        assert (await scsi.revert("named")).detached == ()
        async with user_monitor(scsi) as qemu:  # for the fixture, which takes it away again
            await qemu.execute("blockdev-add", {"driver": "file", "node-name": "theirs", "filename": str(image)})
            await qemu.execute(
                "device_add", {"driver": "scsi-hd", "id": "extra", "bus": "qs-scsi.0", "drive": "theirs"}
            )
    await hold_invariants(scsi)


async def test_to_an_adopted_qemu_too(
    q: qmpsnap.Controller,
    folder: Path,  # noqa: F811
    launched: Any,  # noqa: F811
    image: Path,
) -> None:
    (folder / "floppy.img").write_bytes(bytes(1440 << 10))
    theirs = launched([*SLOW, *OTHERS["floppy"], "-device", "virtio-scsi,id=bus"], machine="pc")
    await q.adopt("theirs", theirs.socket)
    vm = await q.machine("theirs")
    assert [finding.text for finding in (await vm.check()).findings] == [], "what was left out was told then"
    async with theirs.monitor() as qemu:
        await qemu.execute("blockdev-add", {"driver": "file", "node-name": "theirs", "filename": str(image)})
        await qemu.execute("device_add", {"driver": "scsi-hd", "id": "extra", "bus": "bus.0", "drive": "theirs"})
    assert {one.name for one in (await vm.snapshot("s")).outside} == {"floppy0", "extra"}
    assert [finding.file for finding in (await vm.check()).findings] == [str(image)]


@pytest.fixture
async def two(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    """A machine that stands still, whose second disk can be unplugged."""
    disks = (DiskSpec(name="vda", size=MIB, bus="scsi"), DiskSpec(name="vdb", size=MIB, bus="scsi"))
    vm = await q.define(MachineSpec(name="still", memory=64 * MIB, disks=disks))
    await vm.start(paused=True)
    await fill(vm, "vdb", 1, length=MIB // 2)
    await vm.snapshot("both")
    return vm


async def unplug(vm: qmpsnap.MachineHandle) -> None:
    async with user_monitor(vm) as qemu:
        await qemu.execute("device_del", {"id": "vdb"})
        with anyio.fail_after(20):
            while '"qdev": "vdb"' in json.dumps(await qemu.execute("query-block")):
                await anyio.sleep(0.01)


async def test_a_disk_that_was_unplugged_stands_in_no_others_way(two: qmpsnap.MachineHandle) -> None:
    await unplug(two)
    await fill(two, "vda", 2, length=MIB // 2)
    taken = await two.snapshot("without")
    assert [point.disk for point in taken.points] == ["vda"]
    assert [(one.name, one.file) for one in taken.outside] == [("vdb", None)]
    await two.stream("vda", base="both")
    inside = await two.snapshot("inside", kind="internal", memory=False)
    assert [point.disk for point in inside.points] == ["vda"]
    found = {(finding.code, finding.disk) for finding in (await two.check()).findings}
    assert ("disk-unplugged", "vdb") in found
    assert "graph-differs" not in {code for code, _ in found}
    for way in (partial(two.snapshot, "s", disks=["vdb"]), partial(two.stream, "vdb"), partial(two.commit, "vdb")):
        with pytest.raises(StoreMismatch, match="disk vdb of machine still: QEMU's chain is empty") as refused:
            await way()
        assert "unplugged" in refused.value.hint
    for memory in (partial(two.snapshot, "s", kind="full"), two.save, partial(two.snapshot, "s", kind="internal")):
        with pytest.raises(StateError, match="disk vdb of machine still was unplugged"):
            await memory()
    await two.revert("without")  # which starts a QEMU that has it again
    assert {drive["qdev"] for drive in await drives(two)} == {"vda", "vdb"}
    await two.snapshot("again")
    await hold_invariants(two)


async def test_snapshots_that_an_unplugged_disk_has_no_part_in_are_deleted(two: qmpsnap.MachineHandle) -> None:
    await two.snapshot("third")
    await unplug(two)
    await fill(two, "vda", 2, length=MIB // 2)
    await two.snapshot("one")
    await fill(two, "vda", 3, length=MIB // 2)
    await two.push("two")
    before = {view.disk: view.ids for view in await two.chains()}
    foretold = partial(delete.preview, context_of(two), "still", DeleteRequest(names=("third",)))
    for way in (foretold, partial(two.delete_snapshots, "third")):
        with pytest.raises(StoreMismatch, match="disk vdb of machine still was unplugged") as refused:
            await way()
        assert refused.value.effect == "none"
    assert {view.disk: view.ids for view in await two.chains()} == before
    await two.delete_snapshots("one")
    after = {view.disk: view.ids for view in await two.chains()}
    assert (after["vdb"], len(after["vda"])) == (before["vdb"], len(before["vda"]) - 1)
    assert (await two.plan_pop()).details.delete.names == ("two",)
    await two.delete_snapshots("third", metadata=True)
    await two.delete_snapshots("two")  # and what is left of vdb waits
    assert {view.disk: len(view.ids) for view in await two.chains()}["vdb"] == len(before["vdb"])
    await two.stop(force=True)
    await two.start(paused=True)
    await two.delete_snapshots("both")
    assert {view.disk: len(view.ids) for view in await two.chains()} == {"vda": 1, "vdb": 1}
    await hold_invariants(two)


async def test_a_layer_that_another_device_writes_to_is_not_out_of_reach(two: qmpsnap.MachineHandle) -> None:
    active = next(view.active.id for view in await two.chains() if view.disk == "vdb")
    await unplug(two)
    async with user_monitor(two) as qemu:
        await qemu.execute("device_add", {"driver": "scsi-hd", "id": "other", "bus": "qs-scsi.0", "drive": active})
    with pytest.raises(StoreMismatch, match="disk vdb"):
        await two.snapshot("s")


def test_the_commands_tell_it(home: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = home / "m.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M, bus: scsi}]\n")
    assert main(["define", str(spec)]) == 0
    assert main(["start", "still", "--paused"]) == 0

    async def attach() -> None:
        async with qmpsnap.open() as q, user_monitor(await q.machine("still")) as qemu:
            await qemu.execute("blockdev-add", {"driver": "file", "node-name": "theirs", "filename": str(image)})
            await qemu.execute(
                "device_add", {"driver": "scsi-hd", "id": "extra", "bus": "qs-scsi.0", "drive": "theirs"}
            )

    anyio.run(attach)
    capsys.readouterr()
    assert main(["snapshot", "create", "still", "s", "-o", "json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["outside"] == [{"name": "extra", "file": str(image)}]
    assert "not in the snapshot" in said.err
    assert main(["snapshot", "revert", "still", "s", "-o", "json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["detached"] == [{"name": "extra", "file": str(image)}]
    assert "detached: extra" in said.err
