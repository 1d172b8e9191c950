"""The API for programs without asyncio: the same names without ``await``.

::

    with qmpsnap.sync.open() as q:
        vm = q.define("machine.yaml", exist_ok=True)
        vm.start()
        before = vm.snapshot("before")
        vm.run("apt-get -y dist-upgrade", timeout=1800)
        vm.revert(before)

A controller has one event loop in a thread of its own. Every call waits for its end; Ctrl-C cancels it there, and is
raised once it has ended. Several threads may use one controller. ``report`` is called in the loop's thread.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from anyio.from_thread import start_blocking_portal

from qmpsnap.api.controller import open_controller
from qmpsnap.sync.controller import Controller
from qmpsnap.sync.machine import MachineHandle
from qmpsnap.sync.pool import ForkPool
from qmpsnap.sync.runner import Runner

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

__all__ = ["Controller", "ForkPool", "MachineHandle", "open"]


@contextmanager
def open(  # noqa: A001 - reads as qmpsnap.sync.open()
    home: str | os.PathLike[str] | None = None, *, secrets: Mapping[str, bytes] | None = None
) -> Iterator[Controller]:
    """A controller for the block, as :func:`qmpsnap.open`."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(open_controller(home, secrets=secrets)) as controller,
    ):
        yield Controller(Runner(portal), controller)
