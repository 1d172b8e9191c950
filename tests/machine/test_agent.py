"""The guest agent, against a scripted one: the guest is not trusted, so most of what it says here is wrong."""

import asyncio
import base64
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError, QmpsnapError, UsageError
from qmpsnap.machine import agent
from qmpsnap.machine.agent import Agent, Completed, Trimmed
from qmpsnap.qmp import parked

LONG = 30.0
"""Seconds no test waits for."""

HANG_UP = b"<hang up>"

Answer = bytes | Callable[[dict[str, Any]], bytes]
"""What the agent sends after a request: bytes as they are, or made from the request."""


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def returns(value: Any) -> bytes:
    return line({"return": value})


def synced(request: dict[str, Any]) -> bytes:
    """The answer to ``guest-sync-delimited``."""
    return b"\xff" + returns(request["arguments"]["id"])


class Script:
    """An agent that answers each request with the next of its answers, and then is silent."""

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, Any]] = []
        self.raw = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while said := await reader.readline():
                self.raw += said
                request = json.loads(said.lstrip(b"\xff"))
                self.asked.append((request["execute"], request.get("arguments")))
                answer = self._answers.pop(0) if self._answers else b""
                data = answer if isinstance(answer, bytes) else answer(request)
                if data == HANG_UP:
                    return
                for part in data.split(b"<pause>"):  # a pause: the parts come one by one
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(path: Path, *answers: Answer) -> AsyncIterator[Script]:
    script = Script(answers)
    tasks: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(script.serve(reader, writer)))

    server = await asyncio.start_unix_server(accept, path)
    try:
        yield script
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent"


@asynccontextmanager
async def talking(path: Path, *answers: Answer) -> AsyncIterator[tuple[Agent, Script]]:
    """A conversation that is synchronised, whose further requests get these answers."""
    async with scripted(path, synced, *answers) as script, agent.connect(path, machine="web") as guest:
        yield guest, script


# --- synchronising --------------------------------------------------------------------------------------------------


async def test_the_first_words_are_a_delimiter_and_a_random_number(path: Path) -> None:
    numbers = []
    for turn in ("one", "two"):
        async with scripted(path.with_name(turn), synced) as script:
            async with agent.connect(path.with_name(turn), machine="web"):
                pass
            assert script.raw.startswith(b'\xff{"execute": "guest-sync-delimited"')
            numbers.append(script.asked[0][1]["id"])
    assert numbers[0] != numbers[1]


async def test_a_kept_connection_that_has_ended_is_replaced(path: Path) -> None:
    async with scripted(path, synced, HANG_UP) as script, agent.connect(path, machine="web", keep=LONG):
        pass
    async with scripted(path, synced) as again, agent.connect(path, machine="web"):
        assert [command for command, _ in again.asked] == ["guest-sync-delimited"]
    assert len(script.asked) == 1


async def test_after_a_conversation_that_failed_none_is_kept(path: Path) -> None:
    async with scripted(path, synced) as script:
        with pytest.raises(UsageError):
            async with agent.connect(path, machine="web", keep=LONG):
                raise UsageError("in the midst")
        assert parked.taken(path) is None
    assert len(script.asked) == 1


async def test_a_kept_connection_is_let_go_in_time(path: Path) -> None:
    async with scripted(path, synced):
        async with agent.connect(path, machine="web", keep=0.01):
            pass
        with anyio.fail_after(LONG):
            while path in parked._parked:
                await anyio.sleep(0.01)


