"""The fixtures for users' own suites, tested from outside: each test here runs a pytest of its own."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SLOW = ("qemu", "psutil", "yaml", "rich", "sqlite3", "qmpsnap.api.controller")


def test_it_is_registered() -> None:
    found = [entry.value for entry in entry_points(group="pytest11") if entry.value.startswith("qmpsnap")]
    assert found == ["qmpsnap.pytest_plugin"], "reinstall qmpsnap: pip install -e ."


def test_it_loads_nothing_slow() -> None:
    program = (
        "import sys; before = set(sys.modules); import pytest_asyncio; import qmpsnap.pytest_plugin;"
        f"print([name for name in {SLOW!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.live
def test_a_guest_for_a_strict_mode_suite(pytester: pytest.Pytester, temporary: Path) -> None:
    _need_qemu()
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.asyncio
        async def test_guest(qmpsnap_controller, qmpsnap_small_guest):
            vm = qmpsnap_small_guest
            assert (await vm.run("uname -s")).stdout == "Linux\\n"
            await vm.snapshot("before")
            assert [found.name for found in await vm.snapshots()] == ["before"]
            assert [found.name for found in await qmpsnap_controller.machines()] == ["guest"]
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


@pytest.mark.live
def test_the_example_of_the_how_to_page_passes(pytester: pytest.Pytester, temporary: Path) -> None:
    _need_qemu()
    page = Path(__file__).parents[2] / "docs" / "how-to" / "pytest.md"
    example = re.search(r"<!-- run by .* -->\n```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert example
    pytester.makepyfile(example[1])
    with tempfile.TemporaryDirectory(prefix="qs-", dir="/tmp") as short:  # a socket's path has 107 bytes at most
        pytester.runpytest_subprocess("-p", "no:cacheprovider", f"--basetemp={short}/t").assert_outcomes(passed=1)


@pytest.mark.live
def test_a_failing_test_leaves_nothing(pytester: pytest.Pytester, temporary: Path) -> None:
    _need_qemu()
    pytester.makepyfile(
        """
        import os
        import signal

        import pytest
        from qmpsnap import MachineSpec

        @pytest.mark.asyncio
        @pytest.mark.parametrize("stopped", [False, True])
        async def test_fails(qmpsnap_controller, stopped):
            vm = await qmpsnap_controller.define(MachineSpec(name="m", memory=64 << 20))
            process = await vm.start(paused=True)
            if stopped:
                os.kill(process.pid, signal.SIGKILL)
            raise RuntimeError("as tests do")

        @pytest.mark.asyncio
        async def test_starts_empty(qmpsnap_controller):
            assert await qmpsnap_controller.machines() == ()
        """
    )
    outcome = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    outcome.assert_outcomes(failed=2, passed=1)
    outcome.stdout.fnmatch_lines(["*RuntimeError: as tests do*"])


@pytest.mark.parametrize(
    "case", [("QMPSNAP_QEMU", "", "skipped"), ("QMPSNAP_QEMU_IMG", "true", "errors")], ids=lambda case: case[2]
)
def test_a_missing_qemu_is_a_skip_and_in_ci_a_failure(
    pytester: pytest.Pytester, temporary: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str]
) -> None:
    variable, ci, outcome = case
    monkeypatch.setenv("QMPSNAP_QEMU", sys.executable)
    monkeypatch.setenv("QMPSNAP_QEMU_IMG", sys.executable)
    monkeypatch.setenv(variable, "/nonexistent/qemu")
    monkeypatch.setenv("CI", ci)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.asyncio
        async def test_controller(qmpsnap_controller):
            raise AssertionError("never reached")
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines(["*/nonexistent/qemu is missing: install it, or name it in " + variable + "*"])


def _need_qemu() -> None:
    needed = os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64"
    if os.environ.get("CI") != "true" and shutil.which(needed) is None:
        pytest.skip(f"{needed} is missing")
