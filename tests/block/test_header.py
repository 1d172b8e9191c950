"""Header reader: real images by the real qemu-img, bytes made by hand, and bytes made by chance."""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpsnap.block.image import header
from qmpsnap.block.image.header import Header
from qmpsnap.errors import HostCannot, ImageRefused
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.names import LayerId
from tests.block.images import CLUSTER, GIB, extension, image

Make = Callable[..., Path]


@pytest.fixture
def qemu_img() -> str:
    found = shutil.which(os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img"))
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing; in CI these tests must run")
        pytest.skip("qemu-img is not installed")
    return found


@pytest.fixture
def make(qemu_img: str, tmp_path: Path) -> Make:
    """``make("a.qcow2", "1G", *options)``: an image by qemu-img in the test's folder."""

    def create(name: str, size: str, *options: str) -> Path:
        path = tmp_path / name
        argv = [qemu_img, "create", "-q", "-f", "qcow2", *options, str(path), size]
        subprocess.run(argv, check=True, capture_output=True, cwd=tmp_path)
        return path

    return create


def parse(data: bytes) -> Header:
    return header.parse(data, len(data))


# --- real images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "version", "cluster"),
    [
        (("-o", "compat=0.10"), 2, CLUSTER),
        (("-o", "compat=1.1"), 3, CLUSTER),
        (("-o", "compat=1.1,lazy_refcounts=on"), 3, CLUSTER),
        (("-o", "cluster_size=512"), 3, 512),
        (("-o", "cluster_size=2M"), 3, 2 << 20),
        (("-o", "refcount_bits=64"), 3, CLUSTER),
        (("-o", "extended_l2=on,cluster_size=128k"), 3, 128 << 10),
        (("-o", "compression_type=zstd"), 3, CLUSTER),
        (("-o", "preallocation=metadata"), 3, CLUSTER),
    ],
)
def test_every_kind_of_real_image_is_read(make: Make, options: tuple[str, ...], version: int, cluster: int) -> None:
    path = make("a.qcow2", "1G", *options)
    found = header.require(path, format="qcow2", allowed=[path.parent])
    status = path.stat()
    assert found.format == "qcow2"
    assert found.version == version
    assert found.virtual_size == GIB
    assert found.cluster_size == cluster
    assert (found.device, found.inode) == (status.st_dev, status.st_ino)
    assert found.file_size == status.st_size
    assert found.allocated == status.st_blocks * 512
    assert found.extended_l2 is ("extended_l2=on" in "".join(options))
    assert (found.backing, found.encrypted, found.dirty, found.corrupt) == (None, False, False, False)
    assert found.internal_snapshots == 0


@pytest.mark.parametrize("size", ["0", "512", "64P"])
def test_extreme_sizes_are_read(make: Make, size: str) -> None:
    options = ("-o", "cluster_size=2M") if size == "64P" else ()
    expected = {"0": 0, "512": 512, "64P": 1 << 56}[size]
    assert header.read(make("a.qcow2", size, *options)).virtual_size == expected


def test_internal_snapshots_are_counted(make: Make, qemu_img: str) -> None:
    path = make("a.qcow2", "1M")
    for tag in ("one", "two"):
        subprocess.run([qemu_img, "snapshot", "-c", tag, str(path)], check=True)
    assert header.read(path).internal_snapshots == 2


def test_luks_is_seen_and_read(make: Make) -> None:
    secret = ("--object", "secret,id=s,data=opensesame", "-o", "encrypt.format=luks,encrypt.key-secret=s")
    for attempt in range(20):  # qemu-img measures its key derivation and gives up where a busy host disturbs it
        with contextlib.suppress(subprocess.CalledProcessError):
            path = make(f"{attempt}.qcow2", "1M", *secret, "-o", "encrypt.iter-time=10")
            break
    assert header.read(path).encrypted


def test_aes_is_refused(make: Make) -> None:
    path = make("a.qcow2", "1M", "--object", "secret,id=s,data=sesame", "-o", "encrypt.format=aes,encrypt.key-secret=s")
    with pytest.raises(ImageRefused, match="AES"):
        header.read(path)