@pytest.mark.parametrize(
    "before",
    [
        returns({"stale": 1}),
        b'{"return": {"cut',
        b"\xff",
        b"\xff" + returns(1),
        b'\xff{"return": {"cut',
        b"\xff" + returns({"pid": 3}) + b"\xff" + returns(-1),
        b"\xffnot json\n",
        b"\xff\xff\xff[[[\n",
        b"\xff" + b"[" * 100_000 + b"\n",
        b"\0\x01\xfe garbage without end",
    ],
)
async def test_whatever_an_earlier_client_left_in_the_channel_is_passed_over(path: Path, before: bytes) -> None:
    def after_it(request: dict[str, Any]) -> bytes:
        return before + synced(request)

    async with scripted(path, after_it, returns("pong")), agent.connect(path, machine="web", deadline=LONG) as guest:
        assert await guest.execute("guest-ping", deadline=LONG) == "pong"


async def test_an_answer_may_come_in_any_pieces(path: Path) -> None:
    def pieces(request: dict[str, Any]) -> bytes:
        return b"<pause>".join(bytes([byte]) for byte in synced(request))

    answer = b"<pause>".join([b'{"retu', b'rn": ', b'"whole"}', b"\n"])
    async with scripted(path, pieces, answer), agent.connect(path, machine="web", deadline=LONG) as guest:
        assert await guest.execute("guest-ping", deadline=LONG) == "whole"


@pytest.mark.parametrize("answer", [b"", b"\xff" + returns(1), b"noise"], ids=["silent", "wrong-number", "noise"])
async def test_without_the_right_number_there_is_no_agent_yet(path: Path, answer: bytes) -> None:
    async with scripted(path, answer):
        with anyio.fail_after(LONG), pytest.raises(DeadlinePassed, match="did not finish guest-sync") as caught:
            async with agent.connect(path, machine="web", deadline=0.1):
                pytest.fail("that was no agent")
    assert (caught.value.exit_code, caught.value.machine) == (6, "web")


async def test_without_a_socket_the_machine_does_not_run(path: Path) -> None:
    with pytest.raises(QemuGone) as caught:
        async with agent.connect(path, machine="web"):
            pytest.fail("nobody is there")
    assert (caught.value.exit_code, caught.value.effect) == (5, "none")


async def test_a_channel_where_others_queue_is_given_up_at_the_deadline(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        with anyio.fail_after(LONG), pytest.raises(DeadlinePassed, match="was not free") as caught:
            async with agent.connect(path, machine="web", deadline=0.1):
                pytest.fail("the channel was full")
    assert caught.value.effect == "none"


# --- commands -------------------------------------------------------------------------------------------------------


async def test_a_command_is_said_with_its_arguments_and_its_return_read(path: Path) -> None:
    async with talking(path, returns({"a": [1]}), returns(None)) as (guest, script):
        assert await guest.execute("guest-info", {"b": 2}) == {"a": [1]}
        assert await guest.execute("guest-ping") is None
    assert script.asked[1:] == [("guest-info", {"b": 2}), ("guest-ping", None)]


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        ({"class": "CommandNotFound", "desc": "no such thing"}, "CommandNotFound", "no such thing"),
        ({}, "GenericError", "no reason given"),
        ("text", "GenericError", "no reason given"),
        ({"class": 7, "desc": [1]}, "7", r"\[1\]"),
    ],
)
async def test_the_agents_refusal_carries_its_class_and_reason(path: Path, error: Any, kind: str, told: str) -> None:
    async with talking(path, line({"error": error}), returns("on")) as (guest, _):
        with pytest.raises(QmpError, match=f"refused guest-x: {told}") as caught:
            await guest.execute("guest-x")
        assert (caught.value.qmp_class, caught.value.effect) == (kind, "none")
        assert await guest.execute("guest-ping") == "on"


@pytest.mark.parametrize("answer", [b"garbage\n", b"\n", b"[]\n", b"{}\n", b'{"return": \n', b"\xff\xfe\n"])
async def test_an_answer_that_is_none_leaves_the_effect_unknown(path: Path, answer: bytes) -> None:
    async with talking(path, answer) as (guest, _):
        with pytest.raises(QmpError, match="invalid answer to guest-x") as caught:
            await guest.execute("guest-x")
    assert caught.value.effect == "unknown"


