"""RBD images as values: QEMU's own name for one, and the arguments that name it to Ceph's programs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qmpsnap.block.image.qcow2 import backing_fault
from qmpsnap.model.layers.blockdev import layer_options
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.rbd import RbdImage, shown
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import LayerId

WHOLE = RbdImage(pool="p", image="i", namespace="n", conf="/c/ceph.conf", user="u")
NAMES = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_.+=-]{0,20}", fullmatch=True)


def test_a_name_is_the_one_that_qemu_gives_its_raw_node() -> None:
    """Measured on QEMU 7.2; tests/live/test_rbd.py asks for no ``json:`` above it."""
    assert WHOLE.filename == (
        'json:{"driver": "raw", "file": {"pool": "p", "image": "i", "conf": "/c/ceph.conf", "driver": "rbd",'
        ' "namespace": "n", "user": "u"}}'
    )
    assert RbdImage(pool="p", image="i", snapshot="s", namespace="n").filename == (
        'json:{"driver": "raw", "file": {"pool": "p", "image": "i", "snapshot": "s", "driver": "rbd",'
        ' "namespace": "n"}}'
    )
    assert RbdImage(pool="p", image="i").filename == (
        'json:{"driver": "raw", "file": {"pool": "p", "image": "i", "driver": "rbd"}}'
    )


IMAGES = st.builds(
    RbdImage,
    pool=NAMES,
    image=NAMES,
    namespace=st.none() | NAMES,
    user=st.none() | NAMES,
    conf=st.none() | NAMES.map(lambda name: f"/etc/{name}"),
    snapshot=st.none() | NAMES,
)


@given(image=IMAGES)
def test_a_name_is_read_back(image: RbdImage) -> None:
    assert RbdImage.parse(image.filename) == image
    assert backing_fault(image.filename) is None


@pytest.mark.parametrize(
    "name",
    [
        "json:{}",
        "json:[1]",
        "json:",
        "rbd:p/i",
        "/p/i",
        "json:1",
        'json:{"file": {"pool": "p", "image": 1, "driver": "rbd"}}',
        WHOLE.filename.replace("rbd", "nbd"),
        WHOLE.filename.replace('"n"', "null"),
        WHOLE.filename.replace('"u"', '"u", "key-secret": "k"'),
        WHOLE.filename + " ",
    ],
)
def test_another_name_is_none(name: str) -> None:
    assert RbdImage.parse(name) is None
    assert shown(name) == name


def test_no_argument_can_be_taken_for_an_option() -> None:
    odd = RbdImage(pool="--pool", image="--help")
    assert odd.arguments == ["--pool=--pool", "--image=--help"]
    assert WHOLE.arguments == ["--conf=/c/ceph.conf", "--id=u", "--pool=p", "--namespace=n", "--image=i"]
    assert WHOLE.client == WHOLE.arguments[:2]
    assert replace(WHOLE, snapshot="s").arguments == [*WHOLE.arguments, "--snap=s"]
    assert str(replace(WHOLE, snapshot="s")) == "p/n/i@s"


def test_its_node_has_qemus_options_and_no_name_of_a_file() -> None:
    disk = DiskSpec(name="vda", rbd=WHOLE, format="raw")
    layer = Layer(id=LayerId("vda-1"), path=WHOLE.filename, format="raw", backing=None, virtual_size=1, storage="rbd")
    options = layer_options(layer, disk, backing=None, read_only=False)
    assert options["driver"] == "raw"
    assert {key: options["file"][key] for key in ("driver", "pool", "image", "namespace", "conf", "user")} == {
        "driver": "rbd", "pool": "p", "image": "i", "namespace": "n", "conf": "/c/ceph.conf", "user": "u",
    }  # fmt: skip
    assert "filename" not in options["file"]
    assert options["file"]["discard"] == "unmap"
    assert layer.shown == "rbd:p/n/i"
