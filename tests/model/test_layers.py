"""Chains as values, and the block options that QEMU is given for them."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpsnap.errors import NotFoundError
from qmpsnap.model.layers.blockdev import chain_options, layer_options, node_name
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.spec import Cache, DiskSpec, Format
from qmpsnap.model.names import DISK_NAME, LayerId, NodeName, layer_id

NODE_NAME_LIMIT = 31
"""Characters QEMU allows in a node name (its buffer has 32 bytes)."""


def layer(identity: str, backing: str | None = None, layer_format: Format = "qcow2") -> Layer:
    below = LayerId(backing) if backing else None
    path = f"/m/{identity}.{layer_format}"
    return Layer(id=LayerId(identity), path=path, format=layer_format, backing=below, virtual_size=1 << 20)


CHAIN = Chain("vda", (layer("vda-1"), layer("vda-2", "vda-1")))
DISK = DiskSpec(name="vda", size=1 << 20)


# --- chains ---------------------------------------------------------------------------------------------------------


def test_an_overlay_becomes_active_in_a_new_chain_and_the_old_one_stays() -> None:
    top = layer("vda-3", "vda-2")
    after = CHAIN.with_overlay(top)
    assert (after.disk, after.ids, after.active, after.base) == ("vda", ("vda-1", "vda-2", "vda-3"), top, CHAIN.base)
    assert CHAIN.ids == ("vda-1", "vda-2")


@pytest.mark.parametrize("backing", [None, "vda-1", "vda-9"])
def test_an_overlay_on_anything_but_the_active_layer_is_refused(backing: str | None) -> None:
    with pytest.raises(ValueError, match=f"vda-3 backs onto {backing}, not onto vda-2"):
        CHAIN.with_overlay(layer("vda-3", backing))


def test_a_layer_is_found_by_its_id_in_its_own_chain_only() -> None:
    assert CHAIN.layer("vda-1") is CHAIN.base
    with pytest.raises(NotFoundError, match="disk vda has no layer vdb-1") as caught:
        CHAIN.layer("vdb-1")
    assert caught.value.exit_code == 3


# --- options --------------------------------------------------------------------------------------------------------


def test_a_chain_is_spelled_out_base_first_down_to_no_backing_and_only_its_top_is_written_to() -> None:
    options = chain_options(CHAIN.with_overlay(layer("vda-3", "vda-2")), DISK)
    assert [(node["node-name"], node["backing"], node["read-only"]) for node in options] == [
        ("vda-1", None, True),
        ("vda-2", "vda-1", True),
        ("vda-3", "vda-2", False),
    ]
    assert [(node["file"]["filename"], node["file"]["node-name"]) for node in options] == [
        (f"/m/vda-{number}.qcow2", f"vda-{number}.file") for number in (1, 2, 3)
    ]


def test_no_layer_of_a_read_only_disk_is_written_to() -> None:
    disk = DiskSpec(name="vda", image="/m/x", read_only=True)
    assert [node["read-only"] for node in chain_options(CHAIN, disk)] == [True, True]


def test_a_raw_layer_says_nothing_of_a_backing_which_it_cannot_have() -> None:
    (options,) = chain_options(Chain("vda", (layer("vda-1", layer_format="raw"),)), DISK)
    assert (options["driver"], "backing" in options) == ("raw", False)


def test_a_new_overlay_says_no_backing_at_all() -> None:
    options = layer_options(layer("vda-3", "vda-2"), DISK, backing=None, read_only=False)
    assert "backing" in options
    assert options["backing"] is None


@pytest.mark.parametrize(
    ("cache", "direct", "no_flush"),
    [
        ("writeback", False, False),
        ("none", True, False),
        ("writethrough", False, False),
        ("directsync", True, False),
        ("unsafe", False, True),
    ],
)
def test_the_cache_mode_holds_for_format_and_file_alike(cache: Cache, *, direct: bool, no_flush: bool) -> None:
    options = layer_options(layer("vda-1"), DiskSpec(name="vda", cache=cache), backing=None, read_only=False)
    assert options["cache"] == options["file"]["cache"] == {"direct": direct, "no-flush": no_flush}


def test_every_cache_mode_is_tested_above() -> None:
    assert set(get_args(Cache)) == {"writeback", "none", "writethrough", "directsync", "unsafe"}


@pytest.mark.parametrize(
    ("discard", "read_only", "mode"),
    [(True, False, "unmap"), (True, True, "ignore"), (False, False, "ignore"), (False, True, "ignore")],
)
def test_only_a_layer_that_is_written_to_passes_discards_on(*, discard: bool, read_only: bool, mode: str) -> None:
    disk = DiskSpec(name="vda", discard=discard)
    options = layer_options(layer("vda-1"), disk, backing=NodeName("x"), read_only=read_only)
    assert options["discard"] == options["file"]["discard"] == mode


@given(st.from_regex(DISK_NAME, fullmatch=True), st.integers(1, 99_999_999))
def test_every_node_name_fits_qemus_limit(disk: str, serial: int) -> None:
    options = layer_options(layer(layer_id(disk, serial)), DISK, backing=None, read_only=False)
    assert options["node-name"] == node_name(layer(layer_id(disk, serial)))
    for name in (options["node-name"], options["file"]["node-name"]):
        assert len(name) <= NODE_NAME_LIMIT
        assert name[0].isalpha()  # QEMU's ids begin with a letter


def test_the_longest_disk_name_and_number_still_fit() -> None:
    longest = layer(layer_id("d" * 16, 99_999_999))
    file = layer_options(longest, DISK, backing=None, read_only=False)["file"]
    assert file["node-name"] == f"{'d' * 16}-99999999.file"
    assert len(file["node-name"]) <= NODE_NAME_LIMIT
