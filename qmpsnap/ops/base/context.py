"""What every verb works with, and the frame it works in: lock held, host checked, earlier operations ended."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Self, TypeVar

import anyio
from anyio import lowlevel
from msgspec import Struct, field
from msgspec.structs import replace

from qmpsnap.block.image.create import ImageTool
from qmpsnap.errors import ForeignHost, QemuGone, QmpsnapError, StateError, StorageHangs, StoreMismatch
from qmpsnap.hint import call
from qmpsnap.host import descriptors
from qmpsnap.host.outstanding import covered, covering, left
from qmpsnap.host.threads import to_end
from qmpsnap.machine import adopted
from qmpsnap.machine.qemu import monitor, unless_ending
from qmpsnap.machine.starting import alive, logs
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting.privileges import RunAs, make_private
from qmpsnap.machine.starting.run_files import QMP_SOCKET, USER_SOCKET
from qmpsnap.machine.watch import watching
from qmpsnap.model.home import Home
from qmpsnap.model.machines.record import Machine, Process
from qmpsnap.model.machines.secret import Secret, given
from qmpsnap.model.planning.expectation import Expectation
from qmpsnap.model.timestamps import moment
from qmpsnap.ops.base import home_location
from qmpsnap.ops.base.async_store import AsyncStore, blocking
from qmpsnap.qmp.session import Monitor
from qmpsnap.store import lock, owner, runfolder
from qmpsnap.store.lock import machine_lock
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.store import Store

T = TypeVar("T")


class Programs(Struct, frozen=True):
    """The programs that we run: the QEMU binary, and qemu-img."""

    qemu: str
    image: ImageTool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """By ``QMPSNAP_QEMU`` and ``QMPSNAP_QEMU_IMG``."""
        image = ImageTool(environment.get("QMPSNAP_QEMU_IMG") or "qemu-img")
        return cls(environment.get("QMPSNAP_QEMU") or "qemu-system-x86_64", image)


class Context(Struct, frozen=True, kw_only=True):
    """One user's qmpsnap on one host.

    ``host`` is this one's name, as recorded with the machines it owns. ``secrets``: keys of encrypted disks that the
    program gave, by ``machine/disk``. ``run_as``: whom root's QEMU is to run as, None for root. ``moved_from``: where
    the store believed its home to lie when it was opened, if that is elsewhere. ``planning``: held by the verb whose
    plan is being made, as two that are made at once would be given the same number. ``expects``: what a plan was made
    of, by which it is applied.
    """

    home: Home
    store: Store
    qemu: str
    image: ImageTool
    host: str
    secrets: Mapping[str, Secret] = MappingProxyType({})
    run_as: RunAs | None = None
    moved_from: str | None = None
    planning: anyio.Lock = field(default_factory=anyio.Lock)
    expects: Expectation | None = None

    @property
    def astore(self) -> AsyncStore:
        """The store, for ``await``."""
        return AsyncStore(self.store)

    def process(self, machine: Machine) -> Process | None:
        """The machine's live QEMU, or None; one that works for the home which this is a copy of is not ours."""
        return processes.find(machine, self.home.run_dir(machine.name), not_of=self.moved_from)

    @asynccontextmanager
    async def monitor(self, machine: Machine, *, look: bool = False) -> AsyncIterator[Monitor | None]:
        """A session with the machine's QEMU, or None when it is stopped.

        ``look``: only to ask: while somebody works on the machine, and has its monitor, by the one that is the user's.
        """
        process = await unless_ending(self.process(machine))
        if process is None:
            yield None
            return
        if covered() is None:  # else that was done as its lock was taken
            await to_end(logs.bound, self.home, machine.name)
        try:
            async with self._session(machine, process, look=look) as qemu:
                yield qemu
        except QemuGone as error:
            if alive.is_alive(process):
                self._explain(error, machine, process)
                raise
            if not error.hint:
                raise
            error.hint = "QEMU has ended: " + call("start", machine.name) + f"; its output is in {_log(self, machine)}"
            if machine.adopted and not machine.adopted.taken:
                error.hint = "QEMU has ended; launch it again as before"
            raise

    def _explain(self, error: QemuGone, machine: Machine, process: Process) -> None:
        """Say where the sockets are of a QEMU that runs, where that is not the run folder in which we look for them."""
        folder = None if machine.adopted else processes.folder(process)
        if folder is None or folder == self.home.run_dir(machine.name):
            return
        error.hint = f"its QEMU runs (process {process.pid}) with its sockets in {folder}: set QMPSNAP_HOME or"
        error.hint += " XDG_RUNTIME_DIR as when it was started"
        if not folder.is_dir():
            error.hint = f"its QEMU runs (process {process.pid}), but the folder of its sockets was removed; end it: "
            error.hint += call("stop", machine.name, force=True)

    def _session(self, machine: Machine, process: Process, *, look: bool) -> AbstractAsyncContextManager[Monitor]:
        machine = replace(machine, process=process)  # names are of this process alone
        if machine.adopted:
            return adopted.monitor(machine, machine.adopted, process)
        busy = look and lock.holder(self.home.lock(machine.name))
        socket = USER_SOCKET if busy else QMP_SOCKET
        return adopted.own_monitor(monitor(machine, self.home.run_dir(machine.name), socket=socket), machine)


