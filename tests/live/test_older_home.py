"""A home of an earlier release: a copy of it opens, its store migrates, and every verb says what it said there."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from qmpsnap.cli.main import main
from tests.live.older_home.said import comparable, differences, said

KEPT = Path(__file__).parent / "older_home"
"""Its ``build`` says how the home was made and which verbs were asked."""

HOST = "elsewhere"


@pytest.fixture
def older(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the home, on the host it was made on."""
    subprocess.run(["tar", "-xJf", KEPT / "home.tar.xz", "-C", home], check=True)  # with its modes
    machine = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((machine[0], HOST, *machine[2:])))
    monkeypatch.setenv("QMPSNAP_HOME", str(home / "home"))
    return home / "home"


def test_a_home_of_an_earlier_release_goes_on(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(words: list[str]) -> tuple[int, str]:
        code = main(words)
        return code, capsys.readouterr().out

    # Its files are copies of those that were recorded, at another path.
    assert run(["relocate", "--accept-copies"])[0] == 0
    before, now = json.loads((KEPT / "said.json").read_text()), said(run, str(older))
    assert "\n".join(differences(comparable(before), comparable(now))) == ""
    for words in (
        "snapshot create two next",
        "snapshot delete two s5 grown",
        "snapshot revert uefi inside",
        "snapshot create clone first",
        "check --deep",
    ):
        assert run(words.split())[0] == 0, words
