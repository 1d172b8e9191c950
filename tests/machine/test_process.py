"""A QEMU is told from every other process: here with real, short-lived processes that stand in for it."""

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import HostCannot
from qmpsnap.machine import qemu as machines
from qmpsnap.machine.qemu import unless_ending, wait_end
from qmpsnap.machine.starting import alive
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.alive import is_alive, is_stopped
from qmpsnap.machine.starting.logs import QEMU_LOG
from qmpsnap.machine.starting.process import find, is_ending, log_tail, spawn, terminate
from qmpsnap.machine.starting.run_files import PID_FILE
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.spec import MachineSpec

UUID = "6a8c0f2e-5d1b-4c3a-9e7f-0123456789ab"
SLEEP = ["sleep", "60"]

Spawn = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Spawn]:
    """``spawn`` in ``tmp_path``; whatever was started is killed in the end."""
    started: list[Process] = []

    def run(argv: list[str] | None = None) -> Process:
        started.append(spawn(argv or SLEEP, tmp_path))
        arguments = Path(f"/proc/{started[-1].pid}/cmdline")
        while alive.stat(started[-1].pid)[0] != "Z" and not arguments.read_bytes():
            time.sleep(0.001)  # the kernel says that the program runs before it has put its arguments there
        return started[-1]

    yield run
    for process in started:
        child = alive.children.pop(process.pid, None)
        if child:
            child.kill()
            child.wait(20)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any machine."""
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


def ended(process: Process) -> Process:
    """The same, once it has come to its end; not yet reaped."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process


def machine(process: Process | None = None, *, uuid: str = UUID) -> Machine:
    spec = MachineSpec(name="web")
    return Machine(name="web", uuid=uuid, host="here", spec=spec, created=0.0, process=process)


