"""State files: what is written, what of it is noticed again, and that finishing may die anywhere and be done again."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.errors import HostCannot, StateError, StoreMismatch
from qmpsnap.machine import statefile
from qmpsnap.model.layers.vmstate import Hardware, Manifest
from qmpsnap.model.names import OperationId

STREAM = b"QEVM" + os.urandom(3 << 20) + bytes(1 << 20)
MANIFEST = Manifest(
    operation=OperationId(7),
    snapshot="all",
    created=1.5,
    bytes=0,
    digest="",
    mode="background",
    layout="stream",
    compression="none",
    hardware=Hardware(
        uuid="u",
        qemu_version="10.0.1",
        machine_type="pc-q35-10.0",
        accel="tcg",
        cpu="max",
        cpus=1,
        memory=1,
        devices=(),
    ),
)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """What QEMU has written."""
    path = Path(statefile.part(str(tmp_path / "all"), OperationId(7)))
    descriptor = statefile.create(str(path))
    os.write(descriptor, STREAM)
    os.close(descriptor)
    return path


def loaded(path: Path) -> bytes:
    with statefile.verified(statefile.find(str(path))[0]) as descriptor:
        return os.pread(descriptor, len(STREAM) + 1, 0)[: len(STREAM)]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_what_was_written_is_loaded(part: Path, compression: str) -> None:
    target = part.parent / "all"
    state = statefile.finish(str(part), str(target), replace(MANIFEST, compression=compression))
    assert list(part.parent.iterdir()) == [target]
    assert loaded(target) == STREAM
    found, manifest = statefile.find(str(target))
    assert (found, manifest.bytes, manifest.operation) == (state, state.bytes, 7)
    assert (state.bytes == len(STREAM)) == (compression == "none")


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(
    "dies_in", ["_compress", "_packed_over", "_seal", "ftruncate", "link", "sync_folder", "unlink"]
)
def test_finishing_that_died_is_done_again(
    part: Path, compression: str, dies_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = part.parent / "all"
    manifest = replace(MANIFEST, compression=compression)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owners = {"link": os, "ftruncate": os, "unlink": os, "_packed_over": Path}
    name = "replace" if dies_in == "_packed_over" else dies_in
    monkeypatch.setattr(owners.get(dies_in, statefile), name, dies)
    try:
        statefile.finish(str(part), str(target), manifest)
    except KeyboardInterrupt:
        pass
    else:
        assert compression == "none"
    monkeypatch.undo()
    if target.exists():  # recovery finds it whole
        statefile.discard(str(part))
    else:
        statefile.finish(str(part), str(target), manifest)
    statefile.discard(str(part))
    assert list(part.parent.iterdir()) == [target]
    assert loaded(target) == STREAM


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system like FAT."""

    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuses)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_without_hard_links_it_is_renamed(no_hard_links: None, part: Path, compression: str) -> None:
    target = part.parent / "all"
    statefile.finish(str(part), str(target), replace(MANIFEST, compression=compression))
    assert list(part.parent.iterdir()) == [target]
    assert loaded(target) == STREAM


