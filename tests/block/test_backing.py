"""Another backing string in a header: of that very file, whatever its name leads to by then."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.block.image import backing, header, qemu_img
from qmpsnap.errors import StoreMismatch
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId

QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
SIZE = 1 << 20


def made(path: Path, below: Path | None = None) -> Layer:
    options = ["-b", str(below), "-F", "qcow2"] if below else []
    subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", *options, str(path), str(SIZE)], check=True)
    status = path.stat()
    return Layer(
        id=LayerId(path.name),
        path=str(path),
        format="qcow2",
        backing=None,
        virtual_size=SIZE,
        device=status.st_dev,
        inode=status.st_ino,
    )


async def test_it_is_changed_and_taken_away(tmp_path: Path) -> None:
    old, new = made(tmp_path / "old"), made(tmp_path / "new")
    layer = made(tmp_path / "layer", tmp_path / "old")
    await backing.set_backing(layer, new, qemu_img=QEMU_IMG)
    found = header.read(layer.path)
    assert (found.backing, found.backing_format) == (new.path, "qcow2")
    await backing.set_backing(layer, None, qemu_img=QEMU_IMG)
    assert header.read(layer.path).backing is None
    await backing.set_backing(layer, old, qemu_img=QEMU_IMG)
    assert header.read(layer.path).backing == old.path


async def test_a_file_that_comes_in_its_place_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "old")
    new, layer, victim = made(tmp_path / "new"), made(tmp_path / "layer", tmp_path / "old"), made(tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    real = qemu_img.run

    async def swapping(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "layer").rename(tmp_path / "away")
        (tmp_path / "layer").symlink_to(victim.path)
        return await real(*arguments, **options)

    monkeypatch.setattr(qemu_img, "run", swapping)
    await backing.set_backing(layer, new, qemu_img=QEMU_IMG)
    assert (tmp_path / "victim").read_bytes() == before
    assert header.read(tmp_path / "away").backing == new.path
    monkeypatch.setattr(qemu_img, "run", real)
    (tmp_path / "layer").unlink()
    (tmp_path / "layer").hardlink_to(victim.path)
    with pytest.raises(StoreMismatch, match="not the recorded file"):
        await backing.set_backing(layer, new, qemu_img=QEMU_IMG)
    assert (tmp_path / "victim").read_bytes() == before
