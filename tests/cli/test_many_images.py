"""With very many images in a store, ``list`` looks only at those that guests write to, and says so."""

import json
import os
from pathlib import Path

import pytest

from qmpsnap.block.usage import survey
from qmpsnap.cli.main import main
from qmpsnap.model.home import Home
from tests.cli import seeded


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path))
    found = Home.from_environment(os.environ, uid=os.geteuid())
    seeded.fill(found)
    seeded.make_images(found, "web")
    return found


def listed(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], str]:
    assert main(["list", "-o", "json"]) == 0
    told = capsys.readouterr()
    return {machine["name"]: machine["images"] for machine in json.loads(told.out)["machines"]}, told.err


def test_only_active_images_are_looked_at(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listed(capsys)[0] == {"bare": "ok", "lab": "missing", "web": "ok"}
    frozen, active = (home.machine_dir("web") / f"vda-{serial}.qcow2" for serial in (1, 5))
    frozen.rename(frozen.with_suffix(".away"))
    assert listed(capsys)[0]["web"] == "missing"
    monkeypatch.setattr(survey, "MANY", 3)
    images, said = listed(capsys)
    assert images == {"bare": "not asked", "lab": "missing", "web": "not asked"}
    assert "lab: missing: vda-14;" in said
    assert "only active images were checked, as there are more than 3;" in said
    active.rename(active.with_suffix(".away"))
    assert listed(capsys)[0]["web"] == "missing"
