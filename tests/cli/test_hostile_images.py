"""Images made to harm whoever opens them: refused by our own reader, before QEMU or qemu-img is even started."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from tests.block.images import CLUSTER, extension, image
from tests.cli import assumed_qemu, seeded

QCOW2 = extension(0xE2792ACA, b"qcow2")

SIZE = 64 << 20
"""That of the seeded machine's disk, so that a mirror has nothing else to refuse."""


def bent(**fields: Any) -> bytes:
    """An image of that size."""
    return image(**({"size": SIZE} | fields))


HOSTILE = {
    "data-file": bent(features=4, extensions=extension(0x44415441, b"/etc/shadow")),
    "data-file-unflagged": bent(extensions=extension(0x44415441, b"/etc/shadow")),
    "json": bent(backing=b'json:{"driver":"file","filename":"/etc/shadow"}', extensions=QCOW2),
    "protocol": bent(backing=b"nbd://10.0.0.1/x", extensions=QCOW2),
    "fat": bent(backing=b"fat:rw:/etc", extensions=QCOW2),
    "nul": bent(backing=b"base\0/../../etc/shadow", extensions=QCOW2),
    "control": bent(backing=b"base\x1b[2J", extensions=QCOW2),
    "no-utf8": bent(backing=b"base\xff", extensions=QCOW2),
    "incompatible": bent(features=1 << 40),
    "outside": bent(backing=b"/etc/hostname", extensions=extension(0xE2792ACA, b"raw")),
    "outside-relative": bent(backing=b"../../../../../etc/hostname", extensions=extension(0xE2792ACA, b"raw")),
    "guess": bent(backing=b"base"),
    "vmdk-below": bent(backing=b"base", extensions=extension(0xE2792ACA, b"vmdk")),
    "loop": bent(backing=b"loop", extensions=QCOW2),
    "far-loop": bent(backing=b"far-loop-2", extensions=QCOW2),
    "giant-l1": bent(l1_size=1 << 31),
    "giant-refcounts": bent(refcount_clusters=1 << 31),
    "giant-tags": bent(snapshots=1 << 31, snapshots_offset=CLUSTER),
    "giant-size": bent(size=1 << 63),
    "giant-cluster": bent(cluster_bits=31),
    "endless-extensions": bent(extensions=extension(7, b"") * 2000),
    "aes": bent(crypt=1),
    "cut": bent()[:200],
    "text": b"not an image at all",
}


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a fake QEMU and a fake qemu-img leave a word when they are run."""
    mark = tmp_path / "called"
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\necho "$0 $*" >>"{mark}"\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("QMPSNAP_QEMU", str(tool))
    monkeypatch.setenv("QMPSNAP_QEMU_IMG", str(tool))

    assumed_qemu.assume(monkeypatch)
    return mark


@pytest.fixture
def home(called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    assert not called.exists()
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path / "home"))
    found = Home.from_environment(os.environ, uid=os.geteuid())
    seeded.fill(found)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All of them as files, beside what they name."""
    place = tmp_path / "images"
    place.mkdir()
    for name, data in HOSTILE.items():
        (place / name).write_bytes(data)
    (place / "far-loop-2").write_bytes(image(backing=b"far-loop", extensions=QCOW2))
    (place / "base").write_bytes(image())
    deep = b"base"
    for number in range(257):
        (place / f"deep-{number}").write_bytes(image(backing=deep, extensions=QCOW2))
        deep = f"deep-{number}".encode()
    (place / "raw-that-is-qcow2").write_bytes(image())
    return place


def by_spec(key: str) -> Callable[[Path], list[str]]:
    def words(path: Path) -> list[str]:
        spec = path.parent / "m.yaml"
        declared = "raw" if path.name == "raw-that-is-qcow2" else "qcow2"
        spec.write_text(f"name: m\ndisks: [{{name: vda, {key}: '{path}', format: {declared}}}]\n")
        return ["define", str(spec)]

    return words


def adopting(path: Path) -> list[str]:
    return ["adopt", "m", "--image", f"vda={path}" + (",format=raw" if path.name == "raw-that-is-qcow2" else "")]


def reusing(path: Path) -> list[str]:
    declared = "raw" if path.name == "raw-that-is-qcow2" else "qcow2"
    return ["mirror", "web", "vda", str(path), "--finish", "--reuse", "--format", declared]


VERBS = {"image": by_spec("image"), "base": by_spec("base"), "adopt": adopting, "mirror": reusing}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("verb", VERBS)
def test_no_tool_is_started_on_it(verb: str, folder: Path, called: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*HOSTILE, "deep-256", "raw-that-is-qcow2"):
        before = (folder / name).read_bytes()
        assert main(VERBS[verb](folder / name)) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("qmpsnap: "), name
        assert all(char.isprintable() for char in said.replace("\n", "")), name
        assert (folder / name).read_bytes() == before
    assert not called.exists(), called.read_text()


@pytest.mark.usefixtures("home")
def test_a_place_that_holds_one_is_not_free(folder: Path, called: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in HOSTILE:
        assert main(["snapshot", "create", "web", "--file", f"vda={folder / name}"]) == 4, name
        assert "exists already" in capsys.readouterr().err
    assert not called.exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("verb", ["image", "base", "adopt"])
def test_a_good_image_beside_them_is_taken(
    verb: str, folder: Path, called: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the refusals above are for what the images say."""
    code = main(VERBS[verb](folder / "base"))
    said = capsys.readouterr().err
    assert (code, called.exists()) == (0, False), said
