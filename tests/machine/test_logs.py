"""Logs that never end: cut to their end at a line's border, while somebody appends to them."""

import os
import stat
from pathlib import Path

import pytest

from qmpsnap.errors import HostCannot
from qmpsnap.machine.starting import logs
from qmpsnap.model.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home.from_environment({"QMPSNAP_HOME": str(tmp_path)}, uid=0)
    logs.prepare(found.log_dir("web"))
    return found


@pytest.fixture
def console(home: Home) -> Path:
    return home.log_dir("web") / "console.log"


def lines(size: int) -> bytes:
    return b"".join(b"line %012d\n" % number for number in range(size // 18 + 1))


def test_the_end_stays_from_a_lines_border_on_and_the_first_line_says_what_was_cut(home: Home, console: Path) -> None:
    said = lines(3 * logs.LIMIT)
    console.write_bytes(said)
    logs.bound(home, "web")
    first, kept = console.read_bytes().split(b"\n", 1)
    assert said.endswith(kept)
    assert kept.startswith(b"line ")
    assert logs.KEPT - 18 <= len(kept) <= logs.KEPT
    assert first == f"[qmpsnap has removed the {len(said) - len(kept)} bytes before this line]".encode()


def test_what_is_not_above_the_limit_stays_as_it_is(home: Home, console: Path) -> None:
    said = lines(logs.LIMIT)[: logs.LIMIT]
    console.write_bytes(said)
    logs.bound(home, "web")
    assert console.read_bytes() == said
    logs.bound(home, "another")  # one without logs


def test_whoever_appends_goes_on_behind_what_was_kept(home: Home, console: Path) -> None:
    writer = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(writer, lines(2 * logs.LIMIT))
    logs.bound(home, "web")
    size = console.stat().st_size
    os.write(writer, b"more\n")
    os.close(writer)
    assert console.stat().st_size == size + 5
    assert console.read_bytes().endswith(b"\nmore\n")
    assert b"\0" not in console.read_bytes()


def test_a_guest_that_sends_no_line_at_all_is_cut_all_the_same(home: Home, console: Path) -> None:
    console.write_bytes(b"x" * 2 * logs.LIMIT)
    logs.bound(home, "web")
    assert console.stat().st_size < logs.KEPT + 100


@pytest.mark.parametrize("way", ["symlink", "hard link", "folder"])
def test_what_is_not_the_log_alone_is_never_cut(home: Home, console: Path, tmp_path: Path, way: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(lines(2 * logs.LIMIT))
    before = victim.read_bytes()
    if way == "symlink":
        console.symlink_to(victim)
    elif way == "hard link":
        console.hardlink_to(victim)
    else:
        console.mkdir()
    logs.bound(home, "web")
    assert victim.read_bytes() == before
    if way != "folder":
        logs.prepare(console.parent)
        assert not console.exists()
        assert victim.read_bytes() == before


def test_the_folder_is_this_users_alone(home: Home, console: Path) -> None:
    assert stat.S_IMODE(console.parent.stat().st_mode) == 0o700
    console.parent.chmod(0o777)
    with pytest.raises(HostCannot, match="not private"):
        logs.prepare(console.parent)


def test_two_commands_do_not_cut_at_once(home: Home, console: Path) -> None:
    import fcntl

    console.write_bytes(lines(2 * logs.LIMIT))
    with console.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        logs.bound(home, "web")
        assert console.stat().st_size > 2 * logs.LIMIT
    logs.bound(home, "web")
    assert console.stat().st_size < logs.LIMIT


def test_logs_are_not_in_the_run_folder_which_is_memory_for_root() -> None:
    home = Home.from_environment({"HOME": "/root"}, uid=0)
    assert str(home.log_dir("web")) == "/var/lib/qmpsnap/logs/web"
    assert str(home.run_dir("web")) == "/run/qmpsnap/web"
