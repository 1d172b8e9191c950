"""What a suite can say wrongly, and what is told of its machines: without any QEMU."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qmpsnap.pytest_plugin import reaper
from qmpsnap.pytest_plugin.session import Settings
from qmpsnap.pytest_plugin.told import Told, lines

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("ini", "said"),
    [
        ("qmpsnap_by = magic", "qmpsnap_by is 'magic'; use auto, fork, load, revert, boot"),
        ("qmpsnap_pool = 0", "qmpsnap_pool is '0'; use a whole number from 1 on"),
        ("qmpsnap_boot_timeout = soon", "qmpsnap_boot_timeout is 'soon'; use a whole number from 1 on"),
    ],
)
def test_an_impossible_setting_is_named(pytester: pytest.Pytester, ini: str, said: str) -> None:
    pytester.makefile(".ini", pytest=f"[pytest]\n{ini}\n")
    with pytest.raises(pytest.UsageError, match=re.escape(said)):
        Settings.of(pytester.parseconfig())


def test_an_impossible_marker_is_named_and_so_is_a_spec(pytester: pytest.Pytester, temporary: Path) -> None:
    pytester.makefile(".yaml", still="name: still\nmemory: 64M\nagent: false\n")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.qmpsnap("other.yaml")
        def test_positional(qmpsnap_fresh_sync): ...

        @pytest.mark.qmpsnap(memory="much")
        def test_memory(qmpsnap_fresh_sync): ...

        @pytest.mark.qmpsnap(disks=[{"name": "vdb", "seize": "1M"}])
        def test_disk(qmpsnap_fresh_sync): ...

        @pytest.mark.qmpsnap(spec="none.yaml")
        def test_spec(qmpsnap_fresh_sync): ...

        @pytest.mark.qmpsnap(spec="still.yaml")
        def test_agent(qmpsnap_fresh_sync): ...
        """
    )
    outcome = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers")
    outcome.assert_outcomes(errors=5)
    for said in (
        "marker qmpsnap takes keywords alone: spec, memory, disks",
        "marker qmpsnap: marker:*much*",
        "marker qmpsnap: marker:*seize*",
        "*none.yaml*No such file or directory*",
        "machine still-* has no guest agent, so nobody can tell when it has booted; *",
    ):
        outcome.stdout.fnmatch_lines([f"*{said}"])


def test_what_all_workers_tell_is_one_line_for_each_way() -> None:
    told = [
        Told("web", "fork", "", [0.1, 0.3]),
        Told("web", "fork", "", [0.2]),
        Told("web", "load", "no fork: no room", [1.0]),
        Told("web", "load", "no fork: no room", []),
    ]
    assert list(lines(told)) == [
        "web: forked for each test, 3 times; ready after 0.20 s (p99 0.30 s)",
        "web: loaded into its running QEMU for each test, 1 times; ready after 1.00 s (p99 1.00 s)",
        "    no fork: no room",
    ]


def test_the_reaper_ends_what_works_below_a_folder_and_nothing_else(tmp_path: Path) -> None:
    inside, beside = tmp_path / "inside", tmp_path / "inside-not"
    (inside / "run").mkdir(parents=True)
    beside.mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(sleep, cwd=cwd) for cwd in (inside / "run", beside)]
    owner = subprocess.Popen(["true"])
    owner.wait()
    try:
        subprocess.run([sys.executable, "-I", reaper.__file__, str(owner.pid), inside], check=True, timeout=60)
        assert processes[0].wait(10) == -9
        assert processes[1].poll() is None
        assert list(tmp_path.iterdir()) == [beside]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_reaper_waits_for_the_owner(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as owner:
        watching = subprocess.Popen([sys.executable, "-I", reaper.__file__, str(owner.pid), folder])
        time.sleep(0.2)
        assert watching.poll() is None
        assert folder.exists()
        owner.communicate(b"\n")
        assert watching.wait(60) == 0
    assert not folder.exists()
