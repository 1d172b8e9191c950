"""Forks and pools under a controller that lives: cancelled, without space, with a QEMU that is stopped by a signal.

And pools under one that dies. What must be so afterwards is what :mod:`tests.faults.test_fork` demands.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import HostCannot
from qmpsnap.machine import templates
from qmpsnap.ops.fork import run
from qmpsnap.ops.memory.load import Loading, load
from qmpsnap.qmp.session import Monitor
from tests.faults import site
from tests.faults.deaths import POOL, controller_dies
from tests.faults.report import Fault
from tests.faults.test_fork import judge, parent
from tests.faults.test_interrupted import short_deadlines
from tests.faults.test_space import fill, mount
from tests.harness.awaits import Counted
from tests.harness.deaths import Call
from tests.harness.processes import qemus
from tests.live.conftest import _kill_all_below
from tests.live.machine import context_of

AWAITS = (1, 4, 9, 16, 25, 33, 41, 50, 60, 71, 83, 96, 110, 125, 141, 158, 176, 195)


SHORT = {
    ("fork", 50), ("ephemeral fork", 110), ("pool", 2), "the fork's", ("templates", 256), ("everything", 64),
    ("a fork is taken", "controller"),
}  # fmt: skip
"""What the short form has: one of each kind."""


def case(*values: Any) -> Any:
    """A case with its mark."""
    name = "-".join(map(str, values))
    return pytest.param(*values, id=name, marks=pytest.mark.short if {values, values[0]} & SHORT else ())


@asynccontextmanager
async def claiming(vm: qmpsnap.MachineHandle) -> AsyncIterator[list[qmpsnap.QmpsnapError]]:
    """Yields where the error goes that the block ends with; what it says has come of the fork is compared."""
    heard: list[qmpsnap.QmpsnapError] = []
    try:
        yield heard
    except qmpsnap.QmpsnapError as error:
        heard.append(error)
    store = context_of(vm).store
    there = any(found.name == "child" for found in store.machines())
    for failed in heard:
        assert failed.exit_code
        if not store.operations("child", only_open=True):
            assert failed.effect == ("applied" if there else "none"), failed


# --- cancelled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "nth"), [case(form, nth) for form in ("fork", "ephemeral fork") for nth in AWAITS])
async def test_a_fork_is_cancelled_at_an_await(
    q: qmpsnap.Controller, place: Path, fault: Fault, form: str, nth: int
) -> None:
    fault.case("cancelled at an await", "fork")
    vm = await parent(q)
    before = await site.look(vm)
    task = asyncio.current_task()
    assert task
    once = AWAITS.index(nth) % 2  # as asyncio cancels; anyio does so at every await from there on
    count = 0
    with anyio.CancelScope() as scope:
        cancel = task.cancel if once else scope.cancel

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            async def one(*arguments: Any) -> Any:
                nonlocal count
                counting = Counted(real(*arguments), nth, cancel)
                try:
                    return await counting
                finally:
                    count = counting.count

            return one

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_one", counted(run._one))
            try:
                async with claiming(vm):
                    await vm.fork("warm", "child", ephemeral=form == "ephemeral fork")
            except asyncio.CancelledError:
                if not once:
                    raise
                task.uncancel()
    if count < nth:
        fault.too_late()
    await judge(vm, before, form)


@pytest.mark.parametrize(("form", "nth"), [case("pool", nth) for nth in (1, 2, 3, 4, 6, 8)])
async def test_a_pool_is_cancelled_at_an_await(
    q: qmpsnap.Controller, place: Path, fault: Fault, form: str, nth: int
) -> None:
    fault.case("cancelled at an await", "fork")
    vm = await parent(q)
    before = await site.look(vm)

    async def used() -> None:
        assert form == "pool"
        async with vm.pool("warm", size=1, fresh=False) as pool, pool.take():
            pass

    with anyio.CancelScope() as scope:
        counted = Counted(used(), nth, scope.cancel)
        await counted
    if counted.count < nth:
        fault.too_late()
    await only_the_parent(vm)
    await judge(vm, before, "ephemeral fork")


# --- a QEMU is stopped by a signal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [case("the template's"), case("the fork's")])
async def test_qemu_is_stopped(
    q: qmpsnap.Controller, place: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    fault.case("SIGSTOP of QEMU", "fork")
    vm = await parent(q)
    before = await site.look(vm)
    home = context_of(vm).home
    folder = home.run_dir("child") if which == "the fork's" else templates.shelves(home)[0].folder
    stopped: list[int] = []

    async def stopping(qemu: Monitor, loading: Loading) -> None:
        stopped.extend(qemus(folder))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        await load(qemu, loading)

    module = "qmpsnap.ops.lifecycle.power" if which == "the fork's" else "qmpsnap.ops.fork.bake"
    try:
        with monkeypatch.context() as patch, short_deadlines(stopped):
            patch.setattr(f"{module}.load", stopping)
            async with claiming(vm) as failed:
                await vm.fork("warm", "child")
        assert (len(stopped), len(failed)) == (1, 1)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    await judge(vm, before, "fork")


# --- no space ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def crowded(folder: Path, *, free: int) -> AsyncIterator[None]:
    """For the block ``free`` bytes are left there."""
    ballast = fill(folder, free=free)
    try:
        yield
    finally:
        ballast.unlink()


SIZES = {"templates": "80m", "everything": "256m"}
"""A template fits, and the snapshot that it is made of."""


@pytest.fixture
def small(home: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is a small file system of its own: the folder of templates, or the home, with templates elsewhere."""
    if os.geteuid():
        pytest.skip("a small file system can only be mounted by root: this fault is not run")
    elsewhere = Path(tempfile.mkdtemp(prefix="qs-"))
    place = home
    if request.param == "templates":
        place = home / "templates"
        place.mkdir(mode=0o700)
    else:
        monkeypatch.setenv("QMPSNAP_TEMPLATES", str(elsewhere / "templates"))
    mount(place, SIZES[request.param])
    try:
        (home / "elsewhere").mkdir(exist_ok=True)
        yield place
    finally:
        _kill_all_below(home)
        subprocess.run(["umount", "-l", place], check=True)
        shutil.rmtree(elsewhere)


