"""A fresh booted machine for each test of a user's suite, and what is left of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.plugin.conftest import working_in

pytest_plugins = ["pytester"]

pytestmark = [pytest.mark.live, pytest.mark.version]

STILL = "name: still\nmemory: 64M\nagent: false\nnics: none\ndisks: [{name: vda, size: 1M}]\n"
"""A machine without an operating system: it is there at once."""
SET_UP = "def pytest_qmpsnap_set_up(machine, config):\n"
QUIET = ("-p", "no:cacheprovider")


@pytest.fixture
def still(pytester: pytest.Pytester, temporary: Path) -> None:
    """The suite's machine is one without a guest."""
    pytester.makefile(".yaml", still=STILL)
    pytester.makeconftest(f"{SET_UP}    assert machine.state() == 'running'\n")
    with (pytester.path / "tox.ini").open("a") as ini:
        ini.write("\nqmpsnap_spec = still.yaml\nqmpsnap_pool = 1\n")


def test_each_test_of_all_workers_gets_a_fork_of_one_booted_guest(
    pytester: pytest.Pytester, temporary: Path, tmp_path: Path
) -> None:
    booted = tmp_path / "booted"
    pytester.makeconftest(
        f"{SET_UP}    machine.run('echo hello >/run/set-up')\n    open({str(booted)!r}, 'x').close()\n"
    )
    pytester.makepyfile(
        """
        import pytest

        LOOK = "cat /run/set-up; touch /run/dirt; ls /run/*dirt*; mv /run/dirt /run/old-dirt; hostname"

        @pytest.mark.parametrize("number", range(2))
        def test_sync(qmpsnap_fresh_sync, number):
            found = qmpsnap_fresh_sync.run(LOOK).stdout.split()
            assert found == ["hello", "/run/dirt", qmpsnap_fresh_sync.name]
            assert qmpsnap_fresh_sync.snapshots() == ()

        @pytest.mark.asyncio
        @pytest.mark.parametrize("number", range(2))
        async def test_async(qmpsnap_fresh, qmpsnap_machine, number):
            assert (await qmpsnap_fresh.run(LOOK)).stdout.split() == ["hello", "/run/dirt", qmpsnap_fresh.name]
            await qmpsnap_fresh.snapshot("before")
            assert [found.name for found in await qmpsnap_machine.snapshots()] == ["warm"]

        def test_fails(qmpsnap_fresh_sync):
            qmpsnap_fresh_sync.run("echo evidence >/run/evidence")
            raise RuntimeError("as tests do")
        """
    )
    outcome = pytester.runpytest_subprocess(*QUIET, "-n", "2", "--basetemp", str(tmp_path / "base"))
    outcome.assert_outcomes(passed=4, failed=1)
    outcome.stdout.fnmatch_lines(["guest: forked for each test, 5 times; ready after *"])
    assert booted.exists()
    (folder,) = (tmp_path / "base").glob("*/test_fails0/qmpsnap")
    assert '"cont"' in (folder / "qmp.log").read_text()
    assert {"console.log", "qemu.log", "resume"} < {file.name for file in folder.iterdir()}
    line = re.search(r"^resume it: (.*)$", str(outcome.stdout), re.MULTILINE)
    assert line
    assert line[1] in (folder / "resume").read_text()
    _resume(tmp_path / "h", line[1])


def _resume(home: Path, line: str) -> None:
    """Carry out what the report says, and find the guest as the test has left it."""
    environment = {
        **os.environ,
        "QMPSNAP_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def shell(command: str) -> str:
        return subprocess.run(command, shell=True, check=True, capture_output=True, text=True, env=environment).stdout  # noqa: S602

    shell(line)
    try:
        assert shell("qmpsnap exec test-fails -- cat /run/evidence") == "evidence\n"
    finally:
        shell("qmpsnap stop test-fails --force")


@pytest.mark.usefixtures("still")
def test_a_marker_asks_for_another_machine(pytester: pytest.Pytester, temporary: Path) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.qmpsnap(memory="96M", disks=[{"name": "vdb", "size": "2M"}])
        def test_marked(qmpsnap_fresh_sync):
            spec = qmpsnap_fresh_sync.record().spec
            assert spec.memory == 96 << 20
            assert [disk.name for disk in spec.disks] == ["vda", "vdb"]

        def test_plain(qmpsnap_fresh_sync):
            assert qmpsnap_fresh_sync.record().spec.memory == 64 << 20

        @pytest.mark.qmpsnap(memry="96M")
        def test_wrong(qmpsnap_fresh_sync):
            pass
        """
    )
    outcome = pytester.runpytest_subprocess(*QUIET)
    outcome.assert_outcomes(passed=2, errors=1)
    outcome.stdout.fnmatch_lines(["*marker qmpsnap has no argument 'memry'; did you mean 'memory'?"])


@pytest.mark.grid
@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("way", ["auto", "load", "revert", "boot"])
def test_without_templates_the_machine_itself_is_taken_back_and_that_is_said(
    pytester: pytest.Pytester, temporary: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("QMPSNAP_TEMPLATES", "/proc/nowhere")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("dirt", ["none", "snapshot", "stopped", "none"])
        def test_dirties(qmpsnap_fresh_sync, dirt):
            vm = qmpsnap_fresh_sync
            assert vm.state() == "running"
            assert {found.name for found in vm.snapshots()} <= {"warm"}
            if dirt == "snapshot":
                vm.snapshot("before")
            if dirt == "stopped":
                vm.stop(force=True)
        """
    )
    outcome = pytester.runpytest_subprocess(*QUIET, f"--qmpsnap-by={way}")
    outcome.assert_outcomes(passed=4)
    how = {"revert": "reverted", "boot": "booted"}.get(way, "loaded into its running QEMU")
    outcome.stdout.fnmatch_lines([f"still: {how} for each test, 4 times; *"])
    if way == "auto":
        outcome.stdout.fnmatch_lines(["    no fork: /proc/nowhere*"])


ENDS = {
    "-x": "assert False",
    "Ctrl-C": "raise KeyboardInterrupt",
    "exit": "os._exit(3)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "timeout": "time.sleep(600)",
}


@pytest.mark.grid
@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_however_a_session_ends(
    pytester: pytest.Pytester, reaped: Path, workers: int, end: str
) -> None:
    pytester.makepyfile(
        f"""
        import os
        import signal
        import time

        import pytest

        @pytest.mark.parametrize("number", range(3))
        def test_ends(qmpsnap_fresh_sync, number):
            assert qmpsnap_fresh_sync.state() == "running"
            if number == 1:
                {ENDS[end]}
        """
    )
    options = ["-n", str(workers)] if workers else []
    options += ["-x"] if end == "-x" else []
    options += ["--timeout=20", "--timeout-method=thread"] if end == "timeout" else []
    assert pytester.runpytest_subprocess(*QUIET, *options).ret != 0


@pytest.mark.grid
@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_left_of_a_session_that_is_ended_from_outside(
    pytester: pytest.Pytester, reaped: Path, workers: int, number: signal.Signals
) -> None:
    pytester.makepyfile(
        """
        import time

        def test_waits(qmpsnap_fresh_sync):
            print("waiting")
            time.sleep(600)
        """
    )
    argv = ["env", "--default-signal=INT"]  # which is ignored where a shell has started this in the background
    argv += [sys.executable, "-m", "pytest", *QUIET, *(["-n", str(workers)] if workers else [])]
    session = subprocess.Popen(argv, cwd=pytester.path, stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while not working_in(reaped):
        assert session.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    session.send_signal(number)
    assert session.wait(60) != 0
