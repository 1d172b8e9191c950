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
OTHERS = {
    "qemu-img": os.environ.get("QMPSNAP_QEMU_IMG"),
    "qemu-system-x86_64": os.environ.get("QMPSNAP_QEMU"),
    **dict.fromkeys(("mkdir", "mv", "tar")),
}
"""Programs that pages type besides qmpsnap: other managers', and those that move files."""


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
        line, _, file = line.removeprefix("$ ").replace(SHOWN_HOME, str(home)).partition(" > ")
        command, *words = shlex.split(line)
        if command == "export":  # which the fixture of the home undoes
            key, _, value = words[0].partition("=")
            os.environ[key] = value
            return ""
        if command in OTHERS:
            done = subprocess.run([OTHERS[command] or command, *words], check=True, stdout=subprocess.PIPE, text=True)
            return done.stdout.replace(str(home), SHOWN_HOME)
        assert command == "qmpsnap"
        capsys.readouterr()
        code = main(words)
        printed = capsys.readouterr()
        if file:
            Path(file).write_text(printed.out)
            printed = printed._replace(out="")
        end = f"(exit {code})\n" if code else ""
        said = (printed.err + printed.out + end).replace(str(home), SHOWN_HOME)
        # A first column of paths has become narrower than its heading.
        heading = rf"^([A-Z]+ *) {{{len(str(home)) - len(SHOWN_HOME)}}}( +[A-Z].*\n{SHOWN_HOME})"
        return re.sub(heading, r"\1\2", said, flags=re.MULTILINE)

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
    # The newer QEMUs of the tests are told where their firmware lies.
    page = re.sub(r"^#   - -L\n", "", page, flags=re.MULTILINE)
    page = re.sub(r"(?<=process )\d+|(?<=^uuid: )[0-9a-f-]{36}$", "CHANCE", page, flags=re.MULTILINE)
    return steady(page, Path(SHOWN_HOME))


async def _hold_invariants() -> None:
    async with qmpsnap.open() as q:
        for vm in await q.machines():
            await hold_invariants(vm)
