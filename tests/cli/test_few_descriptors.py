"""A process that has run out of descriptors says so: it tells nothing of files and machines."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from tests.cli import seeded

LOOKS = (["chain", "web"], ["check", "web"], ["check", "web", "--deep"], ["start", "web"], ["check", "web", "--repair"])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path))
    found = Home.from_environment(os.environ, uid=os.geteuid())
    seeded.fill(found)
    seeded.make_images(found, "web")
    for file in found.machine_dir("web").iterdir():
        file.chmod(0o600)
    return found


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_of_headers(home: Home, words: list[str], number: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened = os.open

    def out_of(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith(".qcow2"):
            raise OSError(number, os.strerror(number))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", out_of)
    assert main(words) == 9, capsys.readouterr()
    assert os.strerror(number) in capsys.readouterr().err


def test_whatever_is_left_of_them(home: Home) -> None:
    asked = [{"words": ["chain", "web"], "limits": {"NOFILE": number}} for number in range(4, 40)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.forked"],
        input="\n".join(map(json.dumps, asked)),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    answers = json.loads(done.stdout[done.stdout.rindex("[[") :])
    assert {code for code, _ in answers} <= {0, 9}, answers
    assert answers[-1][0] == 0
