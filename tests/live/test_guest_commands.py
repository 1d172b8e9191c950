"""Commands and files of a guest through its agent, as a caller has them."""

import contextlib
import hashlib
import random
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed, HostCannot, ProcessError, QmpError, StateError, UsageError
from qmpsnap.machine import agent
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.qmp.dial import dial
from tests.live.booted import start_booted


@pytest.fixture
async def vm(q: qmpsnap.Controller, guest_spec: MachineSpec) -> qmpsnap.MachineHandle:
    machine = await q.define(guest_spec)
    await start_booted(machine)
    return machine


async def test_a_command_that_fails_tells_all_of_itself(vm: qmpsnap.MachineHandle) -> None:
    with pytest.raises(ProcessError, match="exit status 3") as failed:
        await vm.run("echo out; echo 'für euch' >&2; exit 3")
    error = failed.value
    assert (error.exit_status, error.stdout, error.stderr) == (3, "out\n", "für euch\n")
    assert (error.effect, error.machine, error.exit_code) == ("applied", "guest", 1)
    done = await vm.run("printf '\\377\\n'")
    assert done.stdout == "\ufffd\n"
    assert (await vm.run("printf '\\377\\n'", encoding="latin-1")).stdout == "ÿ\n"
    assert (await vm.run("printf '\\377\\n'", encoding=None)).stdout == b"\xff\n"
    with pytest.raises(UsageError, match="no-such-code"):
        await vm.run("true", encoding="no-such-code")
    with pytest.raises(ProcessError) as killed:
        await vm.run("kill -9 $$", encoding=None)
    assert (killed.value.exit_status, killed.value.stdout) == (128 + 9, b"")


async def test_a_command_has_input_variables_and_a_folder(vm: qmpsnap.MachineHandle) -> None:
    much = random.Random(2).randbytes(1 << 20)  # noqa: S311
    assert (await vm.run("sha256sum", stdin=much)).stdout.split()[0] == hashlib.sha256(much).hexdigest()
    assert (await vm.run(["cat"], stdin="für\n")).stdout == "für\n"
    assert (await vm.run(["cat"])).stdout == ""
    env = {"ONE": "1 $HOME\n'x'", "A_2": "", "n": "--"}
    done = await vm.run('printf "%s|%s|%s|" "$ONE" "$A_2" "$n"; pwd; test -n "$PATH"', env=env, cwd="/proc/self")
    assert done.stdout == "1 $HOME\n'x'||--|/proc/self\n"
    assert (await vm.run(["printf", "%s", "--"], env={"x": "y"})).stdout == "--"
    assert (await vm.run(["pwd"], cwd="/no/such", check=False)).exit_status == 126
    for wrong in ({"env": {"1": ""}}, {"env": {"A=": ""}}, {"cwd": "relative"}, {"env": {"A": "\0"}}):
        with pytest.raises(UsageError, match=r"cannot be a variable|is not an absolute path"):
            await vm.run("true", **wrong)


async def test_output_is_heard_while_the_command_runs(vm: qmpsnap.MachineHandle) -> None:
    parts: list[tuple[str, bytes]] = []
    size = (16 << 20) + 1  # more than the agent keeps
    line = f"echo err >&2; head -c {size} /dev/zero; exit 3"
    done = await vm.run(line, output=lambda stream, part: parts.append((stream, part)), check=False, timeout=300)
    assert (done.exit_status, done.stdout, done.truncated) == (3, "", ())
    assert b"".join(part for stream, part in parts if stream == "stdout") == bytes(size)
    assert [part for stream, part in parts if stream == "stderr"] == [b"err\n"]

    class EnoughError(Exception):
        pass

    def enough(stream: str, part: bytes) -> None:
        raise EnoughError(stream, part)

    with anyio.fail_after(300), pytest.raises(EnoughError, match=r"stdout.*first"):
        await vm.run("echo first; exec sleep 1000000", output=enough, timeout=600)
    with pytest.raises(DeadlinePassed, match="did not finish sleep"):
        await vm.run(["sleep", "1000000"], output=enough, timeout=2)
    left = await vm.run("pgrep sleep; ls -d /tmp/tmp.*", check=False)
    assert left.stdout == ""
    line = f"{sys.executable} -m qmpsnap exec --stream guest sh -c 'echo out; exec yes' | head -n 1"
    with anyio.fail_after(300):
        shown = await anyio.run_process(["bash", "-c", line])
    assert (shown.stdout, shown.stderr) == (b"out\n", b"")


