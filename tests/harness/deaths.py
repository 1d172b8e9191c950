"""A controller in a process of its own that dies with kill -9, or is stopped, at the step or the call it was told.

What dies at every step of every verb, and what must be true afterwards, is in tests/faults. Tests of tests/live come
here with one command line each, for what that grid does not hold: a text, a guard, a machine arranged otherwise.
"""

import contextlib
import importlib
import inspect
import multiprocessing
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from anyio import to_thread
from msgspec import Struct

from qmpsnap.cli.main import main
from tests.harness import watch
from tests.harness.processes import guards, kill_qemus, no_guards

# A server that has everything loaded forks each controller: no process starts from nothing, and none has our threads.
_FORKS = multiprocessing.get_context("forkserver")
_PRELOADED = [__name__]
_FORKS.set_forkserver_preload(_PRELOADED)

STORE = "qmpsnap.store.sqlite.backend"
JOBS = "qmpsnap.qmp.jobs"

WAIT = 100.0
"""Seconds a controller may take to come to its step, or to its end: a busy host must not decide a case."""

Tell = Callable[[str], object]
Die = Callable[[], None]


class Point(Struct, frozen=True):
    """Where to die: at a step of the journal.

    Attributes:
        verb: of the operation whose step it is; empty for any.
        step: its name in the registry; empty for any.
        when: before it is durable, or after.
        nth: the number of the step that fits.
    """

    verb: str
    step: str
    when: watch.When
    nth: int = 1

    def watched(self, tell: Tell, die: Die) -> AbstractContextManager[None]:
        """For the block: every step that is come by is told, and at the one it dies."""
        left = self.nth

        def hook(verb: str, step: str, when: watch.When) -> None:
            nonlocal left
            fits = when == self.when and self.verb in ("", verb) and self.step in ("", step)
            left -= fits
            last = fits and left == 0
            if when == "after" or last:
                tell(f"{verb}\t{step}\n")
            if last:
                die()

        return watch.watching(hook)


class Call(Struct, frozen=True):
    """Where to die: right before or right after the n-th call of one of the product's functions."""

    module: str
    function: str
    when: watch.When
    nth: int

    @contextmanager
    def watched(self, tell: Tell, die: Die) -> Iterator[None]:  # noqa: ARG002 - a call tells nothing
        """For the block: at that call it dies."""
        owner = importlib.import_module(self.module)
        *path, name = self.function.split(".")
        for part in path:
            owner = getattr(owner, part)
        real, left = getattr(owner, name), self.nth

        def comes(when: watch.When) -> None:
            nonlocal left
            if when == self.when:
                left -= 1
                if left == 0:
                    die()

        async def dying_async(*arguments: Any, **rest: Any) -> Any:
            comes("before")
            result = await real(*arguments, **rest)
            comes("after")
            return result

        def dying(*arguments: Any, **rest: Any) -> Any:
            comes("before")
            result = real(*arguments, **rest)
            comes("after")
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, dying_async if inspect.iscoroutinefunction(real) else dying)
            yield


class Life(Struct, frozen=True, kw_only=True):
    """What a controller of its own is to do, and the folder where it tells what it came by.

    ``last`` is the signal that it gets at the point; ``qemu_too``: every QEMU of the test dies right before it does,
    so that no guard comes between; ``guards_too``: those of them that watch die as well, as when the power goes.
    """

    act: Callable[[], object]
    point: Point | Call
    last: signal.Signals
    qemu_too: bool
    guards_too: bool
    environment: Mapping[str, str]
    folder: Path


class Death(Struct):
    """What became of a controller that was to die: the steps it came by, the last one that at which it died.

    ``killed``: a QEMU died with it.
    """

    died: bool
    steps: tuple[tuple[str, str], ...]
    said: str
    killed: bool


