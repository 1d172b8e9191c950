"""Disks that are images of a Ceph cluster: every verb on one, on a real cluster of one node."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.block.usage import survey
from qmpsnap.errors import HostCannot, ImageInUse, ImageRefused, StateError, StorageHangs, StoreMismatch
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.cluster import cluster, new_image, on_image, rbd, require_module
from tests.live.devices import run
from tests.live.machine import MIB, active_hash, context_of, fill, hold_invariants, snapshot_hashes, user_monitor

# "launched" and its "folder" are fixtures
from tests.live.test_adopt import folder, launched  # noqa: F401
from tests.live.test_devices import DEVICE, grown, require_rebuilt

pytestmark = pytest.mark.xdist_group("ceph")


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    with cluster() as found:
        yield found


@pytest.fixture
def image(conf: Path) -> RbdImage:
    found = new_image(conf)
    require_module(found)
    return found


def content(image: RbdImage) -> bytes:
    found: bytes = rbd(image, "export", "--no-progress", "-")
    return found


async def test_an_image_has_its_place_in_the_store_and_in_qemu(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes, _ = await grown(q, on_image(image))
    base = (await vm.chains())[0].layers[0].layer
    known = rbd(image, "info", "--format=json")["id"]
    assert (base.path, base.format, base.storage, base.virtual_size) == (image.filename, "raw", "rbd", 16 * MIB)
    assert (base.device, base.inode, base.owned, base.shown) == (0, 0, False, f"rbd:{image}")
    assert base.identity.startswith("rbd:")
    assert base.identity.endswith(f"/1/{known}")
    await vm.start(paused=True)
    async with user_monitor(vm) as qemu:
        nodes: Any = await qemu.execute("query-named-block-nodes")
    by_name = {node["node-name"]: node for node in nodes}
    assert by_name[f"{base.id}.file"]["drv"] == "rbd"
    assert by_name[base.id]["file"] == image.filename
    # No name above is an override: then its text would grow with each layer.
    above = [by_name[at.layer.id]["file"] for at in (await vm.chains())[0].layers[1:]]
    assert [name[:1] for name in above] == ["/", "/"]
    await hold_invariants(vm, hashes)


async def test_a_snapshot_of_an_image_is_reverted_to(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes, _ = await grown(q, on_image(image))
    await vm.revert("s1")
    assert await active_hash(vm) == hashes["s1", "vda"]
    await vm.start(paused=True)
    await fill(vm, "vda", 4, offset=4 * MIB)
    await vm.revert("s2", state="paused")
    await vm.stop(force=True)
    assert await active_hash(vm) == hashes["s2", "vda"]
    await hold_invariants(vm, hashes)


@pytest.mark.parametrize("runs", [False, True])
async def test_deleting_all_snapshots_leaves_all_data_in_the_image(
    q: qmpsnap.Controller, image: RbdImage, *, runs: bool
) -> None:
    vm, _, now = await grown(q, on_image(image))
    if runs:
        await vm.start(paused=True)
    await vm.delete_snapshots("s1")
    await hold_invariants(vm)
    await vm.delete_snapshots("s2")
    await hold_invariants(vm)
    (layer,) = (await vm.chains())[0].layers
    assert layer.layer.path == image.filename
    assert await active_hash(vm) == now
    await vm.stop(force=True) if runs else None
    assert content(image)[2 * MIB : 3 * MIB] == b"\3" * MIB
    assert not [*context_of(vm).home.machine_dir("web").glob("*.qcow2")]


@pytest.mark.parametrize("runs", [False, True])
async def test_a_commit_goes_into_the_image(q: qmpsnap.Controller, image: RbdImage, *, runs: bool) -> None:
    vm, _, now = await grown(q, on_image(image))
    if runs:
        await vm.start(paused=True)
    base = (await vm.chains())[0].layers[0].layer.id
    await vm.commit("vda", base=base, consume=True)
    assert [at.layer.id for at in (await vm.chains())[0].layers] == [base]
    await hold_invariants(vm)
    assert await active_hash(vm) == now


async def test_a_stream_and_a_mirror_leave_the_image_as_it_is(
    q: qmpsnap.Controller, image: RbdImage, place: Path
) -> None:
    vm, hashes, now = await grown(q, on_image(image))
    before = content(image)
    await vm.start(paused=True)
    await vm.mirror("vda", place / "copy.qcow2", mode="finish")
    await vm.stream("vda")
    await hold_invariants(vm, hashes)
    await vm.delete_snapshots("s1", "s2")
    assert await active_hash(vm) == now
    await vm.stop(force=True)
    assert content(image) == before


async def test_memory_is_saved_beside_an_image_and_no_tag_goes_into_it(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm = await q.define(on_image(image))
    await vm.start()
    await vm.snapshot("full", kind="full")
    await fill(vm, "vda", 2)
    await vm.revert("full")
    await hold_invariants(vm, await snapshot_hashes(vm))
    await vm.stop(force=True)
    await vm.undefine(disks="remove")
    vm = await q.define(on_image(image))
    with pytest.raises(StateError, match="disk vda of machine web is raw: it cannot hold an internal snapshot"):
        await vm.snapshot("inside", kind="internal")


async def test_a_clone_reads_what_lies_on_an_image(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, hashes, _ = await grown(q, on_image(image))
    first, second = (at.layer for at in (await vm.chains())[0].layers[:2])
    disk = DiskSpec(name="vda", base=second.path)
    clone = await q.define(MachineSpec(name="clone", memory=64 * MIB, disks=(disk,)))
    assert await active_hash(clone) == hashes["s2", "vda"]
    assert [at.layer.id for at in (await clone.chains())[0].layers[:2]] == [first.id, second.id]
    await vm.start(paused=True)
    await clone.start(paused=True)
    await fill(vm, "vda", 9)
    await vm.snapshot("s3")
    await clone.snapshot("c1")
    await hold_invariants(clone)
    await hold_invariants(vm, hashes)


async def test_a_store_is_rebuilt_with_its_images(home: Path, image: RbdImage) -> None:
    await require_rebuilt(home, on_image(image))


@pytest.mark.usefixtures("image")
async def test_a_namespace_and_a_user_are_part_of_the_name(q: qmpsnap.Controller, conf: Path) -> None:
    run("rbd", "--conf", str(conf), "namespace", "create", "rbd/ns")
    own = RbdImage(pool="rbd", image="own", conf=str(conf), namespace="ns", user="admin")
    rbd(own, "create", "--size=16M")
    vm, hashes, _ = await grown(q, on_image(own))
    await vm.start(paused=True)
    await hold_invariants(vm, hashes)


async def test_an_image_of_somebody_elses_qemu_is_taken_over(
    q: qmpsnap.Controller,
    launched: Any,  # noqa: F811
    image: RbdImage,
) -> None:
    node = f"driver=raw,node-name=n,file.driver=rbd,file.pool=rbd,file.image={image.image},file.conf={image.conf}"
    theirs = launched([*DEVICE, "-blockdev", node])
    vm = await q.adopt("theirs", theirs.socket)
    assert (await vm.record()).spec.disks[0].rbd == image
    (layer,) = (await vm.chains())[0].layers
    assert (layer.layer.path, layer.layer.storage) == (image.filename, "rbd")
    await theirs.io("write -P 1 0 1M")
    await vm.snapshot("s1")
    await theirs.io("write -P 2 0 1M")
    await hold_invariants(vm)
    nodes = {node["node-name"]: node["file"] for node in await theirs.nodes()}
    assert nodes[(await vm.chains())[0].active.id].startswith("/")
    await vm.delete_snapshots("s1")
    assert len((await vm.chains())[0].layers) == 1
    await hold_invariants(vm)


# --- which image it is ----------------------------------------------------------------------------------------------


async def test_another_image_of_that_name_is_not_used(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm, _, _ = await grown(q, on_image(image))
    rbd(image, "rm", "--no-progress")
    with pytest.raises(StoreMismatch, match=f"rbd:{image}"):
        await vm.start()
    assert {found.code for found in (await vm.check()).findings} == {"layer-missing"}
    rbd(image, "create", "--size=16M")
    for verb in (vm.start(), vm.snapshot("s3"), vm.delete_snapshots("s1")):
        with pytest.raises(StoreMismatch, match=f"rbd:{image} is not the recorded"):
            await verb
    assert {found.code for found in (await vm.check()).findings} == {"layer-replaced"}


async def test_a_size_that_changes_is_told(q: qmpsnap.Controller, image: RbdImage) -> None:
    vm = await q.define(on_image(image))
    rbd(image, "resize", "--size=32M", "--no-progress")
    found = (await vm.check()).findings
    assert [(one.code, one.repairable) for one in found] == [("size-differs", True)]
    with pytest.raises(StoreMismatch, match=f"rbd:{image} has a virtual size of"):
        await vm.snapshot("s1")
    assert (await vm.check(repair=True)).repaired
    await vm.snapshot("s1")
    await hold_invariants(vm)


@pytest.mark.parametrize("runs", [False, True])
async def test_an_image_grows(q: qmpsnap.Controller, image: RbdImage, *, runs: bool) -> None:
    vm = await q.define(on_image(image))
    if runs:
        await vm.start(paused=True)
    await vm.resize("vda", "32M")
    assert rbd(image, "info", "--format=json")["size"] == 32 * MIB
    await hold_invariants(vm)
    await vm.snapshot("s1")
    await hold_invariants(vm)


async def test_a_list_of_snapshots_does_not_wait_for_a_cluster(
    q: qmpsnap.Controller, image: RbdImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, _, _ = await grown(q, on_image(image))
    monkeypatch.setenv("PATH", "/nowhere")
    assert survey.look(survey.wanted(context_of(vm).store.images.read_by("web"), None)).word == "ok"


# --- who else uses it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("here", [True, False])
async def test_an_image_that_another_client_has_open_is_refused(
    q: qmpsnap.Controller, image: RbdImage, tmp_path: Path, *, here: bool
) -> None:
    """A QEMU of this host is named; of any other client the cluster tells the address alone.

    A QEMU with an image of the same name in another cluster is neither.
    """
    vm = await q.define(on_image(image))
    other_conf = tmp_path / "other.conf"
    other_conf.write_text("[global]\nfsid = 8f0c5c2e-1f0b-4f1c-9d39-0f3f3f0f7a11\n")
    elsewhere = f"driver=rbd,node-name=n,pool={image.pool},image={image.image},conf={other_conf}"
    daemon = [
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=rbd,node-name=n,{options(image)}",
        "--chardev",
        "stdio,id=c",
    ]
    argv = [*daemon, "--monitor", "c"] if here else ["rbd", *image.arguments, "watch"]
    with (
        subprocess.Popen(["cat", "-", elsewhere], stdin=subprocess.PIPE) as stranger,  # noqa: ASYNC220
        ending(stranger),
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other,  # noqa: ASYNC220
        ending(other),
    ):
        assert other.stdout
        other.stdout.read(1)
        who = rf"qemu-storage-da \(process {other.pid}\)" if here else r"Ceph client 127\.0\.0\.1"
        for verb in (vm.start(), vm.snapshot("s1")):
            with pytest.raises(ImageInUse, match=rf"rbd:{image}.*is read by {who}"):
                await verb
        with pytest.raises(StateError, match="which machine web writes to"):
            await q.define(on_image(image, "two"))
        await vm.undefine(disks="keep")
        with pytest.raises(ImageInUse, match=f"rbd:{image}.*is read by {who}"):
            await q.define(on_image(image))
    if here:  # it has closed its image, as one that is killed has not
        await q.define(on_image(image))


@contextlib.contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """It ends with the block, whatever becomes of that."""
    try:
        yield
    finally:
        process.terminate()


def options(image: RbdImage) -> str:
    return f"pool={image.pool},image={image.image},conf={image.conf}"


# --- what is not there ----------------------------------------------------------------------------------------------


async def test_what_is_not_there_is_refused(
    q: qmpsnap.Controller, image: RbdImage, conf: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent, said in (
        (RbdImage(pool="rbd", image="none", conf=str(conf)), "there is no image rbd:rbd/none: .*No such file"),
        (RbdImage(pool="none", image="web", conf=str(conf)), "there is no image rbd:none/web: .*pool 'none'"),
        (RbdImage(pool="rbd", image="web", namespace="no", conf=str(conf)), "namespace 'no' does not exist"),
    ):
        with pytest.raises(ImageRefused, match=said):
            await q.define(on_image(absent))
    with pytest.raises(HostCannot, match=r"rbd info of rbd:rbd/web failed: .*config"):
        await q.define(on_image(RbdImage(pool="rbd", image="web", conf="/no/ceph.conf")))
    with pytest.raises(HostCannot, match="the Ceph cluster of rbd:rbd/web cannot be reached"):  # not a missing image
        await q.define(on_image(RbdImage(pool="rbd", image="web", conf="/dev/null")))
    programs = place / "bin"
    programs.mkdir()
    for program in ("qemu-system-x86_64", "qemu-img"):
        (programs / program).symlink_to(shutil.which(program) or "")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(HostCannot, match="rbd cannot be run") as caught:
        await q.define(on_image(image))
    assert "ceph-common" in caught.value.hint
    assert not await q.machines()


async def test_a_cluster_that_hangs_is_given_up(
    q: qmpsnap.Controller, image: RbdImage, conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(on_image(image))
    osd = int((conf.parent / "osd.pid").read_text())
    monkeypatch.setenv("QMPSNAP_STORAGE_DEADLINE", "1")
    os.kill(osd, signal.SIGSTOP)
    try:
        for verb in (vm.start(), vm.snapshot("s1")):
            with pytest.raises(
                StorageHangs, match=f"the Ceph cluster does not answer: rbd [a-z]+ of rbd:{image} has waited for 1 s"
            ):
                await verb
    finally:
        os.kill(osd, signal.SIGCONT)
    monkeypatch.delenv("QMPSNAP_STORAGE_DEADLINE")
    assert not await vm.is_running()
    await vm.snapshot("s1")
    await hold_invariants(vm)