async def test_standard_input_is_passed_on_where_that_is_asked_for(vm: qmpsnap.MachineHandle) -> None:
    line = "printf 'said\\0x' | {0} exec {1} guest -- cat; echo never heard | {0} exec guest -- cat -; "
    line += "{0} exec --env A=1 --env 'B=x y' --cwd /tmp guest sh -c 'echo $A $B; pwd' --timeout 5 -o json"
    program = f"{sys.executable} -m qmpsnap"
    done = await anyio.run_process(["bash", "-c", line.format(program, "--stdin")])
    assert (done.stdout, done.stderr) == (b"said\0x1 x y\n/tmp\n", b"")


async def test_an_agent_that_does_not_run_is_told_long_before_the_timeout(
    vm: qmpsnap.MachineHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(DeadlinePassed):
        await vm.run("killall -9 qemu-ga", timeout=2)
    with anyio.fail_after(60), pytest.raises(DeadlinePassed, match="no guest agent runs in machine guest") as told:
        await vm.run("true", timeout=600, wait=1)
    assert told.value.effect == "none"
    words = ["exec", "--timeout", "600", "--wait", "0", "guest", "true"]
    with anyio.fail_after(60):
        assert await anyio.to_thread.run_sync(main, words) == 6
    assert "while it boots, wait longer with --wait SECONDS" in capsys.readouterr().err


async def test_the_former_names_go_on_working(vm: qmpsnap.MachineHandle) -> None:
    with pytest.warns(DeprecationWarning, match=r"run\(deadline=\) is now timeout=") as warned:
        done = await vm.run("true", deadline=20)  # type: ignore[call-overload]
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="exit_status"):
        assert done.status == 0
    with pytest.warns(DeprecationWarning, match=r"fstrim\(deadline=\)"):
        await vm.fstrim(deadline=20)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"preview_snapshot\(\) is now plan_snapshot\(\)"):
        machine, plan = await vm.preview_snapshot("s")
    assert (machine.name, plan.change.snapshots[0].name) == ("guest", "s")


async def test_files_go_to_the_guest_and_come_back(vm: qmpsnap.MachineHandle, tmp_path: Path) -> None:
    content = random.Random(1).randbytes((3 << 20) + 17)  # noqa: S311
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(content)
    assert await vm.put(source, "/tmp/file") == len(content)
    said = (await vm.run("sha256sum /tmp/file")).stdout.split()[0]
    assert said == hashlib.sha256(content).hexdigest()
    target.write_text("there before")
    assert await vm.get("/tmp/file", target) == len(content)
    assert target.read_bytes() == content
    assert await vm.put(b"", "/tmp/file") == 0
    assert await vm.get("/tmp/file", target) == 0
    assert target.read_bytes() == b""
    assert await vm.put(b"short", "/tmp/file") == 5
    assert (await vm.run("cat /tmp/file")).stdout == "short"


async def test_files_that_cannot_be_had_leave_nothing(vm: qmpsnap.MachineHandle, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("there before")
    with pytest.raises(QmpError, match="guest-file-open"):
        await vm.get("/no/such/file", target)
    with pytest.raises(QmpError, match="guest-file-read"):
        await vm.get("/tmp", target)
    with pytest.raises(QmpError, match="guest-file-open"):
        await vm.put(b"content", "/no/such/folder/file")
    with pytest.raises(HostCannot):
        await vm.put(tmp_path / "missing", "/tmp/file")
    with pytest.raises(HostCannot):
        await vm.get("/etc/passwd", tmp_path / "no" / "folder")
    with pytest.raises(DeadlinePassed):
        await vm.put(bytes(64 << 20), "/dev/null", timeout=0.5)
    assert target.read_text() == "there before"
    assert list(tmp_path.iterdir()) == [target]
    assert (await vm.run("echo works")).stdout == "works\n"
    await vm.pause()
    with pytest.raises(StateError, match="is not running"):
        await vm.get("/etc/passwd", target)


async def test_the_next_command_finds_the_connection_open(
    vm: qmpsnap.MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest's agent looks for a new one every 100 ms only."""
    dialled = []

    async def counted(path: Path) -> socket.socket:
        dialled.append(path)
        return await dial(path)

    monkeypatch.setattr("qmpsnap.machine.agent.dial", counted)
    monkeypatch.setattr(agent, "KEEP", 3600)
    for _ in range(3):
        await vm.run(["true"])
    assert len(dialled) == 1
    assert await to_thread.run_sync(main, ["exec", "guest", "--", "true"]) == 0
    await vm.run(["true"])
    assert len(dialled) == 1, "threads share it"
    monkeypatch.setattr(agent, "KEEP", 0.5)
    await vm.run(["true"])
    words = (sys.executable, "-m", "qmpsnap", "exec", "guest", "--", "true")
    done = subprocess.run(words, check=False)  # noqa: ASYNC221 - this loop does nothing meanwhile
    assert done.returncode == 0, "another process waits for it"
    await vm.run(["true"])
    assert len(dialled) == 2
