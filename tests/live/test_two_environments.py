"""One user's store from a shell, which has XDG_RUNTIME_DIR, and from cron, which has not: one lock, one QEMU."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from qmpsnap.store.runfolder import LINK
from tests.harness.deaths import STORE, Call, stopped_at

# Tests may run as root, whose places no variable moves: a user's are what is asked for here.
AS_USER = """
from qmpsnap.model import places
from tests.harness.deaths import STORE, Call, stopped_at
by_environment = places.from_environment
places.from_environment = lambda environment, *, uid: by_environment(environment, uid=1000)
"""
as_user = partial(exec, AS_USER, {})

SETTLES = Call(STORE, "SqliteStore.settle", "before", 1)
RECORDS = Call(STORE, "SqliteStore.set_process", "before", 1)

SPEC = {"name": "still", "memory": "64 MiB", "agent": False, "disks": [{"name": "vda", "size": "1 MiB"}]}


class Desk:
    """The two environments, with one store; the shell has defined the machine ``still``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.data, self.runtime = folder / "data" / "qmpsnap", folder / "runtime"
        self.runtime.mkdir(mode=0o700)
        monkeypatch.delenv("QMPSNAP_HOME")
        monkeypatch.setenv("XDG_DATA_HOME", str(self.data.parent))
        self.shell()
        (folder / "still.json").write_text(json.dumps(SPEC))
        self.run("define", str(folder / "still.json"))

    def shell(self) -> None:
        self._monkeypatch.setenv("XDG_RUNTIME_DIR", str(self.runtime))

    def cron(self) -> None:
        self._monkeypatch.delenv("XDG_RUNTIME_DIR")

    def run(self, *words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-c", f"{AS_USER}from qmpsnap.cli.main import main; import sys; sys.exit(main())"]
        done = subprocess.run([*argv, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done
        return done

    def state(self) -> str:
        return str(json.loads(self.run("list", "-o", "json").stdout)["machines"][0]["state"])


@pytest.fixture
def desk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(home, monkeypatch)


@pytest.mark.parametrize("state", ["stopped", "running"])
async def test_who_works_in_one_keeps_the_other_away(desk: Desk, state: str) -> None:
    if state == "running":
        desk.run("start", "still", "--paused")
    async with stopped_at(SETTLES, "snapshot", "create", "still", "first", first=as_user) as other:
        desk.cron()
        assert f"'snapshot create' (pid {other.pid} " in desk.run("snapshot", "create", "still", code=4).stderr
    assert other.returncode == 0
    desk.run("snapshot", "create", "still", "second")
    desk.shell()
    desk.run("check", "still")
    assert desk.run("snapshot", "list", "still", "-o", "name").stdout.split() == ["first", "second"]
    if state == "running":
        desk.run("stop", "still", "--force")
    desk.run("undefine", "still", "--remove-disks")
    assert not list((desk.data / "locks").iterdir())


async def test_what_one_has_started_and_not_recorded_runs_for_the_other(desk: Desk) -> None:
    async with stopped_at(RECORDS, "start", "still", "--paused", first=as_user) as starting:
        starting.send_signal(signal.SIGKILL)
    desk.cron()
    assert desk.state() == "running"
    assert "runs already" in desk.run("start", "still", code=4).stderr
    desk.run("snapshot", "create", "still")
    desk.run("check", "still")


def test_where_a_machine_runs_already_is_where_all_look(desk: Desk) -> None:
    """A store of before has no link: whoever comes first may be the one who has started nothing."""
    desk.run("start", "still", "--paused")
    (desk.data / LINK).unlink()
    desk.cron()
    desk.run("snapshot", "create", "still")
    desk.shell()
    desk.run("check", "still")


def test_sockets_that_cannot_be_found_are_no_stopped_machine(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.run("start", "still", "--paused")
    monkeypatch.setenv("QMPSNAP_HOME", str(desk.data))
    refused = desk.run("snapshot", "create", "still", code=5).stderr
    assert f"with its sockets in {desk.runtime}/qmpsnap/still: set QMPSNAP_HOME" in refused
    monkeypatch.delenv("QMPSNAP_HOME")
    shutil.rmtree(desk.runtime)  # as at the end of the last login
    desk.cron()
    assert "end it: qmpsnap stop still --force" in desk.run("snapshot", "create", "still", code=5).stderr
    desk.run("stop", "still", "--force")
    desk.run("start", "still", "--paused")
    desk.runtime.mkdir(mode=0o700)
    desk.shell()
    desk.run("snapshot", "create", "still")
    assert (desk.data / LINK).readlink() == desk.data / "run"
