"""Deaths with kill -9: of a controller in a process of its own, at the step it was told, and of QEMUs."""

import contextlib
import importlib
import inspect
import multiprocessing
import os
import select
import signal
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import psutil
import pytest
from anyio import to_thread
from msgspec import Struct

import qmpsnap
from qmpsnap.machine import worker
from qmpsnap.machine.argv import PID_FILE
from qmpsnap.model.home import Home
from tests.faults import filters, mutants, watch
from tests.faults.scenarios import SCENARIOS
from tests.faults.site import NAME, TWO
from tests.live.crash import no_guards
from tests.live.machine import context_of

# A server that has everything loaded forks each controller: no process starts from nothing, and none has our threads.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.faults.deaths"])

KILLED = "QEMU killed"
"""What a controller says before it dies that has killed one."""
WAIT = 100.0
"""Seconds a controller may take to come to its step, or to its end: a busy host must not decide a case."""
ENVIRONMENT = ("QMPSNAP_HOME", "QMPSNAP_QEMU", "QMPSNAP_QEMU_IMG", "QMPSNAP_IMAGES", mutants.VARIABLE)


class Point(Struct, frozen=True):
    """Where to die.

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


class Call(Struct, frozen=True):
    """The n-th call of one of the product's functions, right before or right after which to die."""

    module: str
    function: str
    when: watch.When
    nth: int


class Life(Struct, frozen=True, kw_only=True):
    """What a controller of its own is to do, and where it tells what it came by.

    ``logs`` is where QEMU logs the writes to the layers that it opens; ``qemu_too``: every QEMU of the machine dies
    right before the controller does, so that no guard comes between.
    """

    scenario: str
    place: Path
    point: Point | Call
    recovering: bool
    environment: Mapping[str, str]
    told: Path
    logs: Path | None
    qemu_too: bool


class Death(Struct):
    """What became of a controller that was to die: the steps it came by, the last one that at which it died.

    ``killed``: a QEMU died with it.
    """

    died: bool
    steps: tuple[tuple[str, str], ...]
    said: str
    killed: bool


async def controller_dies(
    scenario: str,
    place: Path,
    point: Point | Call,
    *,
    recovering: bool = False,
    logs: Path | None = None,
    qemu_too: bool = False,
) -> Death:
    """Let a controller do a scenario's verb, or recover, until it comes to the point; then its guards, to their end.

    ``logs`` and ``qemu_too`` as :class:`Life`.
    """
    home = Path(os.environ["QMPSNAP_HOME"])
    told = home / "told"
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    life = Life(
        scenario=scenario,
        place=place,
        point=point,
        recovering=recovering,
        environment=environment,
        told=told,
        logs=logs,
        qemu_too=qemu_too,
    )
    child = _FORKS.Process(target=_live_until, args=(life,))
    child.start()
    await to_thread.run_sync(child.join, WAIT)
    died = child.exitcode == -signal.SIGKILL
    if child.exitcode is None:  # it hangs, or the host is too busy: that is no death at its step
        child.kill()
        child.join()
    await no_guards()
    lines = told.read_text().splitlines() if told.exists() else []
    told.unlink(missing_ok=True)
    reached = [line.split("\t", 2)[1:] for line in lines if line.startswith("step\t")]
    said = "\n".join(line for line in lines if not line.startswith(("step\t", KILLED)))
    return Death(died, tuple((verb, step) for verb, step in reached), said, KILLED in lines)


def _live_until(life: Life) -> None:
    os.environ.update(life.environment)
    mutants.apply()
    with life.told.open("a", buffering=1) as file:
        try:

            def die() -> None:
                if life.qemu_too and _kill_all(_run_dir()):
                    file.write(f"{KILLED}\n")
                os.kill(os.getpid(), signal.SIGKILL)

            dying = _at_step(life.point, file, die) if isinstance(life.point, Point) else _at_call(life.point, die)
            with dying, filters.logging(life.logs) if life.logs else contextlib.nullcontext():
                anyio.run(_act, life)
        except BaseException:  # noqa: BLE001 - a death that did not come is told, whatever came instead
            file.write(traceback.format_exc())
            os._exit(1)


def _run_dir() -> Path:
    return Home.from_environment(os.environ, uid=os.geteuid()).run_dir(NAME)


def _at_step(point: Point, told: IO[str], die: Callable[[], None]) -> AbstractContextManager[None]:
    left = point.nth

    def hook(verb: str, step: str, when: watch.When) -> None:
        nonlocal left
        fits = when == point.when and point.verb in ("", verb) and point.step in ("", step)
        left -= fits
        last = fits and left == 0
        if when == "after" or last:
            told.write(f"step\t{verb}\t{step}\n")
        if last:
            die()

    return watch.watching(hook)


@contextmanager
def _at_call(call: Call, die: Callable[[], None]) -> Iterator[None]:
    owner = importlib.import_module(call.module)
    *path, name = call.function.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, left = getattr(owner, name), call.nth

    def comes(when: watch.When) -> None:
        nonlocal left
        if when == call.when:
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


async def _act(life: Life) -> None:
    async with qmpsnap.open() as q:
        if life.scenario == "define":
            await q.define(TWO)
            return
        vm = await q.machine(NAME)
        if life.recovering:
            await vm.recover()
        else:
            await SCENARIOS[life.scenario].act(vm, life.place)


def qemus(run_dir: Path) -> list[int]:
    """The machine's QEMU and its worker, those that run; found without the store, which may be in the middle of it."""
    found = []
    for folder in (run_dir, run_dir / worker.FOLDER):
        with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
            process = psutil.Process(int((folder / PID_FILE).read_text()))
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process.pid)
    return found


def kill_qemu(vm: qmpsnap.MachineHandle) -> bool:
    """Kill the machine's QEMU and its worker, and see them end; whether there was one."""
    return _kill_all(context_of(vm).home.run_dir(vm.name))


def _kill_all(run_dir: Path) -> bool:
    found = qemus(run_dir)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
        _see_end(pid)
    return bool(found)


def _see_end(pid: int) -> None:
    """Until its last thread has ended: the first is a zombie before that, and the images are open still."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], 10)[0], f"process {pid} does not end"
        finally:
            os.close(descriptor)


async def ends_by_itself(act: Callable[[], Awaitable[object]]) -> str:
    """Do it in this process; returns the error it ended with, or nothing. Anything but an error of ours is raised."""
    try:
        with anyio.fail_after(WAIT):
            await act()
    except qmpsnap.QmpsnapError as error:
        return error.code
    return ""
