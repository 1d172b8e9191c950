"""The digests that other tests rest on: equal content is equal however it lies on disk, and lost content shows."""

import os
import subprocess
from pathlib import Path

import pytest

from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.names import LayerId
from tests.faults.site import qemu_io
from tests.live.digest import content_digest, whole_digest

QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
SIZE = 1 << 20


def image(file: Path, kind: Format, *writes: str, backing: Path | None = None) -> Layer:
    """An image with this in it; the backing is a qcow2."""
    below = ["-b", str(backing), "-F", "qcow2"] if backing else []
    subprocess.run(
        [QEMU_IMG, "create", "-q", "-f", kind, *below, str(file), *([] if backing else [str(SIZE)])], check=True
    )
    for line in writes:
        subprocess.run([qemu_io(), "-f", kind, "-c", line, str(file)], check=True, capture_output=True)
    return Layer(id=LayerId("vda-1"), path=str(file), format=kind, backing=None, virtual_size=SIZE)


def packed(source: Path, file: Path) -> Layer:
    """A compressed copy."""
    subprocess.run([QEMU_IMG, "convert", "-c", "-f", "qcow2", "-O", "qcow2", str(source), str(file)], check=True)
    return Layer(id=LayerId("vda-1"), path=str(file), format="qcow2", backing=None, virtual_size=SIZE)


async def both(layer: Layer) -> str:
    """Its digest, which must be the same either way."""
    found = await content_digest(layer, qemu_img=QEMU_IMG)
    assert await whole_digest(layer, qemu_img=QEMU_IMG) == found
    return found


async def test_equal_content_has_equal_digests(tmp_path: Path) -> None:
    wanted = await both(image(tmp_path / "raw", "raw", "write -P 1 64k 100k", "write -P 2 900k 512"))
    base = image(tmp_path / "base", "qcow2", "write -P 1 64k 100k", "write -P 9 300k 64k")
    top = image(tmp_path / "top", "qcow2", "write -P 2 900k 512", "write -z 300k 64k", backing=Path(base.path))
    assert await both(top) == wanted
    zeros = image(tmp_path / "zeros", "qcow2", "write -P 0 0 1M", "write -P 1 64k 100k", "write -P 2 900k 512")
    assert await both(zeros) == wanted
    assert await both(packed(Path(top.path), tmp_path / "packed")) == wanted


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_a_block_elsewhere_or_lost_is_another(tmp_path: Path, kind: Format) -> None:
    found = {
        await both(image(tmp_path / name, kind, *writes))
        for name, writes in {
            "whole": ["write -P 1 0 64k", "write -P 1 128k 64k"],
            "moved": ["write -P 1 0 64k", "write -P 1 192k 64k"],
            "lost": ["write -P 1 0 64k"],
            "other": ["write -P 1 0 64k", "write -P 3 128k 64k"],
        }.items()
    }
    assert len(found) == 4
