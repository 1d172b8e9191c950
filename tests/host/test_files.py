"""The one copy of how files are made, replaced, told apart and removed."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.host import files
from qmpsnap.host.files import FileId, same_file


@pytest.fixture(params=[0o000, 0o777], ids=["umask 000", "umask 777"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_and_folders_are_private(umask: None, tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a/b")
    files.write_new(tmp_path / "a/b/new", b"1")
    files.replace_durably(tmp_path / "a/b/other", b"2")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/new", "a/b/other")] == [0o700, 0o700, 0o600, 0o600]


@pytest.mark.parametrize("there", ["file", "link", "dangling"])
def test_a_taken_name_is_refused(tmp_path: Path, there: str) -> None:
    other, name = tmp_path / "other", tmp_path / "name"
    if there != "dangling":
        other.write_text("mine")
    name.symlink_to(other) if there != "file" else other.rename(name)
    with pytest.raises(FileExistsError):
        files.create_exclusive(name)
    assert other.exists() == (there == "link")


def test_a_file_that_cannot_be_made_private_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuses)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(PermissionError):
        files.create_exclusive(tmp_path / "name")
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_replaced_file_is_written_out_before_its_name_and_its_name_before_we_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        done.append(f"{Path(f'/proc/self/fd/{descriptor}').readlink().name} {os.fstat(descriptor).st_size == 1}")

    def replace(*arguments: str) -> None:
        rename(*arguments)
        done.append("renamed")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.replace_durably(tmp_path / "name", b"1")
    assert done == ["name.part True", "renamed", f"{tmp_path.name} False"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "name").write_text("before")
    (tmp_path / "name.part").write_text("of an earlier try")

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fails)
        with pytest.raises(OSError, match="Input/output"):
            files.replace_durably(tmp_path / "name", b"after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"name": "before"}
    files.replace_durably(tmp_path / "name", b"after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"name": "after"}


@pytest.mark.parametrize("comes", ["a file", "a link to it", "a second name"])
def test_another_files_name_is_not_taken_away(tmp_path: Path, comes: str) -> None:
    name, kept = tmp_path / "name", tmp_path / "kept"
    with open(files.create_exclusive(name)) as ours:  # noqa: PTH123
        assert files.leads_to(name, ours.fileno())
        if comes == "a file":
            name.unlink()
            name.write_text("mine")
        elif comes == "a link to it":
            name.rename(kept)
            name.symlink_to(kept)
        else:
            kept.hardlink_to(name)
        assert files.unlink_own(name, ours.fileno()) == (comes == "a second name")
        assert name.is_symlink() or name.exists() == (comes != "a second name")
        assert not files.unlink_own(tmp_path / "nothing", ours.fileno())


def test_a_file_is_opened_by_its_own_name_and_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with files.opened(tmp_path / "pipe") as descriptor:
        assert not os.get_inheritable(descriptor)
    with pytest.raises(OSError, match="symbolic links"), files.opened(tmp_path / "link"):
        pytest.fail("a link was followed")
    with files.opened_folder(tmp_path) as folder, files.opened("pipe", folder=folder):
        assert FileId.at("pipe", folder=folder) == FileId.at(tmp_path / "pipe")


def test_which_file_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found, link = FileId.at(tmp_path / "a"), FileId.at(tmp_path / "link")
    assert found is not None
    assert link is not None
    assert not same_file(found, link)
    assert FileId.at(tmp_path / "a/b") is None
    assert FileId.at(tmp_path / "nothing") is None
    plain = FileId(found.device, found.inode)
    assert same_file(plain, found, size=2)
    assert not same_file(plain, found, size=3), "the size decides where no birth is known"
    if found.birth:
        assert same_file(found, FileId(found.device, found.inode, found.birth, 9), size=3), "the birth decides"
        assert not same_file(found, FileId(found.device, found.inode, found.birth + 1))
