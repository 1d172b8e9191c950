"""A home that another user can write to: who refuses it, what `check` says of it, and what is no reason to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpsnap.errors import HomeUntrusted
from qmpsnap.host import acl
from qmpsnap.store import owner
from qmpsnap.store.sqlite.backend import SqliteStore

NOBODY = 65534
PARTS = ("", "qmpsnap.db", "machines", "records", "locks", "run")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)  # of pytest's own folders the one above is root's alone
    place = tmp_path / "home"
    for folder in ("", "machines", "records", "locks", "run"):
        (place / folder).mkdir(mode=0o700)
    SqliteStore(place / "qmpsnap.db", machines=place / "machines").close()
    return place


def require(home: Path) -> None:
    SqliteStore(home / "qmpsnap.db", machines=home / "machines", make=False).close()
    owner.require(home / "run")


def _name_nobody(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        acl.grant(descriptor, NOBODY, acl.READ | acl.WRITE)
    finally:
        os.close(descriptor)


def _give_daemon(path: Path) -> None:
    os.chown(path, -1, 1)
    path.chmod(0o770)


WAYS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "another's": (lambda path: os.chown(path, NOBODY, -1), "belongs to user nobody, with mode 0", "chown root "),
    "everybody's": (
        lambda path: path.chmod(0o777),
        "user root and with mode 0777, is writable by every",
        "chmod ",
    ),
    "a group's": (_give_daemon, "writable by group daemon", "chmod g-w"),
    "named": (_name_nobody, "is writable by user nobody", "setfacl -b "),
}


@AS_ROOT
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_root_refuses_what_another_user_can_write_to(home: Path, part: str, way: str) -> None:
    require(home)
    change, said, remedy = WAYS[way]
    change(home / part)
    with pytest.raises(HomeUntrusted, match=said) as refused:
        require(home)
    assert str(home / part).rstrip("/") in refused.value.message
    assert refused.value.hint.startswith(remedy)
    assert str(home / part).rstrip("/") in refused.value.hint
    assert refused.value.effect == "none"


@AS_ROOT
@pytest.mark.parametrize("way", ["another's", "everybody's"])
def test_root_refuses_a_home_in_a_folder_whose_owner_could_put_another_there(home: Path, way: str) -> None:
    WAYS[way][0](home.parent)
    with pytest.raises(HomeUntrusted, match=str(home.parent)):
        require(home)


@AS_ROOT
def test_root_refuses_a_link_of_another_user_that_leads_to_its_own_home(home: Path) -> None:
    link = home.parent / "link"
    link.symlink_to(home)
    require(link)
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    with pytest.raises(HomeUntrusted, match=f"{link} belongs to user nobody"):
        require(link)


@AS_ROOT
def test_root_looks_at_where_the_machines_folder_leads(home: Path) -> None:
    place = home.parent / "images"
    place.mkdir(mode=0o700)
    (home / "machines").rmdir()
    (home / "machines").symlink_to(place)
    require(home)
    place.chmod(0o777)
    with pytest.raises(HomeUntrusted, match=str(place)), SqliteStore(home / "qmpsnap.db", machines=home / "machines"):
        pass
    require(home)  # what only reads follows no link to where storage may hang


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711, 0o700])
def test_who_may_only_look_is_no_reason(home: Path, mode: int) -> None:
    for part in PARTS:
        (home / part).chmod(mode)
    require(home)


def test_a_sticky_folder_of_everybodys_may_hold_a_home(home: Path) -> None:
    home.parent.chmod(0o1777)
    require(home)


def test_a_group_that_has_nobody_else_is_its_users_own(home: Path) -> None:
    for part in PARTS:
        (home / part).chmod(0o770)
    private = [line.split(":") for line in Path("/etc/group").read_text().splitlines()]
    if any(entry[2] == str(os.getegid()) and not entry[3] for entry in private):
        require(home)


@AS_ROOT
def test_another_user_refuses_a_third_ones_home_and_not_an_open_one_of_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    for part in PARTS:
        (home / part).chmod(0o777)
    owner.require(home, home / "machines")  # of root's, who could do all that anyway; that it is open, check says
    assert home / "records" in {Path(flaw.path) for flaw in owner.flaws(home, home / "machines")}
    os.chown(home.parent, NOBODY, -1)
    for part in PARTS:
        os.chown(home / part, NOBODY, -1)
    owner.require(home, home / "machines")
    assert home / "records" in {Path(flaw.path) for flaw in owner.flaws(home, home / "machines")}
    os.chown(home / "records", 1, -1)
    with pytest.raises(HomeUntrusted, match=r"this user does not use .* belongs to user daemon"):
        owner.require(home, home / "machines")


@AS_ROOT
def test_every_command_refuses_it_and_check_tells_each_flaw(home: Path) -> None:
    environment = {**os.environ, "QMPSNAP_HOME": str(home)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qmpsnap", *words]
        return subprocess.run(command, text=True, capture_output=True, env=environment, check=False)

    (home / "records").chmod(0o777)
    os.chown(home / "machines", NOBODY, -1)
    for words in (["list"], ["show", "web"], ["start", "web"], ["check", "web", "--repair"], ["check", "--rebuild"]):
        done = run(*words)
        assert (done.returncode, "does not use" in done.stderr) == (9, True), (words, done.stderr)
    assert run("doctor").returncode == 9
    done = run("check", "web", "-o", "json")
    assert done.returncode == 7
    (found,) = json.loads(done.stdout)["machines"]
    assert {(one["code"], one["file"]) for one in found["findings"]} == {
        ("home-open", str(home / "records")),
        ("home-open", str(home / "machines")),
    }