async def test_a_command_without_an_answer_has_an_unknown_effect_after_its_deadline(path: Path) -> None:
    async with talking(path, b'{"return": "half') as (guest, _):
        with pytest.raises(DeadlinePassed, match=r"did not finish guest-x within 0\.05 s") as caught:
            await guest.execute("guest-x", deadline=0.05)
    assert (caught.value.effect, caught.value.exit_code) == ("unknown", 6)


async def test_a_channel_that_closes_leaves_the_effect_unknown(path: Path) -> None:
    async with talking(path, HANG_UP) as (guest, _):
        with pytest.raises(QemuGone, match="closed during guest-x") as caught:
            await guest.execute("guest-x")
    assert caught.value.effect == "unknown"


async def test_an_answer_without_end_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "REPLY_LIMIT", 1 << 20)
    async with talking(path, b"x" * (3 << 20)) as (guest, _):
        with anyio.fail_after(LONG), pytest.raises(QmpError, match="gave an endless answer"):
            await guest.execute("guest-x", deadline=LONG)


# --- programs -------------------------------------------------------------------------------------------------------


def exited(**status: Any) -> bytes:
    return returns({"exited": True} | status)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_a_program_is_run_to_its_end_and_its_output_decoded(path: Path) -> None:
    answers = (
        returns({"pid": 42}),
        returns({"exited": False}),
        returns({"exited": False}),
        exited(exitcode=3, **{"out-data": encoded(b"\0out\n"), "err-data": encoded(b"err")}),
    )
    async with talking(path, *answers) as (guest, script):
        done = await guest.run(["/bin/cat", "-x", "a b"], deadline=LONG, stdin=b"\xffin")
    assert done == Completed(exit_status=3, stdout=b"\0out\n", stderr=b"err")
    assert script.asked[1] == (
        "guest-exec",
        {"path": "/bin/cat", "arg": ["-x", "a b"], "capture-output": True, "input-data": encoded(b"\xffin")},
    )
    assert script.asked[2:] == [("guest-exec-status", {"pid": 42})] * 3


@pytest.mark.parametrize(
    ("status", "expected"),
    [({"exitcode": 0}, 0), ({"exitcode": 255}, 255), ({"signal": 9}, 137), ({}, 128)],
    ids=["good", "bad", "killed", "neither"],
)
async def test_the_status_is_the_exit_status_or_that_of_a_shell_for_a_signal(
    path: Path, status: dict[str, int], expected: int
) -> None:
    async with talking(path, returns({"pid": 1}), exited(**status)) as (guest, _):
        assert await guest.run(["x"], deadline=LONG) == Completed(exit_status=expected, stdout=b"", stderr=b"")


@pytest.mark.parametrize(
    ("flags", "truncated"),
    [
        ({}, ()),
        ({"out-truncated": False}, ()),
        ({"err-truncated": True}, ("stderr",)),
        ({"out-truncated": True, "err-truncated": True}, ("stdout", "stderr")),
    ],
)
async def test_output_that_the_agent_has_cut_off_is_told(
    path: Path, flags: dict[str, bool], truncated: tuple[str, ...]
) -> None:
    async with talking(path, returns({"pid": 1}), exited(exitcode=0, **flags)) as (guest, _):
        done = await guest.run(["x"], deadline=LONG)
    assert done.truncated == truncated
    if truncated:
        with pytest.raises(QmpError, match=f"its {' and '.join(truncated)} is truncated") as told:
            done.require_whole("m")
        assert told.value.effect == "applied"
    else:
        done.require_whole("m")


