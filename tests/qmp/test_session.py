"""A session with the monitor, against a scripted one: what is said, what comes back, what we conclude."""

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError
from qmpsnap.qmp import session
from qmpsnap.testing import GREETING, HELLO, Close, Event, Expect, Raw, Refuse, Reply, Turn, scripted

LONG = 30.0
"""Seconds no test waits for."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """A session that has ended has closed its socket."""
    before = _sockets()
    yield
    assert _sockets() <= before


def _sockets() -> set[str]:
    return {str(link) for entry in Path("/proc/self/fd").iterdir() if (link := _target(entry)).startswith("socket:")}


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)  # noqa: PTH115 - what a descriptor links to is no path
    except OSError:
        return ""


# --- the way it goes ------------------------------------------------------------------------------------------------


async def test_it_greets_negotiates_and_runs_commands_in_order(path: Path) -> None:
    turns = (
        Expect("query-status"),
        Reply({"status": "running"}),
        Expect("stop", {"a": 1}),
        Reply(),
    )
    async with scripted(path, *HELLO, *turns) as qemu:
        async with session.connect(path, machine="web") as monitor:
            assert await monitor.execute("query-status") == {"status": "running"}
            assert await monitor.execute("stop", {"a": 1}) == {}
        with anyio.fail_after(LONG):
            await qemu.hung_up.wait()


async def test_qemus_refusal_carries_its_class_and_leaves_the_session_usable(path: Path) -> None:
    turns = (
        Expect("blockdev-del", {"node-name": "n"}),
        Refuse("GenericError", "Node 'n' is in use"),
        Expect("cont"),
        Reply(),
    )
    async with scripted(path, *HELLO, *turns), session.connect(path, machine="web") as monitor:
        with pytest.raises(QmpError, match="QEMU refused blockdev-del: Node 'n' is in use") as caught:
            await monitor.execute("blockdev-del", {"node-name": "n"})
        assert (caught.value.qmp_class, caught.value.effect, caught.value.exit_code) == ("GenericError", "none", 1)
        assert caught.value.machine == "web"
        await monitor.execute("cont")


async def test_a_reply_of_a_mebibyte_is_read(path: Path) -> None:
    big = ["x" * 1000] * 1049
    async with scripted(path, *HELLO, Expect("q"), Reply(big)), session.connect(path, machine="web") as monitor:
        assert await monitor.execute("q") == big


async def test_events_between_the_lines_are_passed_over_and_not_kept(path: Path) -> None:
    noise: list[Turn] = [Event("BLOCK_JOB_READY")] * 500
    turns: tuple[Turn, ...] = (*noise, Expect("stop"), *noise, Reply({"ok": 1}), *noise, Expect("cont"), Reply())
    async with scripted(path, *HELLO, *turns), session.connect(path, machine="web") as monitor:
        assert await monitor.execute("stop") == {"ok": 1}
        assert await monitor.execute("cont") == {}
        assert monitor._client.events.history == ()
        assert monitor._client.events.empty()


async def test_the_bell_rings_at_an_event_that_is_listened_to_and_at_no_other(path: Path) -> None:
    turns = (Expect("stop"), Event("RESET"), Event("STOP"), Reply(), Expect("cont"), Event("RESET"), Reply())
    async with (
        scripted(path, *HELLO, *turns),
        session.connect(path, machine="web") as monitor,
        monitor.listen("STOP") as bell,
    ):
        await monitor.execute("stop")
        with anyio.fail_after(LONG):
            await bell.wait(2 * LONG)
        await monitor.execute("cont")
        with anyio.move_on_after(0.05) as silence:
            await bell.wait(LONG)
        assert silence.cancelled_caught
        await bell.wait(0.01)  # and without an event its time passes


# --- nobody, or nobody who speaks -----------------------------------------------------------------------------------


async def test_without_a_socket_qemu_is_gone_and_nothing_was_changed(path: Path) -> None:
    with pytest.raises(QemuGone, match="nothing was changed") as caught:
        async with session.connect(path, machine="web"):
            pytest.fail("nobody is there")
    assert (caught.value.exit_code, caught.value.effect, as_typed(caught.value.hint)) == (
        5,
        "none",
        "qmpsnap start web",
    )


async def test_on_a_socket_that_nobody_listens_on_any_more_qemu_is_gone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(QemuGone) as caught:
        async with session.connect(path, machine="web"):
            pytest.fail("nobody is there")
    assert caught.value.effect == "none"


async def test_a_monitor_that_does_not_greet_is_given_up_at_the_deadline(path: Path) -> None:
    async with scripted(path) as qemu:
        with anyio.fail_after(LONG):
            with pytest.raises(DeadlinePassed, match=r"sent no greeting within 0\.1 s; nothing was changed") as caught:
                async with session.connect(path, machine="web", deadline=0.1):
                    pytest.fail("it did not greet")
            await qemu.hung_up.wait()
    assert (caught.value.exit_code, caught.value.effect) == (6, "none")


GIVEN_UP = """
import pathlib, sys, anyio
from qmpsnap.errors import DeadlinePassed
from qmpsnap.qmp import session
async def main():
    try:
        async with session.connect(pathlib.Path(sys.argv[1]), machine="web", deadline=0.1):
            sys.exit("it greeted")
    except DeadlinePassed:
        return