@pytest.mark.parametrize("fails", ["sync_folder", "the rename"])
def test_without_hard_links_all_or_nothing(
    no_hard_links: None, part: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = part.parent / "all"

    def breaks(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        if fails == "the rename":  # as where neither can be had
            patch.setattr(statefile, "_rename", breaks)
        else:
            patch.setattr(statefile, fails, breaks)
        with pytest.raises(HostCannot, match="Input/output error"):
            statefile.finish(str(part), str(target), MANIFEST)
    assert list(part.parent.iterdir()) == [part]
    statefile.finish(str(part), str(target), MANIFEST)
    assert loaded(target) == STREAM


@pytest.mark.parametrize("links", [True, False])
def test_nobodys_file_is_overwritten(part: Path, request: pytest.FixtureRequest, *, links: bool) -> None:
    if not links:
        request.getfixturevalue("no_hard_links")
    target = part.parent / "all"
    target.write_text("mine")
    with pytest.raises(StateError, match="exists already"):
        statefile.finish(str(part), str(target), MANIFEST)
    assert target.read_text() == "mine"
    with pytest.raises(StateError, match="exists already"):
        statefile.create(str(target))


def test_a_link_is_not_followed(part: Path) -> None:
    target = part.parent / "all"
    statefile.finish(str(part), str(target), MANIFEST)
    link = part.parent / "link"
    link.symlink_to(target)
    with pytest.raises(HostCannot):
        statefile.find(str(link))
    with pytest.raises(StateError):
        statefile.create(str(link))


def test_what_took_the_place_of_the_written_one_is_not_finished(part: Path) -> None:
    other = part.parent / "other"
    other.write_text("mine")
    part.unlink()
    part.symlink_to(other)
    with pytest.raises(HostCannot):
        statefile.finish(str(part), str(part.parent / "all"), MANIFEST)
    with pytest.raises(HostCannot):
        statefile.finish(str(part), str(part.parent / "all"), replace(MANIFEST, compression="zstd"))
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(StoreMismatch, match="not a regular file"):
        statefile.finish(str(part), str(part.parent / "all"), MANIFEST)
    assert other.read_text() == "mine"
    assert not (part.parent / "all").exists()


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("failing", [(os, "link"), (statefile, "sync_folder"), (os, "pwrite")])
def test_what_cannot_be_finished_has_no_name(
    part: Path, failing: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = part.parent / "all"
    monkeypatch.setattr(*failing, fails)
    with pytest.raises(HostCannot, match="Input/output error"):
        statefile.finish(str(part), str(target), MANIFEST)
    assert list(part.parent.iterdir()) == [part]
    monkeypatch.undo()
    statefile.finish(str(part), str(target), MANIFEST)
    assert loaded(target) == STREAM


def test_the_manifest_goes_into_the_promised_room(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(part, os.O_WRONLY)
    statefile.reserve(descriptor, 32 << 20, str(part))
    os.close(descriptor)
    real, before = os.pwrite, []

    def noting(descriptor: int, content: bytes, at: int) -> int:
        before.append(os.fstat(descriptor).st_blocks * 512)
        return real(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", noting)
    statefile.finish(str(part), str(part.parent / "all"), MANIFEST)
    assert before[0] >= 32 << 20
    assert (part.parent / "all").stat().st_blocks * 512 < 16 << 20


def test_past_the_page_cache_it_is_the_same_file(part: Path) -> None:
    descriptor = os.open(part, os.O_WRONLY)
    part.rename(part.parent / "moved")
    direct = statefile.also_direct(descriptor)
    if direct is not None:  # not every file system can
        assert os.path.samestat(os.fstat(direct), os.fstat(descriptor))
        os.close(direct)
    os.close(descriptor)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_it_is_private_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        os.close(statefile.create(str(tmp_path / "x")))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def flipped(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


@pytest.mark.parametrize(
    "spoil",
    [
        flipped,
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[100:],
        lambda content: content[: len(STREAM)],
        lambda _: b"",
        lambda _: statefile.MAGIC,
        lambda _: bytes(56) + statefile.MAGIC,
        lambda content: content[:-56] + bytes(32) + content[-24:],
        lambda content: content[:-24] + b"\xff" * 8 + content[-16:],
    ],
)
def test_whatever_is_changed_is_noticed(part: Path, spoil: Callable[[bytes], bytes]) -> None:
    target = part.parent / "all"
    state = statefile.finish(str(part), str(target), MANIFEST)
    target.write_bytes(spoil(target.read_bytes()))
    with pytest.raises(StoreMismatch), statefile.verified(state):
        raise AssertionError


def test_room_is_promised_without_making_it_longer(tmp_path: Path) -> None:
    path = tmp_path / "x"
    descriptor = statefile.create(str(path))
    statefile.reserve(descriptor, 5 << 20, str(path))
    assert path.stat().st_size == 0
    assert path.stat().st_blocks * 512 >= 5 << 20
    with pytest.raises(HostCannot):
        statefile.reserve(descriptor, 1 << 60, str(path))
    os.close(descriptor)
