"""One controller at a time: who holds the lock is told, and it ends with its holder, however that ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpsnap.errors import HostCannot, LockHeld
from qmpsnap.host import files
from qmpsnap.store.lock import machine_lock

HOLDER = """
import sys
from pathlib import Path
from qmpsnap.store.lock import machine_lock
with machine_lock(Path(sys.argv[1]), machine="web", verb="snapshot create"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the lock until its input ends."""
    argv = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_a_second_holder_in_this_process_is_refused_and_told_of_the_first(path: Path) -> None:
    before = int(time.time())
    with machine_lock(path, machine="web", verb="snapshot create"):
        with pytest.raises(LockHeld) as caught, machine_lock(path, machine="web", verb="stop"):
            pytest.fail("two hold the lock")
        since = json.loads(path.read_text())["since"]
    assert before <= since <= time.time()
    assert (caught.value.exit_code, caught.value.effect, caught.value.machine) == (4, "none", "web")
    assert caught.value.message == (
        f"machine web is in use by 'snapshot create' (pid {os.getpid()} on {os.uname().nodename})"
        f" since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(since))}"
    )


def test_it_is_free_after_the_block_also_after_an_error(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), machine_lock(path, machine="web", verb="stop"):
        raise ZeroDivisionError
    with machine_lock(path, machine="web", verb="start"):
        assert json.loads(path.read_text())["verb"] == "start"


def test_the_file_is_the_users_alone_and_stays(path: Path) -> None:
    with machine_lock(path, machine="web", verb="stop"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert path.exists()


def test_a_holder_in_another_process_is_named_and_its_kill_frees_the_lock(path: Path) -> None:
    with holder(path) as process:
        with pytest.raises(LockHeld, match=rf"'snapshot create' \(pid {process.pid} on "), _locked(path):
            pytest.fail("two hold the lock")
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        with _locked(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_program_that_the_holder_starts_does_not_keep_the_lock(path: Path) -> None:
    with machine_lock(path, machine="web", verb="start"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with _locked(path):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait(20)


def test_who_locked_a_file_that_undefine_has_removed_meanwhile_tries_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    real = files.leads_to

    def undefine_between_lock_and_look(found: files.Name, descriptor: int, *, folder: int | None = None) -> bool:
        if not looked:
            path.unlink()
        looked.append(real(found, descriptor, folder=folder))
        return looked[-1]

    monkeypatch.setattr(files, "leads_to", undefine_between_lock_and_look)
    with _locked(path):
        assert looked == [False, True]
        with pytest.raises(LockHeld), _locked(path):
            pytest.fail("two hold the lock")


def test_who_locked_a_file_in_whose_place_another_stands_does_not_have_the_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but a third controller was quicker: its file is the lock now."""
    real = files.leads_to

    with holder(path.with_name("third")):

        def replace_it(found: files.Name, descriptor: int, *, folder: int | None = None) -> bool:
            monkeypatch.setattr(files, "leads_to", real)
            path.with_name("third").replace(path)
            return real(found, descriptor, folder=folder)

        monkeypatch.setattr(files, "leads_to", replace_it)
        with pytest.raises(LockHeld, match="snapshot create"), _locked(path):
            pytest.fail("two hold the lock")


def test_a_symbolic_link_in_its_place_is_refused_and_its_target_left_alone(path: Path) -> None:
    target = path.with_name("precious")
    target.write_text("content")
    path.symlink_to(target)
    with pytest.raises(HostCannot, match="cannot be opened") as caught, _locked(path):
        pytest.fail("a link was followed")
    assert caught.value.exit_code == 9
    assert target.read_text() == "content"


def test_a_second_name_of_a_file_is_refused_and_that_file_left_alone(path: Path) -> None:
    target = path.with_name("precious")
    target.write_text("content")
    path.hardlink_to(target)
    with pytest.raises(HostCannot, match="not a regular file of its own"), _locked(path):
        pytest.fail("it was taken for a lock")
    assert target.read_text() == "content"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"verb": "x"}', '{"since": 1e300, "verb": 1, "pid": 2, "host": 3}']
)
def test_an_owner_that_cannot_be_read_is_still_an_owner(path: Path, content: str) -> None:
    with machine_lock(path, machine="web", verb="stop"):
        path.write_text(content)
        with pytest.raises(LockHeld, match="another controller that has just started"), _locked(path):
            pytest.fail("two hold the lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with machine_lock(path, machine="web", verb="stop"):
        yield
