"""A word that is none, and looks like one: which one was meant."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from tests.cli import seeded


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    seeded.fill(Home.from_environment({"QMPSNAP_HOME": str(folder)}, uid=os.geteuid()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMPSNAP_HOME", str(folder))
        yield folder


MEANT = {
    "shwo web": "did you mean 'show'?",
    "snapshot crate web": "did you mean 'create'?",
    "import libvrit x": "did you mean 'libvirt'?",
    "show wbe": "there is no machine 'wbe'; did you mean 'web'?",
    "snapshot show web after-upgarde": "has no snapshot 'after-upgarde'; did you mean 'after-upgrade'?",
    "stream web vda --base fersh": "has no layer or snapshot 'fersh'; did you mean 'fresh'?",
    "chain web vdaa": "machine web has no disk 'vdaa'; did you mean 'vda'?",
}


@pytest.mark.parametrize("line", MEANT)
def test_a_slip_is_told(line: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) in (2, 3)
    assert MEANT[line] in capsys.readouterr().err


def test_nothing_is_meant_by_what_looks_like_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "qqqqqq"]) == 3
    assert "did you mean" not in capsys.readouterr().err