def test_an_external_data_file_is_refused(make: Make) -> None:
    path = make("a.qcow2", "1M", "-o", "data_file=a.data")
    with pytest.raises(ImageRefused, match=r"external data file \(a\.data\)"):
        header.read(path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("backing", ["/pool/base.qcow2", "base.qcow2", "sub/b:c,d=e f.qcow2", "./a:b", "/ü"])
def test_a_plain_backing_string_is_read_byte_for_byte(make: Make, compat: str, backing: str) -> None:
    path = make("a.qcow2", "1M", "-u", "-F", "qcow2", "-b", backing, "-o", f"compat={compat}")
    found = header.read(path)
    assert (found.backing, found.backing_format) == (backing, "qcow2")


@pytest.mark.parametrize(
    "backing",
    [
        'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd:localhost:10809",
        "nbd://host/export",
        "http://host/image",
        "file:/etc/passwd",
        "fat:rw:/tmp",
        "a:b",
        ":",
        "/pool/new\nline",
        "/pool/\x1b[2J",
        "/pool/\x85",
    ],
)
def test_any_other_backing_string_is_refused(make: Make, backing: str) -> None:
    path = make("a.qcow2", "1M", "-u", "-F", "raw", "-b", backing)
    with pytest.raises(ImageRefused, match="backing file name") as caught:
        header.read(path)
    assert caught.value.exit_code == 2
    assert caught.value.message.isprintable()


# --- headers made by hand -------------------------------------------------------------------------------------------


def test_the_handmade_image_is_good() -> None:
    """Otherwise the refusals below would prove nothing."""
    found = parse(image(backing=b"/pool/b", extensions=extension(0xE2792ACA, b"raw")))
    assert (found.backing, found.backing_format, found.virtual_size) == ("/pool/b", "raw", GIB)
    assert parse(image(version=2)).version == 2


def test_flags_and_an_odd_size() -> None:
    found = parse(image(features=3, size=GIB - 1))
    assert (found.dirty, found.corrupt) == (True, True)
    assert found.virtual_size == GIB - 512


def test_an_empty_backing_name_is_no_backing() -> None:
    """QEMU reads it so."""
    assert parse(image(backing_offset=128, extensions=extension(0xE2792ACA, b"raw"), end=b"")).backing is None


REFUSED = {
    "nothing at all": (b"", "truncated"),
    "cut in the base header": (image()[:71], "truncated"),
    "cut in the first cluster": (image()[: CLUSTER - 1], "truncated"),
    "other magic": (image(magic=b"QFI\0"), "no qcow2 magic"),
    "version 1": (image(version=1), "version 1"),
    "version 4": (image(version=4), "version 4"),
    "tiny clusters": (image(cluster_bits=8), r"2\^8"),
    "huge clusters": (image(cluster_bits=22), r"2\^22"),
    "endless clusters": (image(cluster_bits=0xFFFFFFFF), "not possible"),
    "header length 96": (image(length=96), "header length"),
    "header length 105": (image(length=105), "header length"),
    "header longer than a cluster": (image(length=CLUSTER + 8), "header length"),
    "refcounts of 128 bits": (image(order=7), "reference counts"),
    "crypt method 3": (image(crypt=3), "encryption method 3"),
    "LUKS without its header": (image(crypt=2), "do not agree"),
    "LUKS header beyond the file": (
        image(crypt=2, extensions=extension(0x0537BE77, struct.pack(">QQ", CLUSTER, 1 << 40))),
        "encryption header",
    ),
    "LUKS pointer of 8 bytes": (image(crypt=2, extensions=extension(0x0537BE77, bytes(8))), "damaged"),
    "external data file bit": (image(features=4), "external data file"),
    "external data file name": (image(extensions=extension(0x44415441, b"/x\n")), r"external data file \(/x\\n\)"),
    "external data file in version 2": (
        image(version=2, extensions=extension(0x44415441, b"/x")),
        "external data file",
    ),
    "unknown bit": (image(features=1 << 63), "bit 63"),
    "unknown bit with a name": (
        image(features=1 << 9, extensions=extension(0x6803F857, b"\0\x09" + b"evil\x1b[2J\n".ljust(46, b"\0"))),
        r"bit 9 \(evil\\x1b\[2J\\n\)",
    ),
    "compression undeclared": (image(compression=1), "compression type 1"),
    "compression declared and zero": (image(features=8), "compression type 0"),
    "compression unknown": (image(features=8, compression=2), "compression type 2"),
    "extended L2 with small clusters": (
        image(features=16, cluster_bits=12, l1_size=0, size=0, l1_offset=0),
        "extended L2",
    ),
    "virtual size 2^63": (image(size=1 << 63), "virtual size"),
    "virtual size 2^64-1": (image(size=(1 << 64) - 1), "virtual size"),
    "L1 too small": (image(size=GIB + 512), "too small"),
    "no L1": (image(l1_size=0), "too small"),
    "giant L1": (image(l1_size=0xFFFFFFFF), "L1 table of 34359738360 bytes"),
    "L1 beyond the file": (image(l1_offset=1 << 40), "beyond the end"),
    "L1 half beyond the file": (image(total=3 * CLUSTER + 15), "beyond the end"),
    "L1 in the header": (image(l1_offset=0), "inside another cluster"),
    "L1 not aligned": (image(l1_offset=CLUSTER + 8), "inside another cluster"),
    "L1 at the end of numbers": (image(l1_offset=(1 << 64) - CLUSTER), "beyond the end"),
    "no refcount table": (image(refcount_clusters=0), "no refcount table"),
    "giant refcount table": (image(refcount_clusters=0xFFFFFFFF), "refcount table of"),
    "refcount table beyond the file": (image(refcount_offset=1 << 40), "refcount table is beyond"),
    "refcount table in the header": (image(refcount_offset=0), "inside another cluster"),
    "giant snapshot table": (image(snapshots=0xFFFFFFFF, snapshots_offset=CLUSTER), "snapshot table of"),
    "snapshot table beyond the file": (image(snapshots=3, snapshots_offset=3 * CLUSTER), "beyond the end"),
    "backing name too long": (image(backing=b"/" + b"a" * 1023), "1024 bytes"),
    "backing length 2^32-1": (image(backing=b"/a", backing_length=0xFFFFFFFF), "outside the first cluster"),
    "backing outside the first cluster": (image(backing_offset=CLUSTER, backing_length=4), "outside the first cluster"),
    "backing far outside": (image(backing_offset=1 << 62, backing_length=4), "outside the first cluster"),
    "backing inside the header": (image(backing_offset=8, backing_length=4), "inside the header"),
    "backing inside an extension": (
        image(backing_offset=124, backing_length=4, extensions=extension(0x1234, b"/aaaaaaaaaaa")),
        "past the end",
    ),
    "backing with NUL": (image(backing=b"/pool/a\0/b"), "control characters"),
    "backing not UTF-8": (image(backing=b"/pool/\xff"), "not UTF-8"),
    "backing json": (image(backing=b"json:{}"), "json"),
    "backing format too long": (image(backing=b"/b", extensions=extension(0xE2792ACA, b"q" * 16)), "not a format name"),
    "backing format with NUL": (image(backing=b"/b", extensions=extension(0xE2792ACA, b"raw\0")), "not a format name"),
    "backing format not ASCII": (image(backing=b"/b", extensions=extension(0xE2792ACA, b"\xff")), "not a format name"),
    "extension past the cluster": (image(extensions=struct.pack(">II", 0x1234, CLUSTER)), "past the end"),
    "extension of 4 GiB": (image(extensions=struct.pack(">II", 0x1234, 0xFFFFFFFF)), "past the end"),
    "extension twice": (image(extensions=extension(0x1234, b"") * 2), "twice"),
    "extensions without end": (
        image(extensions=b"".join(extension(number, b"") for number in range(1, 1000))),
        "do not end",
    ),
    "extension header cut by the backing name": (
        image(extensions=extension(0x1234, bytes(8)), end=bytes(4), backing=b"/b"),
        "do not end",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_header_is_refused_with_its_reason(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(ImageRefused, match=reason) as caught:
        header.parse(data, len(data), path="/pool/a\x07.qcow2")
    assert r"/pool/a\x07.qcow2" in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("end", [b"", bytes(8)])
def test_extensions_may_end_at_the_backing_name(end: bytes) -> None:
    assert parse(image(backing=b"/b", extensions=extension(0x1234, b"abc"), end=end)).backing == "/b"


# --- bytes made by chance -------------------------------------------------------------------------------------------

GOOD = image(
    backing=b"/pool/base",
    cluster_bits=9,
    size=1 << 20,
    l1_size=32,
    l1_offset=1536,
    refcount_offset=512,
    total=2048,
    extensions=extension(0xE2792ACA, b"raw") + extension(0x6803F857, b"\0\x09" + b"name".ljust(46, b"\0")),
)


def judged(data: bytes, size: int) -> None:
    begin = time.process_time()
    try:
        found = header.parse(data, size)
    except ImageRefused:
        pass
    else:
        assert 0 <= found.virtual_size < 1 << 63
        assert found.backing is None or header.backing_fault(found.backing) is None
        assert found.l1_offset + found.l1_size * 8 <= size
    assert time.process_time() - begin < 2


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6), st.data())
def test_a_mutated_header_is_read_or_refused(changes: list[tuple[int, bytes]], data: st.DataObject) -> None:
    bent = bytearray(GOOD)
    for place, value in changes:
        bent[place : place + len(value)] = value
    cut = data.draw(st.integers(0, len(bent)) | st.just(len(bent)))
    judged(bytes(bent[:cut]), cut)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=4096), st.integers(0, 1 << 64))
