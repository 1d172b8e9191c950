"""The reflink driver on real xfs and btrfs: what the Protocol promises, verb by verb."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.errors import HostCannot, NotFoundError, StateError, StoreMismatch
from qmpsnap.host.files import FileId
from qmpsnap.model.names import OperationId
from qmpsnap.volumes import reflink
from qmpsnap.volumes.driver import Volume
from qmpsnap.volumes.names import VolumeName, of_path
from qmpsnap.volumes.reflink import Reflink
from tests.harness import mounts

UUID = "0f7b2c1e-8a35-4a9e-9d5e-6a6f0d3c1b22"
OTHER = "11111111-2222-3333-4444-555555555555"
DRIVER = Reflink()


@pytest.fixture(scope="module", params=mounts.KINDS)
def storage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    mounts.require(request.param)
    with mounts.mounted(request.param, tmp_path_factory.mktemp("storage")) as place:
        yield place


@pytest.fixture
def folder(storage: Path, request: pytest.FixtureRequest) -> Path:
    made = storage / f"{abs(hash(request.node.name))}"
    made.mkdir()
    return made


def _volume(path: Path) -> Volume:
    found = FileId.at(path)
    assert found
    return Volume(path=str(path), device=found.device, inode=found.inode, birth=found.birth, bytes=found.size or 0)


def _image(folder: Path, name: str = "image.raw", content: bytes = b"one" * 100_000) -> Volume:
    (folder / name).write_bytes(content)
    return _volume(folder / name)


def _named(operation: int, disk: str = "vda", *, uuid: str = UUID) -> VolumeName:
    return VolumeName.of(uuid, OperationId(operation), disk)


async def test_a_snapshot_keeps_what_the_image_held(folder: Path) -> None:
    origin = _image(folder)
    assert (await DRIVER.probe(origin)).able
    taken = await DRIVER.snapshot(origin, _named(7))
    assert taken.path == DRIVER.where(origin, _named(7))
    assert taken == await _found(origin, 7)
    Path(origin.path).write_bytes(b"two")
    assert Path(taken.path).read_bytes() == b"one" * 100_000
    assert Path(taken.path).stat().st_mode & 0o777 == 0o600
    clone = await DRIVER.clone(taken, VolumeName.of(UUID, OperationId(8), "vda", "clone"))
    Path(clone.path).write_bytes(b"three")
    assert Path(taken.path).read_bytes()[:3] == b"one"
    assert (await DRIVER.size(taken)).own >= 300_000


async def _found(near: Volume, operation: int) -> Volume:
    (found,) = [one for one in await DRIVER.list(near, UUID) if one.name and one.name.operation == operation]
    return found


async def test_ours_are_told_from_others(folder: Path) -> None:
    origin = _image(folder)
    await DRIVER.snapshot(origin, _named(1))
    await DRIVER.snapshot(origin, _named(1, uuid=OTHER))
    for name in ("qs-1-vda.qcow2", f"qs-{'0' * 32}-1-vda", "--help", "-rf.raw", f"qs-{'g' * 32}-1-vda.raw"):
        (folder / name).write_bytes(b"")
    assert [one.name for one in await DRIVER.list(origin, UUID)] == [_named(1)]
    assert [one.name for one in await DRIVER.list(origin, OTHER)] == [_named(1, uuid=OTHER)]
    assert await DRIVER.list(_volume_at(folder / "gone" / "image"), UUID) == ()


def _volume_at(path: Path) -> Volume:
    return Volume(path=str(path))


async def test_an_image_whose_name_looks_like_an_option(folder: Path) -> None:
    origin = _image(folder, "--reference=x.raw")
    taken = await DRIVER.snapshot(origin, _named(3))
    assert Path(taken.path).read_bytes() == Path(origin.path).read_bytes()


async def test_a_name_that_is_taken_is_refused_and_kept(folder: Path) -> None:
    origin = _image(folder)
    path = Path(DRIVER.where(origin, _named(2)))
    path.write_bytes(b"somebody's")
    with pytest.raises(StateError, match="exists already") as refused:
        await DRIVER.snapshot(origin, _named(2))
    assert refused.value.effect == "none"
    assert path.read_bytes() == b"somebody's"
    assert not list(folder.glob("*.part"))


async def test_another_file_in_the_image_s_place_is_not_snapshotted(folder: Path) -> None:
    origin = _image(folder)
    Path(origin.path).rename(folder / "moved")
    _image(folder)
    with pytest.raises(StoreMismatch, match="not the recorded file"):
        await DRIVER.snapshot(origin, _named(2))
    Path(origin.path).unlink()
    with pytest.raises(NotFoundError):
        await DRIVER.snapshot(origin, _named(2))
    assert await DRIVER.list(origin, UUID) == ()


async def test_removing_takes_only_the_file_that_is_meant(folder: Path) -> None:
    origin = _image(folder)
    taken = await DRIVER.snapshot(origin, _named(4))
    Path(taken.path).rename(folder / "moved")
    Path(taken.path).write_bytes(b"somebody's")
    with pytest.raises(StoreMismatch, match="another file"):
        await DRIVER.remove(taken)
    Path(taken.path).unlink()
    (folder / "moved").rename(taken.path)
    await DRIVER.remove(taken)
    assert not Path(taken.path).exists()
    await DRIVER.remove(taken)
    with pytest.raises(NotFoundError):
        await DRIVER.size(taken)


def _killed_before_its_name(origin: Volume, name: VolumeName, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        os._exit(1)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "link", dies)
        reflink._clone(origin, DRIVER.where(origin, name), name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] >> 8 == 1


async def test_what_was_interrupted_is_listed_as_a_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = _image(folder)
    _killed_before_its_name(origin, _named(5), monkeypatch)
    part = await _found(origin, 5)
    assert part.state == "part"
    await DRIVER.remove(part)
    assert await DRIVER.list(origin, UUID) == ()


@pytest.mark.parametrize("call", ["fsync", "link", "ioctl"])
async def test_a_call_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    origin = _image(folder)

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl if call == "ioctl" else os, call, fails)
    with pytest.raises(HostCannot, match="No space left") as refused:
        await DRIVER.snapshot(origin, _named(6))
    assert refused.value.effect == "none"
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["image.raw"]


async def test_a_link_to_another_file_system_is_refused(folder: Path, tmp_path: Path) -> None:
    _image(tmp_path)
    (folder / "link.raw").symlink_to(tmp_path / "image.raw")
    ability = await DRIVER.probe(Volume(path=str(folder / "link.raw")))
    assert "link to another file system" in ability.why


async def test_a_file_system_without_reflinks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflink, "_able", {})
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # memory, which has none anywhere
        ability = await DRIVER.probe(Volume(path=file.name))
        assert "cannot clone files" in ability.why
        assert "xfs" in ability.remedy


def test_names() -> None:
    name = VolumeName.of(UUID, OperationId(17), "vda")
    assert name.text == "qs-0f7b2c1e8a354a9e9d5e6a6f0d3c1b22-17-vda"
    for path in (f"/a.b/{name.text}.qcow2", f"/dev/vg0/{name.text}", f"rbd:pool/web@{name.text}"):
        assert of_path(path) == name
    for other in ("vda-17", "qs-17-vda", name.text + "x" * 20, name.text.upper(), "qx" + name.text[2:], ""):
        assert VolumeName.parse(other) is None
