"""launch/ is found alike in a checkout and in an installed wheel, whole and with its rights."""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.cli.command_line import parser
from qmpsnap.machine.config.launch_dir import launch_dir
from tests.harness import wheel

ROOT = Path(__file__).parents[2]
PROFILES = {"guest", "q35-uefi", "microvm", "multi-disk"}
FILES = {
    "README.md",
    "guest/build",
    "guest/init",
    "guest/modules",
    "systemd/qmpsnap@.service",
    *(f"profiles/{name}.yaml" for name in PROFILES),
}
EXECUTABLE = {"guest/build", "guest/init"}

LOOK = """
import json, os, pathlib, sys
import qmpsnap
from qmpsnap.machine.config import specfile
from qmpsnap.machine.config.launch_dir import launch_dir
from tests.harness import wheel

launch = launch_dir()
profiles = launch / "profiles"
print(json.dumps({
    "package": qmpsnap.__file__,
    "files": {
        str(path.relative_to(launch)): os.access(path, os.X_OK) for path in launch.rglob("*") if path.is_file()
    },
    "profiles": {
        path.stem: specfile.read(path, guest_dir=pathlib.Path("/guest"), profile_dir=profiles).machine
        for path in profiles.glob("*.yaml")
    },
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this checkout in it, and nothing else."""
    return wheel.installed(tmp_path_factory.mktemp("installed"))


def look(package: Path, cwd: Path) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        check=True, cwd=cwd, env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    assert str(found.pop("package")).startswith(str(package))
    return found


def test_the_wheel_has_what_the_checkout_has(installed: Path, tmp_path: Path) -> None:
    checkout = look(ROOT, tmp_path)
    assert look(installed, tmp_path) == checkout
    assert set(checkout["files"]) == FILES
    assert {name for name, may_run in checkout["files"].items() if may_run} == EXECUTABLE
    assert set(checkout["profiles"]) == PROFILES


def test_the_wheel_has_the_program_of_the_demo_and_no_other_example(installed: Path) -> None:
    (tour,) = (installed / "qmpsnap" / "_examples").glob("*.*")
    assert tour.read_bytes() == (ROOT / "examples" / "tour.py").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", "from qmpsnap.machine.config import launch_dir; print(launch_dir.tour())"],
        check=True, cwd=installed, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{tour}\n"


def test_the_wheel_has_the_licence(installed: Path) -> None:
    info = installed / f"qmpsnap-{qmpsnap.__version__}.dist-info"
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "\nLicense-Expression: MIT\n" in (info / "METADATA").read_text()


def test_the_wheel_has_no_tests_and_no_docs(installed: Path) -> None:
    assert {path.name for path in installed.iterdir()} == {"bin", "qmpsnap", f"qmpsnap-{qmpsnap.__version__}.dist-info"}
    assert (installed / "qmpsnap" / "py.typed").is_file()


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "QMPSNAP_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "qmpsnap", "list", "-o", "json"],
        check=False, cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, json.loads(done.stdout)) == (7, {"schema": "qmpsnap/1", "machines": []})
    assert "there is no home at" in done.stderr
    assert not (tmp_path / "home").exists()


def test_the_unit_runs_commands_that_there_are() -> None:
    unit = configparser.RawConfigParser(strict=False)  # DeviceAllow= stands there more than once
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(launch_dir() / "systemd" / "qmpsnap@.service")
    service = unit["Service"]
    assert (service["Type"], service["RemainAfterExit"]) == ("oneshot", "yes")
    for key, verb in (("ExecStart", "start"), ("ExecStop", "stop")):
        program, *words = service[key].removeprefix("-").replace("%i", "web").split()
        assert program == "qmpsnap"
        assert words[0] == verb
        assert parser().parse_args(words).machine == "web"
    assert parser().parse_args(service["ExecStop"].split()[1:]).timeout < float(service["TimeoutStopSec"])
