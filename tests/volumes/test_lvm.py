"""Snapshots by the logical volume manager: in a guest, as few hosts have a volume group to spare."""

import os
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.selection import GRID_AT, PART
from tests.volumes import guest

WHOLE = not (GRID_AT or PART)
"""Everything runs: the counter alone takes a quarter of an hour, as its guest is emulated within an emulated one."""
SCRIPT = """\
cd /tmp/work
exec python3 -m pytest -q --color=no -p no:cacheprovider --timeout {timeout} --junitxml=out/report.xml inside/{cases}
"""


@pytest.mark.live
@pytest.mark.timeout(guest.DEADLINE + 900)  # the image may have to be built first
@pytest.mark.parametrize(
    "cases",
    [
        "lvm_cases.py",
        pytest.param("machine_cases.py", marks=pytest.mark.grid),
        *(["counter_cases.py"] if WHOLE else []),
    ],
)
def test_cases_in_the_guest(tmp_path: Path, cases: str) -> None:
    if not shutil.which("mmdebstrap") or not shutil.which("mkfs.xfs") or os.geteuid() != 0:
        message = "the guest is built by root, with mmdebstrap and mkfs.xfs"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    out = guest.run(SCRIPT.format(cases=cases, timeout=1700 if cases == "counter_cases.py" else 600), tmp_path)
    console = (tmp_path / "console").read_text(errors="replace")
    assert (out / "report.xml").is_file(), console
    ran = ET.parse(out / "report.xml").findall(".//testcase")  # noqa: S314 - it is our own
    failed = [case.get("name") for case in ran if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in ran if case.find("skipped") is not None]
    assert ran
    assert (failed, skipped) == ([], []), console
