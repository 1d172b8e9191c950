"""Leaked clusters: given back where a killed QEMU has left them, and kept where a table was lost that named them."""

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpsnap.block.image import header, verify
from qmpsnap.errors import StateError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId
from qmpsnap.ops.base.context import Context
from qmpsnap.ops.check import check
from tests.ops.test_check import image, img, poke, web  # noqa: F401 - a fixture

CLUSTER = 1 << 16


def io(path: Path | str, *commands: str, fails: bool = False) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, path], check=False, capture_output=True)
    assert bool(done.returncode) is fails, done


def written(path: Path) -> None:
    """Data in clusters one behind the other."""
    io(path, *(f"write -q -P {number} {number * CLUSTER} 64k" for number in (1, 2, 3, 200)), "flush")


def killed(path: Path) -> None:
    """As when QEMU dies within a flush: new clusters are counted, and in no table yet."""
    file = {"driver": "file", "filename": str(path)}
    failing = {"driver": "blkdebug", "image": file, "inject-error": [{"event": "l2_update", "errno": 5}]}
    name = "json:" + json.dumps({"driver": "qcow2", "file": failing, "backing": None})
    subprocess.run(["qemu-io", "-c", "write -q -P 9 2M 64k", "-c", "flush", name], check=False, capture_output=True)


def first_table(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(header.read(path).l1_offset)
        return int.from_bytes(file.read(8), "big") & 0x00FF_FFFF_FFFF_FE00


def counts(path: Path) -> tuple[int, int]:
    """Where the table of reference counts lies, and its first block."""
    with path.open("rb") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        return table, int.from_bytes(file.read(8), "big")


def tagged(path: Path) -> None:
    """A snapshot inside that the header no longer knows; the guest has written on."""
    img("snapshot", "-c", "inside", path)
    io(path, f"write -q -P 8 {CLUSTER} 64k")
    poke(path, 60, bytes(12))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2 * CLUSTER)


LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "L1 zeroed": (lambda path: poke(path, header.read(path).l1_offset, bytes(8)), "table-lost"),
    "L2 zeroed": (lambda path: poke(path, first_table(path), bytes(CLUSTER)), "table-lost"),
    "a sector of L2": (lambda path: poke(path, first_table(path), bytes(512)), "table-lost"),
    "a page of L2": (lambda path: poke(path, first_table(path) + 8, bytes(8)), "table-lost"),
    "no snapshots in the header": (tagged, "table-lost"),
    "count block zeroed": (lambda path: poke(path, counts(path)[1], bytes(CLUSTER)), "image-damaged"),
    "count table zeroed": (lambda path: poke(path, counts(path)[0], bytes(CLUSTER)), "image-damaged"),
    "a count zeroed": (lambda path: poke(path, counts(path)[1] + 2 * 5, bytes(2)), "image-damaged"),
    "cut": (cut, "image-damaged"),
}


@pytest.mark.parametrize("what", LOSSES)
async def test_what_a_lost_table_has_named_is_never_given_back(web: Context, what: str) -> None:  # noqa: F811
    lose, expected = LOSSES[what]
    path = image(web, "vda-3")
    written(path)
    lose(path)
    before = path.read_bytes()
    done = await check.run(web, "web", deep=True, mend=True)
    assert {finding.code for finding in done.findings} == {expected}
    assert not any(finding.repairable for finding in done.findings)
    assert path.read_bytes() == before


async def test_what_a_killed_qemu_has_left_is_given_back(web: Context) -> None:  # noqa: F811
    path = image(web, "vda-3")
    written(path)
    killed(path)
    (finding,) = (await check.run(web, "web", deep=True)).findings
    assert (finding.code, finding.repairable) == ("image-leaks", True)
    done = await check.run(web, "web", deep=True, mend=True)
    assert (done.findings, [finding.code for finding in done.repaired], done.failed) == ((), ["image-leaks"], ())


def layer_of(path: Path) -> Layer:
    return Layer(id=LayerId("vda-1"), path=str(path), format="qcow2", backing=None, virtual_size=64 << 20)


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=16k,extended_l2=on"])
async def test_the_newest_table_that_is_not_named_is_known_by_its_looks(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    img("create", "-q", "-f", "qcow2", "-o", options, path, "64M")
    io(path, "write -q -P 1 0 64k", "write -q -P 2 32M 64k", "flush")
    entries = header.read(path).l1_size
    poke(path, header.read(path).l1_offset + entries // 2 * 8, bytes(8))
    verdict, said = await verify.check(layer_of(path), qemu_img="qemu-img")
    assert verdict == "lost"
    assert "looks like a table" in said


async def test_it_is_asked_again_before_anything_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    img("create", "-q", "-f", "qcow2", path, "64M")
    written(path)
    killed(path)
    layer = layer_of(path)
    assert (await verify.check(layer, qemu_img="qemu-img"))[0] == "leaks"
    poke(path, first_table(path), bytes(CLUSTER))
    with pytest.raises(StateError, match="names nothing"):
        await verify.give_back(layer, qemu_img="qemu-img")
