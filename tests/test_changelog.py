"""CHANGELOG.md is what scripts/changelog makes of the fragments."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEW = "Bugfix: Fix it\n\nIt was broken. It works now.\n"


def changelog(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(root / "scripts" / "changelog"), *words]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The part of the checkout that the script works on."""
    shutil.copytree(ROOT / "docs" / "changelog.d", tmp_path / "docs" / "changelog.d")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    return tmp_path


def test_it_is_current() -> None:
    done = changelog(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_a_new_fragment_goes_into_it(copy: Path) -> None:
    (copy / "docs" / "changelog.d" / "99-new.md").write_text(NEW)
    assert changelog(copy, "--check").returncode == 1
    assert changelog(copy).returncode == 0
    assert changelog(copy, "--check").returncode == 0
    assert "### Bugfixes\n\n- **Fix it.**\n  It was broken. It works now.\n- **" in (copy / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "It was broken. It works now.\n",
        NEW.replace("Bugfix", "Fix"),
        NEW.replace("Fix it", "fix it"),
        NEW.replace("Fix it", "Fix it."),
        "Bugfix: Fix it\n",
        NEW.replace("\n\n", "\n"),
    ],
)
def test_a_fragment_of_another_form_is_named(copy: Path, text: str) -> None:
    (copy / "docs" / "changelog.d" / "99-new.md").write_text(text)
    done = changelog(copy)
    assert (done.returncode, "docs/changelog.d/99-new.md is not a fragment" in done.stderr) == (1, True)
