"""Files at places that users name: removed only where they are the ones that were made."""

import errno
import os
from pathlib import Path

import pytest

from qmpsnap.block.image import staged
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.host.files import FileId
from qmpsnap.host.value import replaced


def made(path: Path) -> FileId:
    path.write_bytes(b"mine")
    found = FileId.at(path)
    assert found
    return found


async def test_a_later_file_of_the_same_number_is_another(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    file = made(path)
    if not file.birth:
        pytest.skip("this file system keeps no time of birth")
    earlier = replaced(file, birth=file.birth - 1)
    assert not await staged.discard(str(path), earlier)
    with pytest.raises(StoreMismatch):
        await staged.make_durable(str(path), earlier)
    with pytest.raises(StoreMismatch):
        await staged.put(str(path), str(tmp_path / "other"), earlier)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]
    assert await staged.discard(str(path), file)


async def test_what_it_holds_and_how_large_it_is_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    file = made(path)
    path.write_bytes(b"written since")
    await staged.make_durable(str(path), file)
    assert await staged.discard(str(path), file)
    path.symlink_to(tmp_path)
    assert not await staged.discard(str(path), file)


async def test_what_cannot_be_looked_at_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "copy"
    file = made(path)

    def fails(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fails)
        for asking in (staged.discard(str(path), file), staged.identity_of(str(path))):
            with pytest.raises(HostCannot, match="cannot be read: Too many open files") as refused:
                await asking
            assert refused.value.effect == "unknown"
    assert await staged.discard(str(path), file)
    assert await staged.identity_of(str(path)) is None