@pytest.mark.parametrize(
    "status",
    [
        {"exitcode": 0, "out-data": "abc"},
        {"exitcode": 0, "out-data": "!!!!"},
        {"exitcode": 0, "err-data": "ünï"},
        {"exitcode": 0, "out-data": 7},
        {"exitcode": "x"},
        {"exitcode": None},
        {"signal": []},
    ],
)
async def test_a_status_that_makes_no_sense_is_an_error_not_a_result(path: Path, status: dict[str, Any]) -> None:
    async with talking(path, returns({"pid": 1}), exited(**status)) as (guest, _):
        with pytest.raises(QmpError, match="gave an invalid answer"):
            await guest.run(["x"], deadline=LONG)


async def test_a_program_that_does_not_end_is_waited_for_no_longer_than_the_deadline(path: Path) -> None:
    answers = [returns({"exited": False})] * 1000
    async with talking(path, returns({"pid": 1}), *answers) as (guest, _):
        with anyio.fail_after(LONG), pytest.raises(DeadlinePassed, match=r"/bin/sleep within 0\.1 s") as caught:
            await guest.run(["/bin/sleep", "9"], deadline=0.1)
    assert caught.value.effect == "unknown"


async def test_an_agent_that_falls_silent_is_late_by_the_deadline_of_the_program(path: Path) -> None:
    async with talking(path, returns({"pid": 1}), returns({"exited": False})) as (guest, _):
        with anyio.fail_after(LONG), pytest.raises(DeadlinePassed, match=r"did not finish /bin/sleep within 0\.2 s"):
            await guest.run(["/bin/sleep", "9"], deadline=0.2)


async def test_more_input_than_the_agent_takes_is_refused_before_anything_runs(path: Path) -> None:
    async with talking(path) as (guest, script):
        with pytest.raises(UsageError, match="standard input has 33554433 bytes"):
            await guest.run(["cat"], deadline=LONG, stdin=bytes((32 << 20) + 1))
    assert [name for name, _ in script.asked] == ["guest-sync-delimited"]


async def test_a_closed_port_is_told_and_one_that_opens_is_waited_for(path: Path) -> None:
    """Nobody answers while the port is closed; what was asked meanwhile is answered when it opens."""
    looks: list[bool | None] = [False, False, True]

    async def listens() -> bool | None:
        return looks.pop(0) if len(looks) > 1 else looks[0]

    async with scripted(path, b"", synced) as script:
        async with agent.connect(path, machine="web", deadline=LONG, port=agent.Port(listens, LONG)):
            assert looks == [True]
        assert len(script.asked) == 2
    looks[:] = [False]
    async with scripted(path):
        with anyio.fail_after(LONG), pytest.raises(DeadlinePassed, match="no guest agent runs in machine web") as told:
            async with agent.connect(path, machine="web", deadline=10 * LONG, port=agent.Port(listens, 0.6)):
                pass
    assert told.value.effect == "none"
    looks[:] = [None]  # QEMU does not say
    async with scripted(path):
        with pytest.raises(DeadlinePassed, match=r"did not finish guest-sync within 0\.\d+ s"):
            async with agent.connect(path, machine="web", deadline=0.7, port=agent.Port(listens, 0)):
                pass


async def test_a_program_that_cannot_be_started_is_refused(path: Path) -> None:
    refusal = line({"error": {"class": "GenericError", "desc": "No such file"}})
    async with talking(path, refusal) as (guest, script):
        with pytest.raises(QmpError, match="refused guest-exec: No such file"):
            await guest.run(["nope"], deadline=LONG)
    assert len(script.asked) == 2


# --- bytes made by chance -------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["pid", "desc", "class"]), inner),
    max_leaves=6,
)
STATUS = st.fixed_dictionaries(
    {"exited": st.just(True) | JSON},
    optional={"exitcode": JSON, "signal": JSON, "out-data": JSON | st.just("aGk="), "err-data": JSON},
)
SAID = st.one_of(
    st.binary(max_size=60),
    JSON.map(line),
    JSON.map(returns),
    STATUS.map(returns),
    st.fixed_dictionaries({"error": JSON}).map(line),
    st.sampled_from([b"\xff", b"\n", b"{", b'{"return": 1e400}\n', b"[" * 5000 + b"\n", b'"' + b"9" * 5000 + b"\n"]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=20), st.lists(SAID, min_size=1, max_size=4))
