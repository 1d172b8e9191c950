"""The image that cloud-init reads; bsdtar, isoinfo and blkid have read one of these bytes, too."""

import subprocess
from pathlib import Path

import pytest

from qmpsnap.machine.starting.iso9660 import SECTOR, image
from tests.machine import iso9660

FILES = {
    "user-data": b"#cloud-config\n" * 400,
    "meta-data": b"instance-id: a\n",
    "network-config": b"",
    "x": bytes(SECTOR),
}


def test_the_names_and_bytes_are_there_twice() -> None:
    made = image(FILES, label="cidata")
    assert iso9660.files(made) == FILES
    assert iso9660.files(made, joliet=True) == FILES
    assert (iso9660.label(made), len(made) % SECTOR) == ("cidata", 0)
    assert int.from_bytes(made[16 * SECTOR + 80 :][:4], "little") * SECTOR == len(made)


def test_another_program_knows_the_label(tmp_path: Path) -> None:
    (tmp_path / "seed.iso").write_bytes(image(FILES, label="cidata"))
    said = subprocess.check_output(["/sbin/blkid", "-p", "-o", "export", tmp_path / "seed.iso"], text=True)
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(said.split())


@pytest.mark.parametrize("files", [{"a" * 30: b""}, {f"file-{number}": b"" for number in range(30)}])
def test_what_does_not_fit_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"longer than 29 characters|more than a sector"):
        image(files, label="cidata")