WITHOUT_ITS_FIRST_THREAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).syscall(60, 0)  # exit, of this thread alone
"""


@pytest.fixture
def ending(start: Spawn) -> Process:
    """A process as one that was killed and whose threads have not all ended yet: the first has, another lives."""
    process = start([sys.executable, "-c", WITHOUT_ITS_FIRST_THREAD, "-uuid", UUID])
    while alive.stat(process.pid)[0] != "Z":
        time.sleep(0.005)
    return process


def posing_as(*arguments: str) -> list[str]:
    """A process that sleeps with these words among its arguments, as QEMU would have them."""
    return [sys.executable, "-c", "import time; time.sleep(60)", *arguments]


# --- identity -------------------------------------------------------------------------------------------------------


def test_a_process_that_was_started_is_alive_until_it_ends(start: Spawn) -> None:
    process = start()
    assert is_alive(process)
    os.kill(process.pid, signal.SIGKILL)
    assert not is_alive(ended(process))


@pytest.mark.parametrize("changed", [{"start_ticks": 1}, {"boot_id": "another boot"}])
def test_the_same_pid_alone_is_another_process(start: Spawn, changed: dict[str, object]) -> None:
    assert not is_alive(replace(start(), **changed))


def test_a_zombie_is_not_alive() -> None:
    with subprocess.Popen(["true"]) as child:  # nobody has waited for it yet
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert alive.stat(child.pid)[0] == "Z"
        ticks = int(alive.stat(child.pid)[alive._START_TICKS])
        assert not is_alive(processes._record(child.pid, ticks))


def test_one_that_was_killed_is_alive_until_its_last_thread_has_ended(start: Spawn, ending: Process) -> None:
    assert is_alive(ending)
    assert is_ending(ending)
    os.kill(ending.pid, signal.SIGKILL)
    assert not is_alive(ended(ending))
    assert not is_ending(ending)
    assert not is_ending(start())


async def test_the_end_of_all_threads_is_waited_for(ending: Process) -> None:
    assert not await wait_end(ending, deadline=0.1)
    terminate(ending)
    assert await unless_ending(ending) is None


async def test_one_that_does_not_end_is_not_said_to_have_ended(
    start: Spawn, ending: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "QUIT_DEADLINE", 0.1)
    assert await unless_ending(ending) == ending
    assert await unless_ending(other := start()) == other
    assert await unless_ending(None) is None


def test_a_qemu_that_has_no_pid_file_yet_is_known_by_its_folder_and_its_machine(start: Spawn, tmp_path: Path) -> None:
    process = start(posing_as("-uuid", UUID))
    start(posing_as("-uuid", "another"))
    (tmp_path / "elsewhere").mkdir()
    assert [found.pid for found in processes.strays(machine(), tmp_path)] == [process.pid]
    assert processes.strays(machine(), tmp_path / "elsewhere") == ()
    terminate(process)
    ended(process)
    assert processes.strays(machine(), tmp_path) == ()


def test_a_process_with_a_closing_parenthesis_in_its_name_is_read_right(start: Spawn, tmp_path: Path) -> None:
    odd = tmp_path / ") R 1 ("
    odd.symlink_to("/bin/sleep")
    process = start([str(odd), "60"])
    assert is_alive(process)
    assert not is_stopped(process.pid)


def test_one_that_a_signal_has_stopped_is_alive_and_stopped(start: Spawn) -> None:
    process = start()
    assert not is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_stopped(process.pid)
    assert is_alive(process)


# --- starting -------------------------------------------------------------------------------------------------------


def test_it_is_started_in_its_folder_in_a_session_of_its_own_with_a_private_log(start: Spawn, tmp_path: Path) -> None:
    ended(start(["sh", "-c", "echo of the last time"]))
    process = start(["sh", "-c", "pwd; umask; readlink /proc/$$/fd/0; echo oops >&2; exec sleep 60"])
    assert os.getsid(process.pid) == process.pid
    while "oops" not in (said := log_tail(tmp_path)):
        assert is_alive(process)
        time.sleep(0.005)
    assert said == f"{tmp_path}\n0077\n/dev/null\noops"
    assert (tmp_path / QEMU_LOG).stat().st_mode & 0o777 == 0o600


def test_a_program_that_is_not_there_is_the_hosts_trouble(tmp_path: Path) -> None:
    with pytest.raises(HostCannot, match="/no/such/qemu cannot be run") as caught:
        spawn(["/no/such/qemu"], tmp_path)
    assert (caught.value.exit_code, as_typed(caught.value.hint)) == (9, "qmpsnap doctor shows what is missing")


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_log_that_is_a_link_is_not_written_through(
    tmp_path: Path, start: Spawn, link: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "precious").write_text("content")
    link(tmp_path / QEMU_LOG, tmp_path / "precious")
    start()
    assert (tmp_path / "precious").read_text() == "content"
    assert stat.S_ISREG((tmp_path / QEMU_LOG).lstat().st_mode)


def test_a_log_that_cannot_be_made_is_the_hosts_fault(tmp_path: Path) -> None:
    (tmp_path / QEMU_LOG).mkdir()
    with pytest.raises(HostCannot, match="nothing was changed"):
        spawn(SLEEP, tmp_path)


# --- killing --------------------------------------------------------------------------------------------------------


def test_terminate_ends_that_very_process(start: Spawn) -> None:
    process = start()
    terminate(process)
    assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT) is not None
    assert not is_alive(process)
    terminate(process)  # and one that has ended already is none to fear


@pytest.mark.parametrize("changed", [{"start_ticks": 1}, {"boot_id": "another boot"}])
def test_terminate_never_hits_a_later_process_of_the_same_pid(
    stranger: subprocess.Popen[bytes], changed: dict[str, object]
) -> None:
    ticks = int(alive.stat(stranger.pid)[alive._START_TICKS])
    terminate(replace(processes._record(stranger.pid, ticks), **changed))
    os.kill(stranger.pid, signal.SIGTERM)  # had it been killed, this is what it would not die of
    assert stranger.wait(20) == -signal.SIGTERM


# --- finding it again -----------------------------------------------------------------------------------------------


def test_the_recorded_process_is_found_without_a_pid_file(start: Spawn, tmp_path: Path) -> None:
    process = start()
    assert find(machine(process), tmp_path) == process


def test_a_recorded_process_that_is_another_by_now_is_not_found(start: Spawn, tmp_path: Path) -> None:
    assert find(machine(replace(start(), start_ticks=1)), tmp_path) is None


def test_one_that_nobody_recorded_is_found_by_its_pid_file_and_uuid(start: Spawn, tmp_path: Path) -> None:
    process = start(posing_as("-uuid", UUID, "-accel", "tcg,thread=multi"))
    (tmp_path / PID_FILE).write_text(f"{process.pid}\n")
    found = find(machine(), tmp_path)
    assert found is not None
    assert (found.pid, found.start_ticks, found.boot_id) == (process.pid, process.start_ticks, process.boot_id)
    assert found.accel == "tcg"
    later = find(machine(replace(process, boot_id="the last boot")), tmp_path)
    assert later is not None
    assert later.pid == process.pid


def test_one_that_is_ending_is_found_by_its_pid_file_and_folder(ending: Process, tmp_path: Path) -> None:
    (tmp_path / PID_FILE).write_text(f"{ending.pid}\n")
    found = find(machine(), tmp_path)
    assert found is not None
    assert (found.pid, found.start_ticks) == (ending.pid, ending.start_ticks)
    other = tmp_path / "other"
    other.mkdir()
    (other / PID_FILE).write_text(f"{ending.pid}\n")
    assert find(machine(), other) is None


@pytest.mark.parametrize("arguments", [("-uuid", "another"), (f"-uuid={UUID}",), ()], ids=["other", "glued", "none"])
def test_a_stale_pid_file_that_leads_to_a_foreign_process_is_ignored(
    start: Spawn, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / PID_FILE).write_text(str(start(posing_as(*arguments)).pid))
    assert find(machine(), tmp_path) is None


def test_a_machine_without_a_uuid_is_no_process_at_all(start: Spawn, tmp_path: Path) -> None:
    (tmp_path / PID_FILE).write_text(str(start().pid))
    assert find(machine(uuid=""), tmp_path) is None


def test_a_pid_file_of_a_process_that_has_ended_is_ignored(start: Spawn, tmp_path: Path) -> None:
    process = start(["true"])
    (tmp_path / PID_FILE).write_text(str(ended(process).pid))
    assert find(machine(), tmp_path) is None


@pytest.mark.parametrize("content", ["", "x", "-1", "0", "99999999999", "1 2"])
def test_a_pid_file_that_holds_no_pid_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / PID_FILE).write_text(content)
    assert find(machine(), tmp_path) is None


# --- what it said ---------------------------------------------------------------------------------------------------


def test_the_end_of_the_log_is_printable_whatever_was_written(tmp_path: Path) -> None:
    (tmp_path / QEMU_LOG).write_bytes(b"x" * 3000 + b"\n\x1b[31mqemu: \xff\0failed\r\n\n")
    tail = log_tail(tmp_path, limit=23)
    assert tail == "[31mqemu: �failed"
    assert len(log_tail(tmp_path)) <= 2000


def test_that_every_qemu_waits_for_our_monitor_is_no_reason(tmp_path: Path) -> None:
    line = "qemu: -chardev socket,id=qmp: info: QEMU waiting for connection on: disconnected:unix:qmp.sock,server=on\n"
    (tmp_path / QEMU_LOG).write_text(line + "qemu: no space\n")
    assert log_tail(tmp_path) == "qemu: no space"


def test_without_a_log_nothing_was_said(tmp_path: Path) -> None:
    assert log_tail(tmp_path) == ""


def test_it_inherits_nothing_of_whoever_typed_the_command(start: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LD_PRELOAD": "", "PYTHONPATH": "/x", "SSH_AUTH_SOCK": "/y", "QEMU_MODULE_DIR": "/z"}.items():
        monkeypatch.setenv(name, value)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, before[1]))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        child = start()
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # ours stays as it was
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    proc = Path(f"/proc/{child.pid}")
    names = {entry.split(b"=")[0] for entry in (proc / "environ").read_bytes().split(b"\0")}
    assert b"QEMU_MODULE_DIR" in names
    assert names.isdisjoint({b"LD_PRELOAD", b"PYTHONPATH", b"SSH_AUTH_SOCK"})
    assert resource.prlimit(child.pid, resource.RLIMIT_FSIZE) == (before[1], before[1])
    status = dict(line.split(":\t") for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert int(status["SigBlk"], 16) == 0
