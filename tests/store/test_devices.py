"""Device numbers that the kernel has given anew: seen by every file that was recorded, or not at all."""

import os
from pathlib import Path

import pytest

from qmpsnap.model.operations import steps
from qmpsnap.store.sqlite.devices import File, moved

OLD = 1 << 40  # no device has it


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in "abc"]
    for file in made:
        file.write_bytes(b"x")
    return made


def recorded(path: Path, device: int | None = OLD) -> File:
    status = path.stat()
    return str(path), status.st_dev if device is None else device, status.st_ino


def test_all_files_are_on_one_other_device(files: list[Path]) -> None:
    assert moved(map(recorded, files)) == {OLD: files[0].stat().st_dev}


def test_nothing_has_changed(files: list[Path]) -> None:
    assert moved(recorded(file, None) for file in files) == {}


def test_one_file_still_is_where_it_was(files: list[Path]) -> None:
    path, device, inode = recorded(files[0], None)
    others = [(str(file), device, file.stat().st_ino + 1) for file in files[1:]]
    assert moved([*others, (path, device, inode)]) == {}
    assert moved([(path, device, inode), *others]) == {}


@pytest.mark.parametrize("how", ["copied", "a link", "a folder"])
def test_a_file_that_is_another_one_is_no_sign_of_it(files: list[Path], how: str) -> None:
    before = [recorded(file) for file in files]
    kept = files[1].rename(files[1].with_name("kept"))  # its inode is not free
    match how:
        case "copied":
            files[1].write_bytes(b"x")
        case "a link":
            files[1].symlink_to(kept)
        case "a folder":
            files[1].mkdir()
    assert moved(before) == {}


def test_what_is_not_there_says_nothing(files: list[Path]) -> None:
    before = [recorded(file) for file in files]
    files[1].unlink()
    assert moved(before) == {OLD: files[0].stat().st_dev}
    for file in files:
        file.unlink(missing_ok=True)
    assert moved(before) == {}


def test_two_devices_have_changed_their_numbers(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inodes = {str(file): file.stat().st_ino for file in files}
    now = {str(files[0]): 8, str(files[1]): 8, str(files[2]): 7}

    def lstat(path: str) -> os.stat_result:
        return os.stat_result((0o100600, inodes[path], now[path], 1, 0, 0, 1, 0, 0, 0))

    monkeypatch.setattr(os, "lstat", lstat)
    assert moved((path, 15 - device, inodes[path]) for path, device in now.items()) == {7: 8, 8: 7}
    now[str(files[1])] = 9
    assert moved((path, 15 - device, inodes[path]) for path, device in now.items() if device != 9) == {7: 8, 8: 7}
    assert moved((path, 7, inodes[path]) for path in (str(files[0]), str(files[1]))) == {}  # on two others: who knows


@pytest.mark.parametrize(
    ("step", "after"),
    [
        ("made:7:12", "made:8:12"),
        ("finalizing:7:7:running", "finalizing:8:7:running"),
        ("started:9:12", "started:9:12"),
        ("7:started:running", "7:started:running"),
        ("transaction", "transaction"),
    ],
)
def test_a_step_that_carries_a_file(step: str, after: str) -> None:
    assert steps.on_device(step, {7: 8}) == after
