"""The ways in which a test gets a machine that no other test has touched."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from qmpsnap.errors import QmpsnapError
from qmpsnap.pytest_plugin.session import Settings
from qmpsnap.sync import Controller, MachineHandle
from qmpsnap.sync.pool import ForkPool

WARM = "warm"
"""The snapshot of the machine as it was set up."""
Boot = Callable[[MachineHandle], None]
"""Starts a machine, waits for its agent and sets it up."""


class Source(Protocol):
    """Machines for the tests of one process, one after the other."""

    @property
    def machine(self) -> MachineHandle:
        """The machine that they are made from."""

    def take(self) -> AbstractContextManager[MachineHandle]:
        """A machine for one test, running."""


class Forks:
    """Each test gets a fork, from a pool."""

    def __init__(self, stack: ExitStack, machine: MachineHandle, settings: Settings) -> None:
        self.machine = machine
        self._stack = stack
        self._size, self._fresh = settings.pool, machine.record().spec.agent
        self._pool = self._opened()

    def _opened(self) -> ForkPool:
        return self._stack.enter_context(self.machine.pool(WARM, size=self._size, fresh=self._fresh))

    @contextmanager
    def take(self) -> Iterator[MachineHandle]:
        """A fork, which is removed afterwards."""
        with ExitStack() as stack:
            yield self._taken(stack)

    def _taken(self, stack: ExitStack) -> MachineHandle:
        try:
            return stack.enter_context(self._pool.take())
        except QmpsnapError:  # a pool makes no forks any more once one has failed
            self._stack.close()
            self._pool = self._opened()
            return stack.enter_context(self._pool.take())


class Same:
    """Each test gets the same machine, taken back to its snapshot."""

    def __init__(self, machine: MachineHandle) -> None:
        self.machine = machine

    @contextmanager
    def take(self) -> Iterator[MachineHandle]:
        """The machine; what the last test has made of it is undone."""
        self._remove_others()
        self.machine.revert(WARM, discard=True, state="running")
        yield self.machine

    def _remove_others(self) -> None:
        if others := [found for found in self.machine.snapshots() if found.name != WARM]:
            self.machine.delete_snapshots(*others)


class Booted:
    """Each test gets a machine that has just booted."""

    def __init__(self, machine: MachineHandle, anew: Callable[[], MachineHandle]) -> None:
        self.machine = machine
        self._anew = anew

    @contextmanager
    def take(self) -> Iterator[MachineHandle]:
        """A new machine of the same name, in the place of the last one."""
        remove(self.machine)
        self.machine = self._anew()
        yield self.machine


def remove(machine: MachineHandle) -> None:
    """All of a machine, which may run."""
    if machine.is_running():
        machine.stop(force=True)
    machine.undefine(disks="remove")


def _end(machine: MachineHandle) -> None:
    with contextlib.suppress(QmpsnapError):
        machine.stop(force=True)


def own(way: str, stack: ExitStack, q: Controller, define: Callable[[Controller], MachineHandle], boot: Boot) -> Source:
    """A machine of this process alone.

    Raises:
        QmpsnapError: this way is not possible.
    """

    def anew() -> MachineHandle:
        machine = define(q)
        boot(machine)
        return machine

    machine = anew()
    stack.callback(_end, machine)
    if way == "boot":
        return Booted(machine, anew)
    try:
        if way == "load":
            machine.snapshot(WARM, kind="internal")
            machine.revert(WARM, discard=True)
        else:
            machine.snapshot(WARM, kind="full")
    except QmpsnapError:
        remove(machine)
        raise
    return Same(machine)
