"""The programs in examples/, each run as its first lines say, on a real QEMU."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.model.machines.spec import MachineSpec
from tests.live.booted import start_booted
from tests.live.machine import fill, hold_invariants
from tests.live.test_adopt import Foreign, folder, launched  # noqa: F401

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path for path in EXAMPLES.iterdir() if path.is_file() and path.suffix in {"", ".py"})
STILL = "name: {0}\nmemory: 64M\ndisks: [{{name: vda, size: 1M}}]\n"


def python(name: str, *words: object, code: int = 0) -> str:
    """Run one of the programs; returns what it printed."""
    argv = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def define(home: Path, *names: str) -> None:
    for name in names:
        spec = home / f"{name}.yaml"
        spec.write_text(STILL.format(name))
        assert main(["define", str(spec)]) == 0


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_a_program_is_short_and_uses_the_public_api_alone(program: Path) -> None:
    text = program.read_text()
    assert len(text.splitlines()) <= (180 if program.name == "tour.py" else 66)
    assert f"`{program.name}`" in (EXAMPLES / "README.md").read_text()
    if program.suffix == ".py":
        imported = [found for found in ast.walk(ast.parse(text)) if isinstance(found, ast.Import | ast.ImportFrom)]
        modules = {
            found.module or "" if isinstance(found, ast.ImportFrom) else found.names[0].name for found in imported
        }
        assert {module for module in modules if module.startswith("qmpsnap")} <= {"qmpsnap"}
        assert modules <= {*sys.stdlib_module_names, "collections.abc", "qmpsnap", "pytest", "pytest_asyncio"}


def test_nightly_keeps_the_newest_of_its_own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    define(home, "one", "two")
    assert main(["start", "one", "--paused"]) == 0
    today = tmp_path / "date"
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KEEP", "2")

    def nightly(day: str, *machines: str, code: int = 0) -> None:
        today.write_text(f"#!/bin/sh\necho {day}\n")
        today.chmod(0o700)
        done = subprocess.run([EXAMPLES / "nightly", *machines], check=False, capture_output=True, text=True)
        assert done.returncode == code, done.stderr

    def names(machine: str) -> list[str]:
        listed = [sys.executable, "-m", "qmpsnap", "snapshot", "list", machine, "-o", "name"]
        return subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()

    for day in ("2026-01-01", "2026-01-02"):
        nightly(day)
    assert main(["snapshot", "create", "one", "by-hand"]) == 0
    nightly("2026-01-03")
    nightly("2026-01-03")
    assert names("one") == ["nightly-2026-01-02", "by-hand", "nightly-2026-01-03"]
    assert names("two") == ["nightly-2026-01-02", "nightly-2026-01-03"]
    nightly("2026-01-04", "missing", "two", code=1)
    assert names("two") == ["nightly-2026-01-03", "nightly-2026-01-04"]
    assert names("one")[-1] == "nightly-2026-01-03"


@pytest.mark.parametrize(("command", "code", "left"), [("true", 0, "dirty\n"), ("false", 1, "clean\n")])
async def test_a_command_that_fails_is_undone(
    q: qmpsnap.Controller, guest_spec: MachineSpec, command: str, code: int, left: str
) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.run("echo clean > /run/state")
    said = python("test_and_revert.py", "guest", f"echo dirty > /run/state; echo tried; {command}", code=code)
    assert "tried" in said
    assert ("its changes stay" in said) == (code == 0)
    assert (await vm.run("cat /run/state")).stdout == left
    assert await vm.snapshots() == ()
    await hold_invariants(vm)


def test_the_suite_boots_its_machine_once(home: Path, small_guest: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "test_warm_machine.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    spec = home / "guest.yaml"
    spec.write_text(f"name: guest\nprofile: guest\nkernel: {small_guest}/vmlinux\ninitrd: {small_guest}/initrd\n")
    environment = {**os.environ, "SPEC": str(spec), "TMPDIR": str(home)}
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_warm_machine.py"]
    done = subprocess.run(argv, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "3 passed" in done.stdout, done.stdout
    assert not list(home.glob("warm-*"))


def test_a_running_qemu_is_adopted(home: Path, launched: Callable[[str], Foreign]) -> None:  # noqa: F811
    said = python("adopt_running.py", "theirs", launched("drive").socket)
    assert "took adopted of " in said
    (started,) = re.findall(r"^start \S+ on (.+)$", said, re.MULTILINE)
    assert Path(started).is_relative_to(home / "machines" / "theirs")


async def test_a_copy_shows_its_progress(q: qmpsnap.Controller, still_spec: MachineSpec, tmp_path: Path) -> None:
    vm = await q.define(still_spec)
    await vm.start(paused=True)
    await fill(vm, "vda", 1)
    copy = tmp_path / "copy.qcow2"
    said = python("progress_bar.py", "still", "vda", copy)
    assert "] 100% concluded" in said
    assert f"{copy} has the content of vda" in said
    assert copy.is_file()


@pytest.fixture
def service(home: Path, tmp_path: Path) -> Iterator[Path]:
    """The socket of the service, which ends well at the end."""
    path = home / "service.sock"
    argv = [sys.executable, str(EXAMPLES / "asyncio_service.py"), str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == f"listening on {path}\n"
        yield path
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_the_service_answers_its_clients(home: Path, service: Path) -> None:
    define(home, "one", "two")
    assert main(["start", "one", "--paused"]) == 0
    assert service.stat().st_mode & 0o077 == 0
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_UNIX) as client:
        idle.connect(str(service))
        client.connect(str(service))
        stream = client.makefile("rw")

        def ask(request: object) -> tuple[str | None, str | None]:
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
            return answer["snapshot"], answer["error"] and answer["error"]["code"]

        assert ask({"machine": "one", "snapshot": "s1"}) == ("s1", None)
        assert ask({"machine": "two", "snapshot": "s1"}) == ("s1", None)
        assert ask({"machine": "one", "snapshot": "s1"}) == (None, "name-taken")
        assert ask({"machine": "three", "snapshot": "s1"}) == (None, "not-found")
        assert ask(["no request"]) == (None, "usage")


def test_the_tour_holds_and_leaves_nothing(home: Path, small_guest: Path) -> None:
    (home / "cache").mkdir()
    (home / "cache" / "guest").symlink_to(small_guest)  # where the demo looks for it
    argv = [sys.executable, "-m", "qmpsnap", "demo"]
    environment = {**os.environ, "TMPDIR": str(home)}
    done = subprocess.run(argv, check=False, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok   snapshot") == 5
    assert "ok   the process counts again" in done.stdout
    assert re.search(r"the guest was paused for \d+\.\d ms \((background|stopped)\)", done.stdout)
    assert "(current, you are here)" in done.stdout
    assert not list(home.glob("qmpsnap-demo-*"))


@pytest.mark.version
def test_tests_of_the_suite_find_nothing_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES / "pytest-suite", tmp_path / "suite")
    assert "`pytest-suite`" in (EXAMPLES / "README.md").read_text()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tests = [f"test_dirt.py::test_nobody_sees_it[{kind}-7]" for kind in ("files", "kernel", "daemons", "disk")]
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=tmp_path / "suite")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^guest: forked for each test, 4 times;", done.stdout, re.MULTILINE), done.stdout
    assert not [*tmp_path.glob("qmpsnap-*")]