@asynccontextmanager
async def opened(
    home: str | os.PathLike[str] | None = None,
    *,
    secrets: Mapping[str, bytes] | None = None,
    make: bool = True,
) -> AsyncIterator[Context]:
    """The context of a home, its store open for the block; see :func:`qmpsnap.open`.

    Without ``make`` a home that is not there is one without machines.

    Raises:
        UsageError: a key cannot be used, or ``QMPSNAP_RUN_AS`` names nobody as whom QEMU could be run.
        StoreTooNew: a newer qmpsnap wrote the store.
        HostCannot: the store cannot be opened.
        HomeUntrusted: another user can write to the home.
    """
    descriptors.fill()  # a program that uses us may have closed one, and images are opened from here on
    environment = dict(os.environ)
    if home is not None:
        environment["QMPSNAP_HOME"] = os.fspath(home)
    run_as = RunAs.from_environment(environment)
    keys, programs = given(secrets or {}), Programs.from_environment(environment)
    places = Home.from_environment(environment, uid=os.geteuid())
    places, store = await to_end(_open_store, places, make)
    try:
        settled = await blocking(lambda: runfolder.settled(places, in_use=lambda: _in_use(store)))
        await blocking(owner.require, settled.run)
        yield Context(
            home=settled,
            store=store,
            qemu=programs.qemu,
            image=programs.image,
            host=this_host(),
            secrets=keys,
            run_as=run_as,
            moved_from=await blocking(home_location.recorded_elsewhere, places, store, this_host()),
        )
    finally:
        if not left():  # else one of the threads may have it, and closing would wait for that
            store.close()


def _open_store(home: Home, make: bool) -> tuple[Home, SqliteStore]:  # noqa: FBT001
    store = SqliteStore(home.store, machines=home.machines, make=make)
    places = home
    with contextlib.suppress(QmpsnapError):  # a damaged store is reported by the caller that needs it
        places = home_location.named(home, home_location.recorded(home, store))
    if places != home:
        store.close()
        store = SqliteStore(places.store, machines=places.machines)
    with contextlib.suppress(QmpsnapError):  # what can only be read, or is damaged, is so for each who needs it
        store.follow_devices()
    return places, store


def _in_use(store: Store) -> Path | None:
    """The run folder in which a QEMU of the store works now."""
    for machine in store.machines():
        if machine.process and not machine.adopted and alive.is_alive(machine.process):
            folder = processes.folder(machine.process)
            if folder and folder.name == machine.name:
                return folder.parent
    return None


def _log(context: Context, machine: Machine) -> str:
    return str(context.home.log_dir(machine.name) / logs.QEMU_LOG)


