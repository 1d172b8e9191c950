"""Words that nobody types on purpose: each is a clean error with an exit code of its family, and changes nothing."""

import math
import os
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import QmpsnapError, UsageError
from qmpsnap.model.home import Home
from tests.cli import seeded

LONG = "n" * 5000
WORD = "x" * (128 << 10)
"""As long as the kernel lets one word be."""

WORDS: dict[str, tuple[int, list[str]]] = {
    "machine-newline": (3, ["show", "a\nb"]),
    "machine-long": (3, ["show", WORD]),
    "machine-path": (3, ["show", "../web"]),
    "machine-empty": (3, ["recover", ""]),
    "machine-nul": (2, ["show", "a\0b"]),
    "name-newline": (2, ["snapshot", "create", "web", "x\n"]),
    "name-long": (2, ["snapshot", "create", "web", WORD]),
    "message-long": (2, ["snapshot", "create", "web", "x", "-m", WORD]),
    "message-bytes": (2, ["snapshot", "create", "web", "x", "-m", "\udcff"]),
    "internal-message-long": (2, ["snapshot", "create", "web", "--kind", "internal", "--no-memory", "-m", WORD]),
    "disks-twice": (2, ["snapshot", "create", "web", "--disks", "vda,vda"]),
    "disks-none": (4, ["snapshot", "create", "web", "--disks", ","]),
    "disks-control": (3, ["snapshot", "create", "web", "--disks", "vda\x1b"]),
    "file-empty": (2, ["snapshot", "create", "web", "--file", "vda="]),
    "file-nothing": (2, ["snapshot", "create", "web", "--file", ""]),
    "file-twice": (2, ["snapshot", "create", "web", "--file", "vda=/tmp/a", "--file", "vda=/tmp/b"]),
    "file-shared": (2, ["snapshot", "create", "web", "--file", "vda=/tmp/a", "--file", "vdb=/tmp/a"]),
    "file-long": (2, ["snapshot", "create", "web", "--file", f"vda=/tmp/{LONG}"]),
    "file-control": (2, ["snapshot", "create", "web", "--file", "vda=/tmp/\x1b[31m"]),
    "file-nul": (2, ["snapshot", "create", "web", "--file", "vda=/tmp/a\0b"]),
    "file-folder": (2, ["snapshot", "create", "web", "--file", "vda=/tmp/../tmp/a"]),
    "pause-nan": (2, ["snapshot", "create", "web", "--kind", "full", "--max-pause", "nan"]),
    "pause-inf": (2, ["snapshot", "create", "web", "--kind", "full", "--max-pause", "inf"]),
    "pause-negative": (2, ["snapshot", "create", "web", "--kind", "full", "--max-pause", "-1"]),
    "pause-huge": (2, ["snapshot", "create", "web", "--kind", "full", "--max-pause", "1e400"]),
    "timeout-nan": (2, ["stop", "web", "--timeout", "nan"]),
    "timeout-negative": (2, ["stop", "web", "--timeout", "-1"]),
    "timeout-digits": (2, ["stop", "web", "--timeout", "9" * 5000]),
    "exec-timeout": (2, ["exec", "--timeout", "inf", "web", "--", "true"]),
    "exec-option-behind": (2, ["exec", "web", "--timeout", "5", "--", "true"]),
    "exec-variable": (2, ["exec", "--env", "=x", "web", "--", "true"]),
    "exec-name": (2, ["exec", "--env", "A B=x", "web", "--", "true"]),
    "exec-folder": (2, ["exec", "--cwd", "tmp", "web", "--", "true"]),
    "exec-nothing": (2, ["exec", "web", "--"]),
    "revert-newline": (3, ["snapshot", "revert", "web", "fresh\n"]),
    "delete-empty": (3, ["snapshot", "delete", "web", ""]),
    "rename-control": (2, ["snapshot", "rename", "web", "fresh", "\x1b[31m"]),
    "base-number": (3, ["commit", "web", "vda", "--base", "9" * 30]),
    "base-control": (3, ["stream", "web", "vda", "--base", "\x9b31m"]),
    "target-long": (2, ["mirror", "web", "vda", f"/tmp/{LONG}", "--finish"]),
    "target-control": (2, ["mirror", "web", "vda", "/tmp/\x1b[31m", "--finish"]),
    "target-folder": (2, ["mirror", "web", "vda", "/tmp/", "--finish"]),
    "target-device": (2, ["mirror", "web", "vda", "/dev/zero", "--finish", "--reuse"]),
    "target-uri": (2, ["mirror", "web", "vda", "nbd://h:99999999/x", "--finish"]),
    "restore-long": (9, ["restore", "web", f"/tmp/{LONG}"]),
    "restore-device": (7, ["restore", "web", "/dev/zero"]),
    "define-long": (2, ["define", f"/tmp/{LONG}"]),
    "define-device": (2, ["define", "/dev/zero"]),
    "define-empty": (2, ["define", ""]),
    "adopt-newline": (2, ["adopt", "x\n", "--qmp", "/tmp/x"]),
    "adopt-long": (5, ["adopt", "x", "--qmp", f"/tmp/{LONG}"]),
    "adopt-image": (2, ["adopt", "x", "--image", "vda="]),
    "chain-nul": (2, ["chain", "web", "vd\0a"]),
    "job-newline": (3, ["job", "wait", "web\n"]),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("QMPSNAP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QMPSNAP_QEMU", "/nonexistent/qemu")
    monkeypatch.setenv("QMPSNAP_QEMU_IMG", "/nonexistent/qemu-img")
    found = Home.from_environment(os.environ, uid=os.geteuid())
    seeded.fill(found)
    return found


def images(home: Home) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in home.machines.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", WORDS)
def test_the_word_is_refused(case: str, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    expected, words = WORDS[case]
    before = images(home)
    assert main(words) == expected
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err) < 10_000
    assert all(char.isprintable() for char in printed.err.replace("\n", ""))
    assert "Traceback" not in printed.err
    assert images(home) == before


@pytest.mark.usefixtures("home")
async def test_the_library_refuses_what_the_command_line_does() -> None:
    """What no command line can say at all: a description of 10 MB, NUL in a path, times that are no numbers."""
    async with qmpsnap.open() as q:
        vm = await q.machine("web")
        for description in ("x" * (10 << 20), "\udcff"):
            with pytest.raises(UsageError, match="description"):
                await vm.snapshot("x", description=description)
        for seconds in (math.nan, math.inf, -1.0):
            with pytest.raises(UsageError, match="cannot be"), anyio.fail_after(5):
                await vm.stop(timeout=seconds)
            with pytest.raises(UsageError, match="cannot be"), anyio.fail_after(5):
                await vm.run("true", timeout=seconds)
            with pytest.raises(UsageError, match="cannot be"):
                await vm.snapshot("x", kind="full", max_pause_ms=seconds)
        for act in (
            lambda: vm.mirror("vda", "/tmp/a\0b", mode="finish"),
            lambda: vm.snapshot("x", files={"vda": "/tmp/a\0b"}),
            lambda: vm.restore("/tmp/a\0b"),
        ):
            with pytest.raises(QmpsnapError) as failure:
                await act()
            assert failure.value.exit_code in range(2, 10)
            assert failure.value.effect == "none"
