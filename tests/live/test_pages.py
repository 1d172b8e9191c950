"""The pages that show whole terminals, typed from top to bottom."""

from pathlib import Path

import pytest

from tests.live.played import hold_page

PAGES = (
    "tutorial/first-machine.md",
    "how-to/adopt-a-running-qemu.md",
    "how-to/from-libvirt.md",
    "how-to/from-proxmox-incus.md",
    "how-to/move-house.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_what_is_printed(
    page: str, home: Path, small_guest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold_page(page, home, small_guest, capsys)