def test_random_bytes_are_read_or_refused(data: bytes, size: int) -> None:
    judged(data, size)
    judged(GOOD[:8] + data, size)
    judged(GOOD[:112] + data.ljust(512, b"\0"), size)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(4, 180), st.binary(min_size=1, max_size=9)), max_size=4),
    st.sampled_from([b"a", b"./b", b"../../etc/passwd", b"/", b".", b"b", b"/dev/zero", b"json:{}", b"b\0", b"nbd:x"])
    | st.binary(max_size=40),
)
def test_a_chain_of_bent_headers_is_read_or_refused(changes: list[tuple[int, bytes]], backing: bytes) -> None:
    bent = bytearray(image(backing=backing, extensions=extension(0xE2792ACA, b"qcow2")))
    for place, value in changes:
        bent[place : place + len(value)] = value
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").write_bytes(bent)
        (folder / "b").write_bytes(image())
        try:
            layers = header.read_chain(folder / "a", "qcow2", allowed=[folder])
        except (ImageRefused, HostCannot):
            return
        assert len(layers) <= 2
        assert all(Path(layer.path).resolve().is_relative_to(folder.resolve()) for layer in layers)


# --- files ----------------------------------------------------------------------------------------------------------


def test_raw_is_rounded_up_to_sectors_as_qemu_does(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1000))
    assert header.require(path, format="raw").virtual_size == 1024
    assert header.read(path).format == "raw"


