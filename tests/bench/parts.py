"""``scripts/bench parts``: where a library call spends its time, by what it waits for, and a command's start.

Waiting is added up over the call's tasks and threads: what is done at the same time counts twice.
"""

import argparse
import os
import sqlite3
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.qmp import session
from tests.bench import guests, loading, merging, page
from tests.bench.program import fill, say

QMP, EVENTS = "QMP", "jobs and events"
PARTS = (QMP, EVENTS, "SQL", "fsync", "removal", "programs")
DEPTHS = (1, 10, 100, 200)
Call = Callable[[], Awaitable[object]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What ``parts`` takes."""
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="times each is run (10)")
    parser.add_argument("--write", action="store_true", help="write the other tables of docs/performance.md anew")


def run(folder: Path, given: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    found: dict[str, Mapping[str, float]] = {}
    random = folder / "random"
    fill(random, merging.MIB)
    anyio.run(_measure, given.rounds, random, found)
    text = table(found) + "\n" + loading.table(given.rounds)
    print(text, end="")
    if given.write:
        page.put("parts", text)
    return 0


async def _measure(rounds: int, random: Path, found: dict[str, Mapping[str, float]]) -> None:
    with _accounts() as spent:
        async with qmpsnap.open() as q:
            await _calls(q, rounds, spent, found)
            for verb in ("commit", "stream"):
                found[f"{verb} of 1 GiB"] = await _large(q, verb, random, max(2, rounds // 3), spent)


async def _calls(
    q: qmpsnap.Controller, rounds: int, spent: dict[str, float], found: dict[str, Mapping[str, float]]
) -> None:
    async with guests.started(q, guests.still("deep")) as vm:
        depth = 1
        for wanted in DEPTHS:
            while depth < wanted:
                await vm.add_layers()
                depth += 1
            found[f"snapshot of the disks, depth {wanted}"] = await _parts(
                spent, rounds, lambda: vm.snapshot("s"), lambda: vm.delete_snapshots("s")
            )
    async with guests.started(q, guests.still("merged")) as merged:
        for verb, call in (("commit", merged.commit), ("stream", merged.stream)):
            found[f"{verb} of an empty layer"] = await _parts(
                spent, rounds, partial(call, "vda"), merged.add_layers, first=merged.add_layers
            )
    vm = await q.define(guests.still("starts"))
    found["start under -S"] = await _parts(spent, rounds, lambda: vm.start(paused=True), lambda: vm.stop(force=True))
    async with guests.booted(q, "guest") as booted:
        found["full snapshot"] = await _parts(
            spent, max(2, rounds // 3), lambda: booted.snapshot("s", kind="full"), lambda: booted.delete_snapshots("s")
        )
        await booted.snapshot("kept", kind="full")
        found["revert to it"] = await _parts(
            spent,
            max(2, rounds // 3),
            lambda: booted.revert("kept", discard=True, after=False),
            lambda: booted.stop(force=True),
            first=lambda: booted.stop(force=True),
        )


async def _parts(
    spent: dict[str, float], rounds: int, call: Call, undo: Call, *, first: Call | None = None
) -> Mapping[str, float]:
    """Medians in milliseconds, by part; the first round is not counted."""
    if first:
        await first()
    samples: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        spent.clear()
        since = time.monotonic()
        await call()
        samples.append({**spent, "in all": time.monotonic() - since})
        await undo()
    say(".")
    return {
        part: statistics.median(sample.get(part, 0) * 1000 for sample in samples[1:]) for part in ("in all", *PARTS)
    }


async def _large(
    q: qmpsnap.Controller, verb: str, random: Path, rounds: int, spent: dict[str, float]
) -> Mapping[str, float]:
    made: list[qmpsnap.MachineHandle] = []

    async def make() -> None:
        made.append((await merging.started(q, verb, random))[0])

    async def anew() -> None:
        vm = made.pop()
        await vm.stop(force=True)
        await vm.undefine(disks="remove")
        await make()

    def call() -> Awaitable[object]:
        return made[-1].commit("vda") if verb == "commit" else made[-1].stream("vda")

    took = await _parts(spent, rounds, call, anew, first=make)
    await made[-1].stop(force=True)
    await made[-1].undefine(disks="remove")
    return took


@contextmanager
def _accounts() -> Iterator[dict[str, float]]:
    """Seconds spent in each part, by all tasks and threads."""
    spent: dict[str, float] = {}

    def add(part: str, since: float) -> None:
        spent[part] = spent.get(part, 0) + time.monotonic() - since

    @contextmanager
    def on(part: str) -> Iterator[None]:
        since = time.monotonic()
        try:
            yield
        finally:
            add(part, since)

    def timed(part: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with on(part):
                return real(*arguments, **options)

        return call

    def awaited(part: str, real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **options: Any) -> Any:
            with on(part):
                return await real(*arguments, **options)

        return call

    @asynccontextmanager
    async def connect(*arguments: Any, **options: Any) -> AsyncIterator[session.Session]:
        since = time.monotonic()
        async with real_connect(*arguments, **options) as found:
            add(QMP, since)
            yield found

    class Connection(sqlite3.Connection):
        execute = timed("SQL", sqlite3.Connection.execute)

    real_connect, real_open = session.connect, sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "execute", awaited(QMP, session.Session.execute))
        patch.setattr(session._EventBell, "wait", awaited(EVENTS, session._EventBell.wait))
        patch.setattr(session, "connect", connect)
        patch.setattr(sqlite3, "connect", lambda *a, **o: real_open(*a, **{**o, "factory": Connection}))
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, timed("fsync", getattr(os, name)))
        patch.setattr(os, "unlink", timed("removal", os.unlink))
        patch.setattr(subprocess.Popen, "__init__", timed("programs", subprocess.Popen.__init__))
        yield spent


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The results as the page has them, in milliseconds."""
    heads = ("library call", "in all", *PARTS, "rest")
    rows = [heads, ("---",) * len(heads)]
    for call, took in found.items():
        rest = took["in all"] - sum(took[part] for part in PARTS)
        rows.append((call, *(f"{took[part]:.1f}" for part in ("in all", *PARTS)), f"{max(0, rest):.1f}"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