anyio.run(main)
"""


def test_a_monitor_that_was_given_up_leaves_no_traceback_at_the_end(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        done = subprocess.run([sys.executable, "-c", GIVEN_UP, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_monitor_that_greets_and_says_no_more_is_given_up_at_the_deadline(path: Path) -> None:
    async with scripted(path, *HELLO[:2]):
        with pytest.raises(DeadlinePassed) as caught:
            async with session.connect(path, machine="web", deadline=0.1):
                pytest.fail("it did not negotiate")
    assert caught.value.effect == "none"


@pytest.mark.parametrize(
    "greeting",
    [Raw(b"SSH-2.0-OpenSSH_9.2\r\n"), Raw(b"[]\n"), Raw(b'{"QMP": 7}\n'), Raw(b"\xff\xfe\n"), Close()],
    ids=["ssh", "list", "number", "not-utf-8", "closed"],
)
async def test_who_greets_with_something_else_is_no_qemu(path: Path, greeting: Raw | Close) -> None:
    async with scripted(path, greeting, Close()):
        with pytest.raises(QemuGone) as caught:
            async with session.connect(path, machine="web"):
                pytest.fail("that was no greeting")
    assert caught.value.effect == "none"


async def test_an_event_for_the_client_before_us_is_no_greeting_and_the_next_try_gets_one(path: Path) -> None:
    turns = (Event("RESET"), Close(), *HELLO, Expect("stop"), Reply("there"))
    async with scripted(path, *turns), session.connect(path, machine="web") as monitor:
        assert await monitor.execute("stop") == "there"


async def test_a_full_backlog_is_waited_for_no_longer_than_the_deadline(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))  # the one place of the backlog
            with anyio.fail_after(LONG), pytest.raises(DeadlinePassed) as caught:
                async with session.connect(path, machine="web", deadline=0.2):
                    pytest.fail("nobody has accepted")
    assert caught.value.effect == "none"


# --- a command whose answer does not come ---------------------------------------------------------------------------


async def test_a_command_without_an_answer_has_an_unknown_effect_after_its_deadline(path: Path) -> None:
    async with scripted(path, *HELLO, Expect("transaction")), session.connect(path, machine="web") as monitor:
        with pytest.raises(DeadlinePassed, match=r"did not answer transaction within 0\.1 s") as caught:
            await monitor.execute("transaction", deadline=0.1)
    assert (caught.value.exit_code, caught.value.effect, caught.value.machine) == (6, "unknown", "web")


async def test_an_answer_that_comes_late_is_dropped_and_the_next_command_gets_its_own(path: Path) -> None:
    turns = (Expect("first"), Expect("second"), Reply("late", to=1), Reply("its own"))
    async with scripted(path, *HELLO, *turns), session.connect(path, machine="web") as monitor:
        with pytest.raises(DeadlinePassed):
            await monitor.execute("first", deadline=0.05)
        assert await monitor.execute("second") == "its own"


async def test_a_monitor_that_closes_during_a_command_leaves_its_effect_unknown(path: Path) -> None:
    async with scripted(path, *HELLO, Expect("quit"), Close()), session.connect(path, machine="web") as monitor:
        with pytest.raises(QemuGone, match="closed during quit") as caught:
            await monitor.execute("quit")
        assert (caught.value.exit_code, caught.value.effect) == (5, "unknown")
        with pytest.raises(QemuGone):
            await monitor.execute("query-status")


@pytest.mark.parametrize(
    "garbage",
    [b"not json\n", b"\xff\xff\n", b"[1]\n", b'{"return": {}, "id": "__qmp#00000", "return"\n', b'{"ret'],
    ids=["text", "not-utf-8", "list", "cut", "cut-and-closed"],
)
async def test_garbage_instead_of_an_answer_is_an_end_with_unknown_effect(path: Path, garbage: bytes) -> None:
    turns = (Expect("stop"), Raw(garbage), Close())
    async with scripted(path, *HELLO, *turns), session.connect(path, machine="web") as monitor:
        with anyio.fail_after(LONG), pytest.raises(QemuGone) as caught:
            await monitor.execute("stop")
    assert caught.value.effect == "unknown"


async def test_an_answer_larger_than_any_buffer_is_an_end_with_unknown_effect(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu.qmp.QMPClient._readbuflen", 1 << 16)
    monkeypatch.setattr("qemu.qmp.QMPClient.__init__.__defaults__", (None, 1 << 16))
    turns = (Expect("stop"), Raw(json.dumps({"return": "x" * (1 << 18)}).encode() + b"\n"), Close())
    async with scripted(path, *HELLO, *turns) as qemu:
        with anyio.fail_after(LONG), pytest.raises(QemuGone) as caught:
            async with session.connect(path, machine="web") as monitor:
                await monitor.execute("stop")
        await qemu.hung_up.wait()
        qemu.failure = None  # it could not send all of it
    assert caught.value.effect == "unknown"


async def test_an_answer_without_return_or_error_has_an_unknown_effect(path: Path) -> None:
    turns = (Expect("stop"), Raw(b'{"id": "__qmp#00000"}\n'))
    async with scripted(path, *HELLO, *turns), session.connect(path, machine="web") as monitor:
        with pytest.raises(QemuGone) as caught:
            await monitor.execute("stop")
    assert caught.value.effect == "unknown"


# --- cancelled ------------------------------------------------------------------------------------------------------


async def test_a_cancelled_command_ends_at_once_and_the_session_is_closed(path: Path) -> None:
    reached: list[str] = []
    async with scripted(path, *HELLO, Expect("transaction")) as qemu:
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as group:

                async def work() -> None:
                    async with session.connect(path, machine="web") as monitor:
                        reached.append("connected")
                        await monitor.execute("transaction")
                        reached.append("answered")

                group.start_soon(work)
                await qemu.told.wait()  # the monitor has the command and will not answer
                group.cancel_scope.cancel()
            await qemu.hung_up.wait()
        assert (reached, group.cancel_scope.cancelled_caught) == (["connected"], True)


async def test_cancelled_while_it_waits_for_the_greeting_it_ends_at_once(path: Path) -> None:
    async with scripted(path) as qemu:
        with anyio.fail_after(LONG):
            async with anyio.create_task_group() as group:

                async def work() -> None:
                    async with session.connect(path, machine="web", deadline=LONG):
                        pytest.fail("it did not greet")

                group.start_soon(work)
                await qemu.told.wait()
                group.cancel_scope.cancel()
            await qemu.hung_up.wait()


async def test_an_error_of_the_caller_passes_through_and_closes_the_session(path: Path) -> None:
    async with scripted(path, *HELLO) as qemu:
        with pytest.raises(ZeroDivisionError):
            async with session.connect(path, machine="web"):
                raise ZeroDivisionError
        with anyio.fail_after(LONG):
            await qemu.hung_up.wait()


# --- nothing is left ------------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"\n"
"""More than Python's reader of JSON takes."""


