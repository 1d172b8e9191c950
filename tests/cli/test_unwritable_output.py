"""Output that cannot be written: no traceback, no operation left open, and what was done is told."""

import io
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from qmpsnap.cli import output, progress
from qmpsnap.errors import HostCannot
from qmpsnap.model.home import Home
from qmpsnap.qmp.commands import JobInfo
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.cli import seeded

PROGRAM = f"{sys.executable} -m qmpsnap"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    found = Home.from_environment({"QMPSNAP_HOME": str(tmp_path_factory.mktemp("home"))}, uid=os.geteuid())
    seeded.fill(found)
    seeded.make_images(found, "web")
    return found


def shell(home: Home, line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What bash makes of a line in which ``$q`` is qmpsnap."""
    told = {**os.environ, **home.environment, "q": PROGRAM, **environment}
    return subprocess.run(["bash", "-c", line], env=told, capture_output=True, check=False)


def names(home: Home, machine: str = "web") -> list[str]:
    with SqliteStore(home.store, machines=home.machines) as store:
        assert not store.operations(machine, only_open=True)
        return [found.name for found in store.snapshots(machine)]


@pytest.mark.parametrize(
    ("line", "told"),
    {
        "full disk": (
            "$q snapshot create web full >/dev/full",
            "snapshot full of vda, vdb taken (stopped); the answer",
        ),
        "full disk, json": ("$q snapshot create web json -o json >/dev/full", "snapshot json of vda, vdb taken"),
        "no reader": ("$q snapshot push web pipe | true; exit ${PIPESTATUS[0]}", None),
        "stdout closed": ("$q snapshot create web out >&-", ""),
        "stderr closed": ("$q snapshot create web err 2>&-", ""),
        "stderr full": ("$q snapshot create web fullerr 2>/dev/full", ""),
        "all closed": ("$q snapshot create web none <&- >&- 2>&-", ""),
        "stdout for reading": ("$q snapshot create web reading 1</dev/null", "Bad file descriptor"),
    }.values(),
)
def test_what_was_done_is_told(home: Home, line: str, told: str | None) -> None:
    done = shell(home, line)
    assert done.returncode == 0
    error = done.stderr.decode()
    assert told is None or (told in error and len(error.splitlines()) == bool(told))
    assert line.split(" web ")[1].split(maxsplit=1)[0] in names(home)


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("$q list >/dev/full", 9, "No space left on device; nothing was changed"),
        ("$q --help >/dev/full", 9, "No space left on device"),
        ("$q --version 2>/dev/full >/dev/full", 9, ""),
        ("$q doctor 1</dev/null", 9, "Bad file descriptor"),
        ("$q tree lab >&-", 0, ""),
        ("$q show nobody 2>/dev/full", 3, ""),
        ("$q show nobody -o json 2>&-", 3, ""),
        # The pipe has no reader before anything is written to it.
        ("{ sleep 0.3; $q snapshot list web; } | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("{ sleep 0.3; $q --help; } | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("ulimit -n 8; $q snapshot create web", 9, "ulimit -n"),
    ],
)
def test_what_only_reads_says_why(home: Home, line: str, code: int, told: str) -> None:
    before = names(home)
    done = shell(home, line)
    assert done.returncode == code, done.stderr.decode()
    assert told in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert names(home) == before


@pytest.mark.parametrize(
    ("environment", "tree"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "`-- base"),
        ({"PYTHONIOENCODING": "latin-1"}, "`-- base"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "`-- base"),
        ({"LC_ALL": "C"}, "└── base"),
        ({"PYTHONIOENCODING": "utf-8"}, "└── base"),
    ],
)
def test_encodings(home: Home, environment: dict[str, str], tree: str) -> None:
    done = shell(home, "$q tree lab && $q snapshot list lab -o json && $q snapshot show lab nö✓", **environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    assert done.returncode == 3, done.stderr
    assert tree in done.stdout.decode(encoding)
    assert b"Traceback" not in done.stderr
    assert "n\\xf6" in (shown := done.stderr.decode(encoding)) or "nö" in shown


def test_a_name_in_utf8_is_one_in_every_locale(home: Home) -> None:
    line = "$q snapshot create web $NAME -m 'größer ✓' && $q snapshot show web $NAME"
    for name, environment in {"c": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "utf8": {}}.items():
        done = shell(home, line, NAME=name, **environment)
        assert done.returncode == 0, done.stderr
    with SqliteStore(home.store, machines=home.machines) as store:
        assert {s.description for s in store.snapshots("web") if s.name in ("c", "utf8")} == {"größer ✓"}


@pytest.mark.parametrize("mode", ["plain", "json", "tty"])
def test_progress_that_nobody_reads_stops_no_job(mode: progress.Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stderr:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress.reporting(Namespace(progress=mode)) as report:
            for status in ("running", "concluded"):
                report(JobInfo(id="qs.1.vda", type="commit", status=status, current_progress=1, total_progress=2))


def test_a_pipe_that_others_made_non_blocking_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    drain = subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE)
    os.close(reader)
    with open(writer, "w") as stdout:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", stdout)
        output.say("x" * (1 << 20))
    assert int(drain.communicate()[0]) == (1 << 20) + 1


def test_streams_in_memory_and_closed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    output.say("kept")
    assert memory.getvalue() == "kept\n"
    with open(os.devnull, "w") as closed:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", closed)
    with pytest.raises(HostCannot, match="Bad file descriptor"):
        output.say("lost")
    monkeypatch.setattr(sys, "stdout", None)
    output.say("nowhere")


LIBRARY = """
import asyncio, os, qmpsnap
async def main():
    os.close(0), os.close(2)
    async with qmpsnap.open() as q:
        await q.machine("web")
        print(os.readlink("/proc/self/fd/0"), os.readlink("/proc/self/fd/2"))
asyncio.run(main())
"""


def test_a_program_with_closed_descriptors_opens_no_image_there(home: Home) -> None:
    done = shell(home, f"{sys.executable} -c '{LIBRARY}'")
    assert done.stdout == b"/dev/null /dev/null\n"