def test_whatever_a_guest_says_is_a_result_or_an_error_of_ours(before: bytes, said: list[bytes]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "agent"
            answers: list[Answer] = [
                lambda request: before + synced(request),
                returns({"pid": 1}),
                b"\n".join([*said, b""]),
                HANG_UP,
            ]
            with anyio.fail_after(LONG):
                async with scripted(path, *answers):
                    try:
                        async with agent.connect(path, machine="web", deadline=0.5) as guest:
                            done = await guest.run(["true"], deadline=0.5)
                    except QmpsnapError as error:
                        told.append(str(error))
                    else:
                        assert 0 <= done.exit_status < 1 << 32

    told: list[str] = []
    anyio.run(run)
    assert all(len(text) < 2000 for text in told)


@pytest.mark.parametrize("code", [-1, 1 << 32, 10**400, "x", None, [], 1e999])
async def test_an_exit_status_that_is_none_is_refused(path: Path, code: Any) -> None:
    status = returns({"exited": True, "exitcode": code})
    async with talking(path, returns({"pid": 1}), status) as (guest, _):
        with pytest.raises(QmpError, match="invalid answer"):
            await guest.run(["true"], deadline=LONG)


async def test_a_refusal_is_quoted_only_so_far(path: Path) -> None:
    async with talking(path, line({"error": {"desc": "x" * 1_000_000, "class": "y" * 1_000_000}})) as (guest, _):
        with pytest.raises(QmpError) as refused:
            await guest.execute("guest-ping")
        assert len(str(refused.value)) < 1000
        assert len(refused.value.qmp_class or "") < 1000


# --- file systems ---------------------------------------------------------------------------------------------------


async def test_freeze_thaw_and_status_are_numbers_and_words(path: Path) -> None:
    async with talking(path, returns(3), returns("frozen"), returns(3), returns("thawed")) as (guest, script):
        assert await guest.freeze(deadline=LONG) == 3
        assert await guest.freeze_status(deadline=LONG) == "frozen"
        assert await guest.thaw(deadline=LONG) == 3
        assert await guest.freeze_status(deadline=LONG) == "thawed"
    assert [command for command, _ in script.asked[1:]] == [
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-status",
        "guest-fsfreeze-thaw",
        "guest-fsfreeze-status",
    ]


async def test_a_trim_tells_of_each_file_system(path: Path) -> None:
    said = {"paths": [{"path": "/", "trimmed": 4096, "minimum": 0}, {"path": "/boot", "error": "no"}]}
    async with talking(path, returns(said)) as (guest, script):
        found = await guest.fstrim(minimum=512, deadline=LONG)
    assert found == (Trimmed(path="/", trimmed=4096), Trimmed(path="/boot", error="no"))
    assert script.asked[1:] == [("guest-fstrim", {"minimum": 512})]


NO_JSON_OF_OURS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "paths", "trimmed"]), inner),
    max_leaves=8,
)


@given(said=NO_JSON_OF_OURS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_answer_is_an_error_and_nothing_else(tmp_path: Path, said: Any) -> None:
    async def ask() -> None:
        answers = [returns(said)] * 4
        async with talking(tmp_path / "agent", *answers) as (guest, _):
            for command in (guest.freeze, guest.thaw, guest.freeze_status, guest.fstrim):
                try:
                    found: object = await command(deadline=LONG)
                except QmpError as error:
                    assert error.effect == "unknown"  # noqa: PT017 - most are errors, some happen to make sense
                else:
                    assert (
                        (isinstance(found, int) and 0 <= found <= agent.MOUNTS_LIMIT)
                        or found
                        in (
                            "frozen",
                            "thawed",
                        )
                        or isinstance(found, tuple)
                    )

    anyio.run(ask)
