"""The pages that show whole terminals, typed on booted guests."""

from pathlib import Path

import pytest

from tests.live.played import hold_page
from tests.volumes import copying

PAGES = ("tutorial/first-machine.md", "how-to/from-libvirt.md", "how-to/from-proxmox-incus.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_what_is_printed(
    page: str, home: Path, small_guest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with copying.everywhere():  # what is printed is alike where blocks have to be copied
        hold_page(page, home, small_guest, capsys)