@pytest.fixture
async def unasked() -> AsyncIterator[list[str]]:
    """What asyncio would have printed: it is empty at the end."""
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(str(context)))
    yield said
    gc.collect()
    assert said == []


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    "turns",
    [
        (Raw(json.dumps(GREETING).encode() + b"\n"), Close()),
        (*HELLO, Close()),
        (*HELLO[:2], Refuse("GenericError", "no"), Close()),
        (*HELLO[:2], Raw(DEEP)),
        (Raw(DEEP),),
        (Raw(b'{"QMP": {"version": {}, "capabilities": 7}}\n'),),
    ],
    ids=["greeted", "negotiated", "refused", "deep", "deep greeting", "no capabilities"],
)
async def test_a_monitor_that_ends_while_it_greets_is_gone(path: Path, turns: tuple[Turn, ...]) -> None:
    async with scripted(path, *turns):
        with pytest.raises(QemuGone, match="web"):
            async with session.connect(path, machine="web") as monitor:
                await monitor.execute("stop")  # it may have ended as late as that
        assert _left() == []


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    "said",
    [DEEP, b'{"return": {}, "id": [1]}\n', b'{"event": {}, "timestamp": 3}\n', b"[]\n", b"\xff\n", b"7\n"],
    ids=["deep", "id", "event", "list", "no text", "number"],
)
async def test_what_no_qemu_says_ends_the_session_and_leaves_nothing(path: Path, said: bytes) -> None:
    async with scripted(path, *HELLO, Expect("stop"), Raw(said), Close()):
        async with session.connect(path, machine="web") as monitor, monitor.listen("STOP"):
            with pytest.raises(QemuGone) as caught:
                await monitor.execute("stop")
        assert (caught.value.effect, _left()) == ("unknown", [])