@pytest.mark.parametrize("kind", ["symlink", "pipe", "socket", "folder", "missing", "nul", "device"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    match kind:
        case "symlink":
            (tmp_path / "b").write_bytes(GOOD)
            path.symlink_to("b")
        case "pipe":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(str(path))
        case "folder":
            path.mkdir()
        case "nul":
            path = Path(f"{path}\0b")
        case "device":
            path = Path("/dev/null")
        case _:
            pass
    with pytest.raises(ImageRefused):
        header.read(path)
    with pytest.raises(ImageRefused):
        header.require(path, format="raw", allowed=[tmp_path])


def test_declared_qcow2_without_its_magic(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"vhdxfile".ljust(1024, b"\0"))
    with pytest.raises(ImageRefused, match="no qcow2 header") as caught:
        header.require(path, format="qcow2")
    assert "vhdx" in caught.value.hint


@pytest.mark.parametrize(
    "begin",
    [
        b"QFI\xfb",
        b"KDMV",
        b"COWD",
        b"vhdxfile",
        b"QED\0",
        b"WithoutFreeSpace",
        b"conectix",
        bytes(64) + b"\x7f\x10\xda\xbe",
    ],
)
def test_declared_raw_with_another_magic(tmp_path: Path, begin: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(begin.ljust(1024, b"\0"))
    with pytest.raises(ImageRefused, match="declared raw but begins like") as caught:
        header.require(path, format="raw")
    assert caught.value.hint
    assert header.read(path, format="raw").virtual_size == 1024, "our own raw layer stays raw for ever"


def test_luks_under_raw_is_opaque(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"LUKS\xba\xbe\0\1".ljust(1024, b"\0"))
    assert header.require(path, format="raw").format == "raw"


def test_images_lie_in_allowed_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (inside / "way").symlink_to(outside)
    (tmp_path / "alias").symlink_to(inside)
    for place in (inside / "deep" / "a", outside / "a"):
        place.write_bytes(bytes(512))
    for good in (inside / "deep" / "a", tmp_path / "alias" / "deep" / "a", inside / "way" / ".." / "in" / "deep" / "a"):
        assert header.require(good, format="raw", allowed=[tmp_path / "alias"]).file_size == 512
    for bad in (outside / "a", inside / ".." / "out" / "a", inside / "way" / "a", Path(f"{inside}-not") / "a"):
        with pytest.raises(ImageRefused):
            header.require(bad, format="raw", allowed=[inside])
    with pytest.raises(ImageRefused, match="outside the allowed folders"):
        header.require(inside / "deep" / "a", format="raw", allowed=[])


# --- chains ---------------------------------------------------------------------------------------------------------


def test_a_chain_is_read_base_first(make: Make, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    make("sub/mid.qcow2", "1M", "-u", "-F", "raw", "-b", "../base.raw")
    top = make("top.qcow2", "1M", "-u", "-F", "qcow2", "-b", f"{tmp_path}/./sub/mid.qcow2")
    chain = header.read_chain(top, "qcow2", allowed=[tmp_path])
    assert [(layer.path, layer.format) for layer in chain] == [
        (f"{tmp_path}/./sub/../base.raw", "raw"),
        (f"{tmp_path}/./sub/mid.qcow2", "qcow2"),
        (str(top), "qcow2"),
    ]
    assert chain[1].path == chain[2].header.backing, "an absolute string is kept byte for byte"


def test_a_relative_start_becomes_absolute(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("a.qcow2", "1M")
    monkeypatch.chdir(tmp_path)
    assert header.read_chain("a.qcow2", "qcow2", allowed=None)[0].path == f"{tmp_path}/a.qcow2"


def test_a_backing_without_its_format_is_refused(make: Make, tmp_path: Path) -> None:
    data = image(backing=b"b 'c'")
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ImageRefused, match="raw or qcow2 would have to be guessed") as caught:
        header.read_chain(tmp_path / "a", "qcow2", allowed=[tmp_path])
    assert "qemu-img rebase -u -F" in caught.value.hint


def test_a_backing_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(image(backing=b"b", extensions=extension(0xE2792ACA, b"vmdk")))
    with pytest.raises(ImageRefused, match="of format vmdk"):
        header.read_chain(tmp_path / "a", "qcow2", allowed=[tmp_path])


def test_a_raw_base_that_is_qcow2_is_refused(make: Make, tmp_path: Path) -> None:
    """A guest that wrote a header of its own into a raw disk gains nothing."""
    base = make("base", "1M", "-u", "-F", "raw", "-b", "/etc/passwd")
    top = make("top", "1M", "-u", "-F", "raw", "-b", str(base))
    with pytest.raises(ImageRefused, match="declared raw but begins like a qcow2"):
        header.read_chain(top, "qcow2", allowed=[tmp_path])


def test_a_backing_outside_the_allowed_folders_is_refused(make: Make, tmp_path: Path) -> None:
    top = make("top", "1M", "-u", "-F", "raw", "-b", "../../../../../../../../etc/passwd")
    with pytest.raises(ImageRefused, match="outside the allowed folders"):
        header.read_chain(top, "qcow2", allowed=[tmp_path])


def test_a_loop_is_refused(make: Make, tmp_path: Path) -> None:
    make("a", "1M", "-u", "-F", "qcow2", "-b", "b")
    make("b", "1M", "-u", "-F", "qcow2", "-b", "c")
    os.link(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ImageRefused, match="loops"):
        header.read_chain(tmp_path / "a", "qcow2", allowed=[tmp_path])


def test_a_chain_may_be_so_deep_and_no_deeper(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(image())
    for number in range(1, 257):
        qcow2 = extension(0xE2792ACA, b"qcow2")
        (tmp_path / str(number)).write_bytes(image(backing=str(number - 1).encode(), extensions=qcow2))
    assert len(header.read_chain(tmp_path / "255", "qcow2", allowed=[tmp_path])) == 256
    with pytest.raises(ImageRefused, match="more than 256 layers"):
        header.read_chain(tmp_path / "256", "qcow2", allowed=[tmp_path])


# --- empty or not ---------------------------------------------------------------------------------------------------


def layer_at(path: Path, format: Format = "qcow2") -> Layer:  # noqa: A002
    return Layer(id=LayerId("vda-1"), path=str(path), format=format, backing=None, virtual_size=1 << 20)


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=512"), ("-o", "extended_l2=on")], ids=" ".join)
def test_an_image_is_empty_until_something_is_written(make: Make, qemu_img: str, options: tuple[str, ...]) -> None:
    path = make("a.qcow2", "64M", *options)
    assert header.is_empty(layer_at(path))
    content = path.with_name("content")
    content.write_bytes(b"\1" * 512)
    argv = [qemu_img, "convert", "-n", "-f", "raw", "-O", "qcow2", str(content), str(path)]
    subprocess.run(argv, check=True, capture_output=True)
    assert not header.is_empty(layer_at(path))


def test_an_image_with_a_tag_is_not_empty(make: Make, qemu_img: str) -> None:
    path = make("a.qcow2", "1M")
    subprocess.run([qemu_img, "snapshot", "-c", "tag", str(path)], check=True, capture_output=True)
    assert not header.is_empty(layer_at(path))


def test_a_raw_image_is_never_known_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    assert not header.is_empty(layer_at(tmp_path / "a.raw", "raw"))


def test_an_image_that_is_not_there_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ImageRefused, match="there is no image"):
        header.is_empty(layer_at(tmp_path / "gone"))
