"""Layers that are recorded, or name their backing, as no release of ours does it; what `define` bounds."""

import sqlite3
import struct
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.block.image.header import MAX_TAGS
from qmpsnap.errors import ImageRefused, LayersCircular
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB

_TAGS = struct.Struct(">IQ")
"""Number of snapshots and the place of their table, at byte 60 of a qcow2 header."""


async def _defined(q: qmpsnap.Controller) -> qmpsnap.MachineHandle:
    return await q.define(MachineSpec(name="m", agent=False, disks=(DiskSpec(name="vda", size=MIB),)))


async def test_layers_that_read_themselves(q: qmpsnap.Controller) -> None:
    vm = await _defined(q)
    for name in ("a", "b"):
        await vm.snapshot(name)
    base, _, top = (view.layer for view in (await vm.chains())[0].layers)
    connection = sqlite3.connect(q.context.home.store)
    with connection:
        connection.execute("UPDATE layer SET backing = ? WHERE id = ?", (top.id, base.id))
    connection.close()
    assert [finding.code for finding in (await vm.check(deep=True)).findings] == ["layers-circular"]
    for refused in (vm.start(paused=True), vm.snapshot("c"), vm.delete_snapshots("a")):
        with pytest.raises(LayersCircular):
            await refused


@pytest.mark.parametrize("said", ["raw", ""], ids=["another", "none"])
async def test_a_backing_format_that_was_changed(q: qmpsnap.Controller, said: str) -> None:
    vm = await _defined(q)
    await vm.snapshot("a")
    top = Path((await vm.chains())[0].active.path)
    before = struct.pack(">II", 0xE2792ACA, 5) + b"qcow2"
    # A header extension of another kind is passed over.
    after = struct.pack(">II", 0xE2792ACA, 3) + b"raw\0\0" if said else struct.pack(">II", 0x12345678, 5) + b"qcow2"
    whole = top.read_bytes()
    assert before in whole
    top.write_bytes(whole.replace(before, after, 1))
    assert [finding.code for finding in (await vm.check(deep=True)).findings] == ["backing-format-differs"]


async def test_more_snapshots_inside_than_qemu_opens_in_any_time(q: qmpsnap.Controller, place: Path) -> None:
    image = place / "many.qcow2"
    await anyio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(MIB)])
    with image.open("r+b") as file:
        file.truncate(4 << 20)
        file.seek(60)
        file.write(_TAGS.pack(MAX_TAGS + 1, 1 << 20))
    disk = DiskSpec(name="vda", image=str(image), format="qcow2")
    with pytest.raises(ImageRefused, match=f"{MAX_TAGS + 1} internal snapshots"):
        await q.define(MachineSpec(name="m", disks=(disk,)), folders=[place])


async def test_recover_writes_a_description_that_an_undefine_has_removed(q: qmpsnap.Controller) -> None:
    vm = await _defined(q)
    q.context.home.record("m").unlink()
    assert [finding.code for finding in (await vm.check()).findings] == ["record-missing"]
    assert await vm.recover() == []
    assert (await vm.check()).findings == ()
