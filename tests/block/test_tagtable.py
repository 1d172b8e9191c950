"""The names of the tags inside an image, as qemu-img has put them there; and tables that are none."""

import subprocess
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.block.image import snapshot_table
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.names import LayerId


def test_tags_are_read_as_qemu_img_wrote_them(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    layer = Layer(id=LayerId("vda-1"), path=path, format="qcow2", backing=None, virtual_size=1 << 20)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    assert snapshot_table.names(layer) == frozenset()
    for name in ("qs-1-abc", "another one", "é"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, path], check=True)
    assert snapshot_table.names(layer) == frozenset({"qs-1-abc", "another one", "é"})
    subprocess.run(["qemu-img", "snapshot", "-d", "another one", path], check=True)
    assert snapshot_table.names(layer) == frozenset({"qs-1-abc", "é"})
    found = snapshot_table.entries(path, "qcow2")
    assert found
    assert [(entry.id, entry.name) for entry in found] == [("1", "qs-1-abc"), ("3", "é")]
    assert all(abs(entry.created - Path(path).stat().st_mtime) < 60 for entry in found)


@given(st.binary(max_size=300), st.integers(0, 1 << 32))
def test_any_bytes_are_a_table_or_none(table: bytes, count: int) -> None:
    found = snapshot_table.parse(table, count)
    assert found is None or len(found) <= count
