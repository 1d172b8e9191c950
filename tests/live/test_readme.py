"""The README's Python example, run as it stands there on a real guest."""

import re
import subprocess
import sys
from pathlib import Path

from qmpsnap.cli.main import main

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_readme_runs(home: Path, small_guest: Path) -> None:
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache" / "guest").symlink_to(small_guest)
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert example
    assert len([line for line in example[1].splitlines() if line.strip() and "import" not in line]) <= 10
    done = subprocess.run([sys.executable, "-c", example[1]], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "before concluded vda-2\n"
    assert done.stderr == ""
    assert main(["chain", "guest"]) == 0
    with (home / "machines" / "guest" / "vda-1.qcow2").open("rb") as image:
        assert b"precious\n" in image.read()