@pytest.mark.parametrize(
    ("small", "free"),
    [case(kind, free) for kind in ("templates", "everything") for free in (0, 64, 256, 1024)],
    indirect=["small"],
)
async def test_no_space(small: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """``free`` KiB are left; of those for templates the others go after they were looked for."""
    fault.case("no space: everything", "fork")
    async with qmpsnap.open() as q:
        vm = await parent(q)
        before = await site.look(vm)
        room, really = iter([1 << 40]), templates.free
        monkeypatch.setattr(templates, "free", lambda folder: next(room, None) or really(folder))
        monkeypatch.setenv(templates.LIMIT, "1G")
        async with crowded(small, free=free << 10), claiming(vm) as failed:
            await vm.fork("warm", "child")
        if not failed:
            fault.too_late()
        elif small.name == "templates":
            assert isinstance(failed[0], HostCannot), failed
        await judge(vm, before, "fork")


# --- pools -----------------------------------------------------------------------------------------------------------

FORKING = "qmpsnap.ops.fork.pool"
POINTS = {
    "a fork is begun": Call(FORKING, "Pool._made", "before", 1),
    "a fork waits": Call(FORKING, "Pool._made", "after", 1),
    "a fork is taken": Call(FORKING, "Pool._let_run", "after", 1),
    "a fork is removed": Call(FORKING, "end", "before", 1),
    "a fork's QEMU has ended": Call("qmpsnap.ops.fork.ephemeral", "remove", "before", 1),
}


async def only_the_parent(vm: qmpsnap.MachineHandle) -> None:
    """Nothing of a pool is left after a command."""
    async with qmpsnap.open() as q:
        assert [found.name for found in await q.machines()] == [vm.name]
    home = context_of(vm).home
    assert [entry.name for entry in home.machines.iterdir()] == [vm.name]
    assert len(qemus(home.data)) == 1


@pytest.mark.parametrize(("at", "death"), [case(at, death) for at in POINTS for death in ("controller", "both")])
async def test_the_controller_of_a_pool_is_killed(
    q: qmpsnap.Controller, place: Path, fault: Fault, at: str, death: str
) -> None:
    fault.case(f"kill -9 between steps: {'controller and QEMU' if death == 'both' else 'controller'}", "fork")
    vm = await parent(q)
    before = await site.look(vm)
    died = await controller_dies(POOL, place, POINTS[at], qemu_too=death == "both")
    assert died.died, died.said
    async with qmpsnap.open() as again:
        await again.machines()
    await judge(vm, before, "ephemeral fork")
    async with qmpsnap.open() as again:
        assert {found.name for found in await again.machines()} <= {vm.name, "child"}