@asynccontextmanager
async def in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave a context manager that waits for a disk, without holding the event loop up."""
    value = await to_end(manager.__enter__)
    try:
        yield value
    except BaseException as error:
        manager.__exit__(type(error), error, error.__traceback__)
        raise
    manager.__exit__(None, None, None)


@asynccontextmanager
async def locked(
    context: Context, name: str, verb: str, *, anywhere: bool = False, before: Callable[[], object] = int
) -> AsyncIterator[None]:
    """Hold the lock of a machine, which need not exist yet; what is called ``before`` may refuse that.

    Raises:
        LockHeld: another controller works on it.
        OperationPending: storage hung while one did, and its thread has not come back.
        StorageHangs: it does so now; the lock is held on until the thread is back.
        StoreMismatch: the home was moved or copied, and has not been relocated.
    """
    from qmpsnap.ops.base import relocate  # which takes the locks of all machines, and does not wait for ours

    def is_ready() -> bool:
        before()
        if not anywhere:
            if relocate.is_open(context):
                return False
            home_location.require_here(context.home, context.store, context.host)
        make_private(context.home.run_dir(name), "run folder")
        logs.bound(context.home, name)  # by a lock of its own
        return True

    while not await blocking(is_ready):
        await relocate.go_on(context)
    with covering() as cover, machine_lock(context.home.lock(name), machine=name, verb=verb, cover=cover):
        try:
            yield
        except StorageHangs as error:
            error.machine = name
            if error.effect == "unknown":
                error.hint = "once that storage answers, " + call("recover", name)
            raise
    await lowlevel.checkpoint()  # a cancellation during the last thread's work is delivered here, not elsewhere


def forget_places(home: Home, name: str, *, run: bool = True) -> None:
    """Remove the lock and, with ``run``, run folder and logs of a machine that is none, or no more; its lock is held.

    The lock is removed last: a process that waits for it checks again what it locked.
    """
    import shutil

    if run:
        shutil.rmtree(home.run_dir(name), ignore_errors=True)
        shutil.rmtree(home.log_dir(name), ignore_errors=True)
    home.lock(name).unlink(missing_ok=True)


@asynccontextmanager
async def guarded(context: Context, machine: Machine, *, when: bool) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """For the block: a guest that we pause in it is resumed even if we die; unless ``when``, there is no guard.

    Yields :meth:`qmpsnap.machine.watch.Watch.ready`, to be awaited before the guest is paused; until then the guard
    starts beside the block.
    """
    if not when:
        yield lowlevel.checkpoint
        return
    home = context.home
    async with watching(machine.name, run_dir=home.run_dir(machine.name), environment=home.environment) as guard:
        yield guard.ready


def require_own(context: Context, machine: Machine) -> None:
    """Raise ``ForeignHost`` when the machine is another host's."""
    if machine.host != context.host:
        since = moment(machine.created)
        raise ForeignHost(
            f"machine {machine.name} belongs to host {machine.host} since {since}; this host is {context.host}",
            hint=f"try again on {machine.host}",
            machine=machine.name,
        )


def require_folder(home: Home, machine: str) -> None:
    """Refuse a machine whose folder is another one by now: new layers would go there, and others be looked for."""
    folder = home.machine_dir(machine)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StoreMismatch(
            f"the folder {folder} of machine {machine} was replaced by a link or a file",
            hint=f"put the folder back; to keep images elsewhere, link or mount {home.machines} as a whole",
            machine=machine,
        )


def require_spec(machine: Machine, what: str) -> None:
    """Refuse what takes a QEMU that we can start, for a machine that was adopted."""
    if machine.adopted and machine.adopted.taken:
        raise StateError(
            f"the QEMU of machine {machine.name} was launched by its owner: until it has ended, qmpsnap cannot {what}",
            hint="end it: " + call("stop", machine.name),
            machine=machine.name,
        )
    if machine.adopted:
        raise StateError(
            f"machine {machine.name} was adopted: qmpsnap does not launch its QEMU, has no spec of it and"
            f" cannot {what}",
            hint="let qmpsnap launch it: "
            + call("take", machine.name, spec="SPEC")
            + "; or launch it on the active layers that "
            + call("chains", machine.name)
            + " shows",
            machine=machine.name,
        )


def this_host() -> str:
    """This host's name in the store."""
    return os.uname().nodename
