"""The driver for RBD images, on a real cluster of one node."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, NotFoundError, StateError, StorageHangs, StoreMismatch
from qmpsnap.host import ceph
from qmpsnap.model.machines.rbd import RbdImage
from qmpsnap.model.names import OperationId
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.names import Role, VolumeName, of_path
from qmpsnap.volumes.rbd import WHOLE, Rbd
from tests.live.cluster import cluster, new_image, rbd
from tests.live.devices import run

pytestmark = pytest.mark.xdist_group("ceph")

MACHINE = "0123456789abcdef0123456789abcdef"
MIB = 1 << 20
DRIVER = Rbd()


@pytest.fixture(scope="module")
def conf() -> Iterator[Path]:
    with cluster() as found:
        yield found


@pytest.fixture
def image(conf: Path) -> RbdImage:
    return new_image(conf)


@pytest.fixture
def origin(image: RbdImage) -> Volume:
    return Volume(path=image.filename, identity=ceph.info(image).identity, bytes=16 * MIB)


def name(number: int, role: Role = "snapshot") -> VolumeName:
    return VolumeName.of(MACHINE, OperationId(number), "vda", role)


def write(image: RbdImage, byte: bytes) -> None:
    """Fill the first MiB, by a difference as ``rbd export-diff`` writes one."""
    size = b"s" + (16 * MIB).to_bytes(8, "little")
    data = b"w" + (0).to_bytes(8, "little") + MIB.to_bytes(8, "little") + byte * MIB
    rbd(image, "import-diff", "--no-progress", "-", stdin=b"rbd diff v1\n" + size + data + b"e")


def content(volume: Volume) -> bytes:
    image = RbdImage.parse(volume.path)
    assert image
    found: bytes = rbd(image, "export", "--no-progress", "-")
    return found[:MIB]


async def test_what_was_written_before_is_in_a_snapshot_and_in_its_clone(origin: Volume, image: RbdImage) -> None:
    assert (await DRIVER.probe(origin)).able
    write(image, b"1")
    kept = await DRIVER.snapshot(origin, name(17))
    write(image, b"2")
    assert kept.path == DRIVER.where(origin, name(17))
    assert of_path(kept.path) == name(17)
    assert kept.identity.startswith(f"{origin.identity}/")
    assert (kept.bytes, kept.state, kept.format) == (16 * MIB, "ok", "raw")
    assert content(kept) == b"1" * MIB
    clone = await DRIVER.clone(kept, name(18, "clone"))
    assert clone.path == DRIVER.where(kept, name(18, "clone"))
    assert content(clone) == b"1" * MIB
    assert ceph.info(image).identity == origin.identity != clone.identity
    again = await DRIVER.snapshot(clone, name(19))
    for near in (origin, kept, clone, again):
        assert await DRIVER.list(near, MACHINE) == (clone, kept, again)
    assert await DRIVER.list(origin, "f" * 32) == ()
    assert (await DRIVER.size(kept)).own >= MIB
    for volume in (again, clone, kept):
        await DRIVER.remove(volume)
        await DRIVER.remove(volume)  # gone already
    assert await DRIVER.list(origin, MACHINE) == ()
    assert content(origin) == b"2" * MIB


async def test_a_namespace_holds_its_own(conf: Path) -> None:
    run("rbd", f"--conf={conf}", "namespace", "create", "rbd/ns")
    image = RbdImage(pool="rbd", image="web", namespace="ns", conf=str(conf), user="admin")
    rbd(image, "create", "--size=16M")
    clone = await DRIVER.clone(await DRIVER.snapshot(Volume(path=image.filename), name(1)), name(2, "clone"))
    assert [found.name for found in await DRIVER.list(clone, MACHINE)] == [name(2, "clone"), name(1)]


async def test_what_others_depend_on_stays_and_they_are_named(origin: Volume) -> None:
    kept = await DRIVER.snapshot(origin, name(1))
    clone = await DRIVER.clone(kept, name(2, "clone"))
    again = await DRIVER.snapshot(clone, name(3))
    with pytest.raises(StateError, match=f"clones depend on it: rbd:rbd/{name(2, 'clone').text}"):
        await DRIVER.remove(kept)
    with pytest.raises(StateError, match=f"it has snapshots: rbd:rbd/{name(2, 'clone').text}@{name(3).text}"):
        await DRIVER.remove(clone)
    for volume in (again, clone, kept):
        await DRIVER.remove(volume)


async def test_a_taken_name_is_refused_and_what_has_it_stays(origin: Volume) -> None:
    kept = await DRIVER.snapshot(origin, name(1))
    with pytest.raises(StateError, match="already"):
        await DRIVER.snapshot(origin, name(1))
    clone = await DRIVER.clone(kept, name(2, "clone"))
    with pytest.raises(StateError, match="already"):
        await DRIVER.clone(kept, name(2, "clone"))
    assert await DRIVER.list(origin, MACHINE) == (clone, kept)
    await DRIVER.remove(clone)


async def test_another_volume_of_that_name_is_not_touched(origin: Volume) -> None:
    kept = await DRIVER.snapshot(origin, name(1))
    other = replace(kept, identity=f"{kept.identity}9")
    for verb in (
        DRIVER.remove(other),
        DRIVER.clone(other, name(2, "clone")),
        DRIVER.snapshot(replace(origin, identity="rbd:f/1/x"), name(3)),
    ):
        with pytest.raises(StoreMismatch, match="is not the recorded image"):
            await verb
    assert await DRIVER.list(origin, MACHINE) == (kept,)


async def test_a_snapshot_that_was_removed_behind_our_back_is_not_found(origin: Volume, image: RbdImage) -> None:
    kept = await DRIVER.snapshot(origin, name(1))
    snapshot = replace(image, snapshot=name(1).text)
    rbd(snapshot, "snap", "unprotect")
    rbd(snapshot, "snap", "rm", "--no-progress")
    for verb in (DRIVER.clone(kept, name(2, "clone")), DRIVER.size(kept)):
        with pytest.raises(NotFoundError, match=f"there is no .*{name(1).text}"):
            await verb
    with pytest.raises(NotFoundError, match="there is no"):
        await DRIVER.snapshot(Volume(path=replace(image, image="none").filename), name(3))


async def test_an_interrupted_clone_is_a_part_and_removed_as_one(origin: Volume, image: RbdImage) -> None:
    kept = await DRIVER.snapshot(origin, name(1))
    clone = await DRIVER.clone(kept, name(2, "clone"))
    rbd(replace(image, image=name(2, "clone").text), "image-meta", "remove", WHOLE)
    assert await DRIVER.list(origin, MACHINE) == (replace(clone, state="part"), kept)
    await DRIVER.remove(replace(clone, state="part"))
    assert await DRIVER.list(origin, MACHINE) == (kept,)


async def test_an_interrupted_removal_is_repeated(origin: Volume, image: RbdImage) -> None:
    kept = await DRIVER.snapshot(origin, name(1))
    rbd(replace(image, snapshot=name(1).text), "snap", "unprotect")
    await DRIVER.remove(kept)
    assert await DRIVER.list(origin, MACHINE) == ()


async def test_a_cluster_that_hangs_is_given_up(origin: Volume, conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    osd = (conf.parent / "osd.pid").read_text().strip()
    monkeypatch.setenv("QMPSNAP_STORAGE_DEADLINE", "1")
    run("kill", "-STOP", osd)
    try:
        for verb in (DRIVER.snapshot(origin, name(1)), DRIVER.list(origin, MACHINE), DRIVER.probe(origin)):
            with pytest.raises(StorageHangs, match="the Ceph cluster does not answer: rbd"):
                await verb
    finally:
        run("kill", "-CONT", osd)


async def test_a_host_without_the_program_is_told(origin: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("rbd")
    monkeypatch.setenv("PATH", "/nowhere")
    ability = await DRIVER.probe(None)
    assert (ability.able, ability.why) == (False, "there is no program rbd")
    with pytest.raises(HostCannot, match="rbd cannot be run"):
        await DRIVER.snapshot(origin, name(1))