@pytest.mark.usefixtures("unasked")
async def test_an_answer_and_the_end_at_once_are_an_answer(path: Path) -> None:
    answer = Raw(b'{"return": {}, "id": "__qmp#00000"}\n')
    async with scripted(path, *HELLO, Expect("quit"), answer, Close()) as qemu:
        async with session.connect(path, machine="web") as monitor:
            assert await monitor.execute("quit") == {}
            await qemu.hung_up.wait()
        assert _left() == []


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("again", [None, 0, 1, 3], ids=lambda steps: f"again after {steps}")
async def test_cancelled_at_any_step_a_session_leaves_no_task(path: Path, again: int | None) -> None:
    ended: list[str] = []
    async with _obliging(path):

        async def work() -> None:
            async with session.connect(path, machine="web") as monitor:
                await monitor.execute("stop")

        for steps in range(400):
            working = asyncio.create_task(work())
            for _ in range(steps):
                await asyncio.sleep(0)
            working.cancel()
            for _ in range(again or 0):
                await asyncio.sleep(0)
            if again is not None:
                working.cancel()
            await asyncio.wait([working])
            assert _left() == [], steps
            ended.append("cancelled" if working.cancelled() else "done")
            if ended[-10:] == ["done"] * 10:
                return
        pytest.fail(f"it never came to its end: {ended}")


async def test_a_monitor_that_takes_nothing_is_let_go_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_FLUSH", 0.1)
    async with scripted(path, *HELLO):
        hung = asyncio.create_task(_say_much(path))
        with pytest.raises(DeadlinePassed):
            await asyncio.wait_for(hung, LONG)
        assert _left() == []


async def _say_much(path: Path) -> None:
    async with session.connect(path, machine="web") as monitor:
        for task in asyncio.all_tasks():
            if "play" in repr(task):  # the monitor's own: from here on nobody reads
                task.cancel()
        await asyncio.sleep(0)
        await monitor.execute("stop", {"much": "x" * (16 << 20)}, deadline=0.1)


def _left() -> list[str]:
    """Tasks that are not the test's own: the library's, or ours around it."""
    return [repr(task) for task in asyncio.all_tasks() if re.search("site-packages/qemu|qmpsnap/qmp", repr(task))]


@asynccontextmanager
async def _obliging(path: Path) -> AsyncIterator[None]:
    """A monitor that greets everybody and says yes to everything."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(json.dumps(GREETING).encode() + b"\n")
            while said := await reader.read(4096):
                found = re.search(rb'"id": *("[^"]*")', said)
                writer.write(b'{"return": {}' + (b', "id": ' + found[1] if found else b"") + b"}\n")
                await writer.drain()
        except OSError:  # the client has left
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, path)
    try:
        yield
    finally:
        server.close()
