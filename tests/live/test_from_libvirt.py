"""docs/how-to/from-libvirt.md, typed from top to bottom on a booted guest: what the page shows is what is printed.

``QMPSNAP_GOLDEN=write`` writes the outputs into the page, and fails: a run that writes is no test.
"""

import contextlib
import os
import re
import shlex
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from tests.live.machine import hold_invariants
from tests.live.printed import steady

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "from-libvirt.md"
SHOWN_HOME = "/srv/qs"
"""How the page calls the home, which is another folder at every run."""
BLOCK = re.compile(r"<!-- (?P<file>\S+) -->\n```yaml\n(?P<yaml>.*?)```|```console\n(?P<console>.*?)```", re.DOTALL)


def test_the_page_shows_what_is_printed(home: Path, small_guest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "cache").mkdir()
    (home / "cache" / "guest").symlink_to(small_guest)

    def play(block: re.Match[str]) -> str:
        if block["file"]:
            (home / block["file"]).write_text(block["yaml"])
            return block[0]
        lines = [line for line in block["console"].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{line}\n{typed(line)}" for line in lines) + "```"

    def typed(line: str) -> str:
        command, *words = shlex.split(line.removeprefix("$ ").replace(SHOWN_HOME, str(home)))
        assert command == "qmpsnap"
        capsys.readouterr()
        code = main(words)
        printed = capsys.readouterr()
        end = f"(exit {code})\n" if code else ""
        return (printed.err + printed.out + end).replace(str(home), SHOWN_HOME)

    page = PAGE.read_text()
    with contextlib.chdir(home):
        played = BLOCK.sub(play, page)
    anyio.run(_hold_invariants)
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        PAGE.write_text(played)
        pytest.fail(f"wrote {PAGE}: read the difference, then run without QMPSNAP_GOLDEN")
    assert _comparable(page) == _comparable(played)


def _comparable(page: str) -> str:
    # How often a job is reported while it runs is chance; its line of the end is what counts.
    page = re.sub(r"^qs\.\d+\.\w+ [\w-]+: (?!concluded).*\n", "", page, flags=re.MULTILINE)
    return steady(page, Path(SHOWN_HOME))


async def _hold_invariants() -> None:
    async with qmpsnap.open() as q:
        for vm in await q.machines():
            await hold_invariants(vm)
