"""A freeze against a scripted agent, which is not trusted, with the real guard: what counts; a thaw always follows."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import DeadlinePassed, QemuGone, QmpError, QmpsnapError, StateError, UsageError
from qmpsnap.machine.starting.run_files import AGENT_SOCKET
from qmpsnap.model.names import OperationId
from qmpsnap.model.operations.operation import Change, CreatePlan, InternalPlan, Operation, Plan
from qmpsnap.ops.session import quiesce
from qmpsnap.ops.session.quiesce import Freezer, QuiesceRequest
from qmpsnap.store.sqlite.backend import SqliteStore
from tests.ops.bench import BenchContext, FakeQemu, context_on, machine

LONG = 30.0
"""Seconds no test waits for."""

WEB = machine()


class Agent:
    """Answers by command: with bytes as they are, or not at all; ``asked`` are the commands it got."""

    def __init__(self, **answers: bytes) -> None:
        self.answers = {"freeze": b'{"return": 2}\n', "thaw": b'{"return": 2}\n'} | answers
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while said := await reader.readline():
                request = json.loads(said.lstrip(b"\xff"))
                word = request["execute"].rpartition("-")[2]
                if word == "delimited":
                    writer.write(b'\xff{"return": %d}\n' % request["arguments"]["id"])
                else:
                    self.asked.append(word)
                    self.answer(word, writer)
                await writer.drain()
        finally:
            writer.close()

    def answer(self, word: str, writer: asyncio.StreamWriter) -> None:
        writer.write(self.answers[word])


@pytest.fixture
async def context(tmp_path: Path) -> AsyncIterator[BenchContext]:
    with SqliteStore(tmp_path / "qmpsnap.db", machines=tmp_path / "machines") as store:
        found = context_on(store, tmp_path)
        found.home.run_dir("web").mkdir(parents=True)
        yield found


@asynccontextmanager
async def listening(context: BenchContext, agent: Agent) -> AsyncIterator[None]:
    server = await asyncio.start_unix_server(agent.serve, context.home.run_dir("web") / AGENT_SOCKET)
    try:
        yield
    finally:
        server.close()


@asynccontextmanager
async def freezing(context: BenchContext, wish: Any, *, window: float = LONG) -> AsyncIterator[Freezer]:
    with anyio.fail_after(LONG):
        async with quiesce.prepared(context, WEB, FakeQemu({}), QuiesceRequest(wish=wish, window=window)) as freezer:
            yield freezer


async def transact(freezer: Freezer, act: Callable[[], Awaitable[None]]) -> None:
    """As a snapshot does it."""
    async with freezer.frozen():
        with freezer.within():
            await act()


async def test_frozen_before_the_transaction_and_thawed_after_it(context: BenchContext) -> None:
    agent = Agent()
    async with listening(context, agent), freezing(context, "require") as freezer:
        assert agent.asked == []
        async with freezer.frozen():
            with freezer.within():
                assert agent.asked == ["freeze"]
            assert freezer.frozen_ms is None  # it is not over
        assert agent.asked == ["freeze", "thaw"]
        assert (freezer.reached, freezer.why) == (True, "")
        assert freezer.frozen_ms is not None


WRONG = {
    "text": b'{"return": "2"}\n',
    "negative": b'{"return": -1}\n',
    "none": b'{"return": 0}\n',
    "huge": b'{"return": 1000000000000}\n',
    "endless": b'{"return": ' + b"9" * 5000 + b"}\n",
    "truth": b'{"return": true}\n',
    "list": b'{"return": [2]}\n',
    "nothing": b"{}\n",
    "garbage": b"\x00\xfe\n",
    "refusal": b'{"error": {"class": "CommandDisabled", "desc": "not here"}}\n',
}


@pytest.mark.parametrize("said", WRONG)
async def test_an_answer_that_is_none_counts_for_nothing_and_a_thaw_follows(context: BenchContext, said: str) -> None:
    agent = Agent(freeze=WRONG[said])
    async with listening(context, agent):
        async with freezing(context, "require") as freezer:
            with pytest.raises(QmpError) as caught:
                async with freezer.frozen():
                    pytest.fail("that was no freeze")
            assert "--quiesce prefer" in as_typed(caught.value.hint)
        assert agent.asked == ["freeze", "thaw"]
        async with freezing(context, "prefer") as freezer:
            async with freezer.frozen():
                pass
            assert freezer.why
            assert not freezer.reached
        assert agent.asked == ["freeze", "thaw"] * 2


@pytest.mark.parametrize("said", [b"", b'{"return": '], ids=["silent", "half"])
async def test_an_agent_that_never_answers_is_waited_for_no_longer_than_the_window(
    context: BenchContext, said: bytes
) -> None:
    agent = Agent(freeze=said)
    async with listening(context, agent), freezing(context, "require", window=0.2) as freezer:
        with pytest.raises(DeadlinePassed, match=r"did not finish guest-fsfreeze-freeze within 0\.2 s"):
            async with freezer.frozen():
                pytest.fail("that was no freeze")
        assert "thaw" in agent.asked


class HoldsUp(Agent):
    """Gives half an answer, holds us up until the window is over, and then says what the guard would be answered."""

    def answer(self, word: str, writer: asyncio.StreamWriter) -> None:
        super().answer(word, writer)
        if word == "freeze":
            time.sleep(0.3)
            writer.write(b'\xff{"return": 1773407272550795827}\n')


async def test_what_the_guard_is_answered_is_no_answer_to_us(context: BenchContext) -> None:
    agent = HoldsUp(freeze=b'{"return": ')
    async with listening(context, agent), freezing(context, "require", window=0.2) as freezer:
        with pytest.raises(DeadlinePassed, match=r"did not finish guest-fsfreeze-freeze within 0\.2 s"):
            async with freezer.frozen():
                pytest.fail("that was no freeze")
        assert "thaw" in agent.asked


async def test_a_transaction_that_takes_longer_than_the_window_does_not_count(context: BenchContext) -> None:
    agent = Agent()
    async with listening(context, agent):
        async with freezing(context, "require", window=0.2) as freezer:
            with pytest.raises(DeadlinePassed, match="took longer than the freeze window"):
                await transact(freezer, lambda: anyio.sleep(LONG))
        async with freezing(context, "prefer", window=0.2) as freezer:
            await transact(freezer, lambda: anyio.sleep(0.3))
        assert "took longer than the freeze window" in freezer.why


async def test_a_process_that_was_stopped_does_not_take_late_for_in_time(context: BenchContext) -> None:
    async def stopped() -> None:
        time.sleep(0.3)  # noqa: ASYNC251 - as if by SIGSTOP: our own timers do not run either

    async with listening(context, Agent()), freezing(context, "require", window=0.2) as freezer:
        with pytest.raises(DeadlinePassed, match="took longer than the freeze window"):
            await transact(freezer, stopped)


async def test_a_guest_that_somebody_has_thawed_meanwhile_does_not_count(context: BenchContext) -> None:
    async with listening(context, Agent(thaw=b'{"return": 0}\n')), freezing(context, "require") as freezer:
        with pytest.raises(QmpError, match="another client thawed"):
            async with freezer.frozen():
                pass


async def test_nobody_waits_long_for_a_thaw_that_is_not_said(
    context: BenchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiesce, "THAW_DEADLINE", 0.2)
    async with listening(context, Agent(thaw=b"")), freezing(context, "require") as freezer:
        with pytest.raises(DeadlinePassed, match="did not thaw") as caught:
            async with freezer.frozen():
                pass
        assert "keeps trying" in caught.value.hint


async def test_where_the_guard_has_ended_we_thaw_ourselves(
    context: BenchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent()
    async with listening(context, agent), freezing(context, "require") as freezer:
        assert freezer._watch
        freezer._watch.say(b"d")
        assert await freezer._watch.hear(1, deadline=LONG) == b""
        async with freezer.frozen():
            pass
        assert agent.asked == ["freeze", "thaw"]


async def test_the_error_that_matters_is_told_not_that_of_the_thaw(
    context: BenchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiesce, "THAW_DEADLINE", 0.2)
    async with listening(context, Agent(thaw=b"")), freezing(context, "require") as freezer:
        with pytest.raises(QemuGone, match="the matter"):
            async with freezer.frozen():
                raise QemuGone("the matter")


@pytest.mark.parametrize("window", [0, -1, 61, float("nan"), float("inf")])
async def test_a_window_that_is_none(context: BenchContext, window: float) -> None:
    with pytest.raises(UsageError, match="freeze window"):
        async with freezing(context, "require", window=window):
            pytest.fail("that was no window")


async def test_without_an_agent(context: BenchContext) -> None:
    expected: list[tuple[Callable[[], Any], type[QmpsnapError]]] = [
        (lambda: quiesce.prepared(context, WEB, None, QuiesceRequest(wish="require")), StateError),
        (lambda: freezing(context, "require"), QemuGone),
    ]
    for attempt, kind in expected:
        with pytest.raises(kind):
            async with attempt():
                pytest.fail("there is no agent")
    async with freezing(context, "prefer") as freezer, freezer.frozen():
        assert (freezer.wish, freezer.reached) == ("skip", False)
        assert "no agent channel" in freezer.why
    async with freezing(context, "skip") as freezer, freezer.frozen():
        assert (freezer.wish, freezer.why) == ("skip", "")


# --- what recovery makes of it ----------------------------------------------------------------------------------------


def operation(plan: Plan, step: str) -> Operation:
    return Operation(
        id=OperationId(3),
        machine="web",
        verb="create",
        state="running",
        step=step,
        plan=plan,
        started=1,
        updated=1,
        pid=1,
    )


def create_plan(wish: Any) -> CreatePlan:
    return CreatePlan(machine="web", live=True, overlays=(), change=Change(), quiesce=wish)


def internal_plan(wish: Any) -> InternalPlan:
    return InternalPlan(
        machine="web",
        tag="t",
        live=True,
        layers={},
        vmstate=None,
        variables=None,
        resume=False,
        change=Change(),
        quiesce=wish,
    )


@pytest.mark.parametrize(("plan", "step"), [(create_plan, "transaction"), (internal_plan, "started")])
def test_only_what_was_required_is_undone_where_nobody_can_tell(plan: Callable[[Any], Plan], step: str) -> None:
    wishes = ("require", "prefer", "skip")
    assert [quiesce.unproven(operation(plan(wish), step)) for wish in wishes] == [True, False, False]
    assert [quiesce.may_be_frozen(operation(plan(wish), step)) for wish in wishes] == [True, True, False]
    for early_or_late in ("planned", "saving", "recorded"):
        assert not quiesce.unproven(operation(plan("require"), early_or_late))
    assert not quiesce.may_be_frozen(operation(plan("require"), "planned"))