class Stopped:
    """A controller that runs one command line, stopped on its way; ``returncode`` and ``stderr`` once it has ended."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid
        self.pid = process.pid
        self.returncode: int | None = None
        self.stderr = ""

    def send_signal(self, number: signal.Signals) -> None:
        """SIGKILL ends it at once, any other is heeded when it goes on."""
        os.kill(self.pid, number)


def preload(module: str) -> None:
    """Have the server load that module as well: it may not have been started yet."""
    _PRELOADED.append(module)
    _FORKS.set_forkserver_preload(_PRELOADED)


async def dies(
    act: Callable[[], object], point: Point | Call, *, qemu_too: bool = False, guards_too: bool = False
) -> Death:
    """Let a controller do it until it comes to the point; then its guards, to their end.

    ``act`` is found by its name in the process of the controller; ``qemu_too`` and ``guards_too`` as :class:`Life`.
    """
    with _born(act, point, signal.SIGKILL, qemu_too=qemu_too, guards_too=guards_too) as (child, folder):
        await to_thread.run_sync(child.join, WAIT)
        died = child.exitcode == -signal.SIGKILL
        if child.exitcode is None:  # it hangs, or the host is too busy: that is no death at its step
            child.kill()
            child.join()
        await no_guards()
        reached = [line.partition("\t") for line in (folder / "steps").read_text().splitlines()]
        steps = tuple((verb, step) for verb, _, step in reached)
        return Death(died, steps, (folder / "2").read_text(), (folder / "killed").exists())


async def die_at(point: Point | Call, *words: str, qemu_too: bool = False) -> None:
    """One command line dies there, and its guards come to their end; ``qemu_too`` as :class:`Life`."""
    death = await dies(partial(_command_line, words), point, qemu_too=qemu_too)
    assert death.died, f"never came to {point}:\n{death.said}"


@asynccontextmanager
async def stopped_at(
    point: Point | Call, *words: str, first: Callable[[], object] | None = None
) -> AsyncIterator[Stopped]:
    """For the block: one command line, stopped there (SIGSTOP); then it goes on to its end.

    Args:
        point: where.
        words: the command line.
        first: what its process does before all else.
    """
    with _born(partial(_command_line, words, first), point, signal.SIGSTOP) as (child, folder):
        stopped = Stopped(child)
        with anyio.fail_after(WAIT):
            while child.is_alive() and psutil.Process(stopped.pid).status() != psutil.STATUS_STOPPED:
                await anyio.sleep(0.02)
        assert child.is_alive(), f"never came to {point}:\n{(folder / '2').read_text()}"
        try:
            yield stopped
        finally:
            with contextlib.suppress(ProcessLookupError):  # the block may have killed it
                stopped.send_signal(signal.SIGCONT)
            await to_thread.run_sync(child.join, WAIT)
            stopped.returncode, stopped.stderr = child.exitcode, (folder / "2").read_text()


@contextmanager
def _born(
    act: Callable[[], object],
    point: Point | Call,
    last: signal.Signals,
    *,
    qemu_too: bool = False,
    guards_too: bool = False,
) -> Iterator[tuple[ForkServerProcess, Path]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("steps", "1", "2"):
            (folder / file).touch()
        life = Life(
            act=act,
            point=point,
            last=last,
            qemu_too=qemu_too,
            guards_too=guards_too,
            environment=dict(os.environ),
            folder=folder,
        )
        child = _FORKS.Process(target=_live_until, args=(life,))
        child.start()
        try:
            yield child, folder
        finally:
            if child.is_alive():
                child.kill()
                child.join()


def _live_until(life: Life) -> None:
    os.environ.clear()
    os.environ.update(life.environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
    for descriptor in (1, 2):
        os.dup2(os.open(life.folder / str(descriptor), os.O_WRONLY | os.O_APPEND), descriptor)
    with (life.folder / "steps").open("a", buffering=1) as told:

        def die() -> None:
            if life.qemu_too and kill_qemus(Path(os.environ["QMPSNAP_HOME"])):
                (life.folder / "killed").touch()
            for watching in guards() if life.guards_too else ():
                watching.kill()
            signal.raise_signal(life.last)  # to this very thread: a stop of the process lets it run on for a moment

        with life.point.watched(told.write, die):
            life.act()


def _command_line(words: tuple[str, ...], first: Callable[[], object] | None = None) -> None:
    if first:
        first()
    raise SystemExit(main(list(words)))
