"""A page of the docs, typed from top to bottom on booted guests: what the page shows is what is printed.

``QMPSNAP_GOLDEN=write`` writes the outputs into the page, and fails: a run that writes is no test.
"""

import contextlib
import difflib
import os
import re
import shlex
import subprocess
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from tests.live.machine import hold_invariants
from tests.live.printed import steady

DOCS = Path(__file__).parents[2] / "docs"
SHOWN_HOME = "/srv/qs"
"""How a page calls the home, which is another folder at every run."""
BLOCK = re.compile(
    r"<!-- (?P<file>\S+) -->\n```(?:yaml|xml|ini)\n(?P<content>.*?)```|```console\n(?P<console>.*?)```", re.DOTALL
)
QEMU_IMG = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"


def hold_page(name: str, home: Path, small_guest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Type every command of ``docs/NAME`` in ``home`` and compare what is printed with what the page shows."""
    path = DOCS / name
    (home / "cache").mkdir()
    (home / "cache" / "guest").symlink_to(small_guest)

    def play(block: re.Match[str]) -> str:
        if block["file"]:
            (home / block["file"]).write_text(block["content"].replace(SHOWN_HOME, str(home)))
            return block[0]
        lines = [line for line in block["console"].splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{line}\n{typed(line)}" for line in lines) + "```"

    def typed(line: str) -> str:
        command, *words = shlex.split(line.removeprefix("$ ").replace(SHOWN_HOME, str(home)))
        if command in ("mkdir", "qemu-img"):  # of another manager's doing
            program = QEMU_IMG if command == "qemu-img" else command
            done = subprocess.run([program, *words], check=True, capture_output=True, text=True)
            return done.stdout.replace(str(home), SHOWN_HOME)
        assert command == "qmpsnap"
        capsys.readouterr()
        code = main(words)
        printed = capsys.readouterr()
        end = f"(exit {code})\n" if code else ""
        return (printed.err + printed.out + end).replace(str(home), SHOWN_HOME)

    page = path.read_text()
    with contextlib.chdir(home):
        played = BLOCK.sub(play, page)
    anyio.run(_hold_invariants)
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        path.write_text(played)
        pytest.fail(f"wrote {path}: read the difference, then run without QMPSNAP_GOLDEN")
    shown, printed = _comparable(page), _comparable(played)
    if shown != printed:
        pytest.fail("\n".join(difflib.unified_diff(shown.splitlines(), printed.splitlines(), "shown", "printed", n=1)))


def _comparable(page: str) -> str:
    # How often a job is reported while it runs is chance; its line of the end is what counts.
    page = re.sub(r"^qs\.\d+\.\w+ [\w-]+: (?!concluded).*\n", "", page, flags=re.MULTILINE)
    return steady(page, Path(SHOWN_HOME))


async def _hold_invariants() -> None:
    async with qmpsnap.open() as q:
        for vm in await q.machines():
            await hold_invariants(vm)
