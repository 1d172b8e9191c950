"""A QEMU in a scope of its own: what systemd is asked, and what is said where it does not answer.

There is no systemd where the tests run: a script stands in for busctl, so the call is held to what it is documented to
be, and not to what a systemd makes of it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from qmpsnap.machine.starting import alive, scope
from qmpsnap.machine.starting import process as processes
from qmpsnap.model.machines.record import Process

CALL = """\
busctl --system call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager
StartTransientUnit ssa(sv)a(sa(sv)) qmpsnap-web-4711.scope fail 3 Description s QEMU of qmpsnap's machine web
PIDs au 1 4711 CollectMode s inactive-or-failed 0
"""


@pytest.fixture
def qemu() -> Iterator[Process]:
    with subprocess.Popen(["sleep", "60"]) as child:
        found = processes.existing(child.pid)
        assert found
        yield found
        child.kill()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The places of a systemd that runs; the folder of programs, in which a busctl can be put."""
    for name, where in {"SYSTEMD": "system", "USERS": "user", "LINGERING": "linger"}.items():
        (tmp_path / where).mkdir()
        monkeypatch.setattr(scope, name, tmp_path / where)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs


def busctl(programs: Path, script: str) -> Path:
    said = programs / "said"
    (programs / "busctl").write_text(f'#!/bin/sh\necho "$@" >{said}; env >{said}.env; {script}\n')
    (programs / "busctl").chmod(0o755)
    return said


def test_the_call_is_that_of_systemds_manager() -> None:
    assert " ".join(scope.call("system", "web", 4711)) == CALL.replace("\n", " ").strip()
    assert scope.call("user", "web", 4711)[1] == "--user"


def test_root_asks_the_systems_and_a_user_their_own(systemd: Path) -> None:
    assert scope.manager(0) == "system"
    assert scope.manager(1000) is None  # as for a cron job of somebody who is not logged in
    private = scope.USERS / "1000" / "systemd" / "private"
    private.parent.mkdir(parents=True)
    private.touch()
    assert scope.manager(1000) == "user"
    scope.SYSTEMD.rmdir()
    assert (scope.manager(0), scope.manager(1000)) == (None, None)


async def test_a_qemu_is_moved_and_known_by_its_control_group(
    systemd: Path, qemu: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    groups = iter(["/user.slice/session-1.scope", f"/system.slice/qmpsnap-web-{qemu.pid}.scope"])
    now = ["/user.slice/session-1.scope"]

    def group(_: Process) -> str:
        now[0] = next(groups, now[0])
        return now[0]

    monkeypatch.setattr(scope, "group", group)
    monkeypatch.setattr(scope, "manager", lambda _: "system")
    said = busctl(systemd, "exit 0")
    await scope.enter("web", qemu)
    assert f"PIDs au 1 {qemu.pid}" in said.read_text()
    assert "LD_PRELOAD" not in Path(f"{said}.env").read_text()
    assert scope.warning("web", qemu) == ""


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 60", "exit 0"], ids=["refuses", "hangs", "lies"])
async def test_a_systemd_that_does_not_do_it_is_not_waited_for_and_told(
    systemd: Path, qemu: Process, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(scope, "manager", lambda _: "system")
    monkeypatch.setattr(scope, "DEADLINE", 0.5)
    busctl(systemd, script)
    with anyio.fail_after(20):
        await scope.enter("web", qemu)
    assert alive.is_alive(qemu)
    assert "has no scope of its own" in scope.warning("web", qemu)


async def test_without_systemd_or_busctl_nothing_is_called_and_nothing_said(
    systemd: Path, qemu: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = busctl(systemd, "exit 0")
    scope.SYSTEMD.rmdir()
    await scope.enter("web", qemu)
    assert not said.exists()
    assert scope.warning("web", qemu) == ""
    scope.SYSTEMD.mkdir()
    monkeypatch.setenv("PATH", str(systemd / "none"))
    await scope.enter("web", qemu)
    assert not said.exists()


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("0::/user.slice/a.scope\n", "/user.slice/a.scope"),
        ("9:name=systemd:/system.slice/b.service\n8:pids:/\n0::/\n", "/system.slice/b.service"),
        ("8:pids:/x\n", ""),
    ],
    ids=["unified", "hybrid", "none"],
)
def test_the_group_is_read_from_proc(monkeypatch: pytest.MonkeyPatch, qemu: Process, text: str, group: str) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    assert scope.group(qemu) == group


def test_a_process_that_has_ended_is_in_none() -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    record = Process(pid=int(gone.stdout), start_ticks=1, boot_id="", started=0, accel="", qemu_version="")
    assert scope.group(record) == ""
