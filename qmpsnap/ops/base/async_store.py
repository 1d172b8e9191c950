"""The store as async code calls it: each call runs in a worker thread, to its end."""

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from anyio import lowlevel
from msgspec import Struct

from qmpsnap.host.threads import to_end
from qmpsnap.store.store import Store

P = ParamSpec("P")
T = TypeVar("T")


async def blocking(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run a call that waits for a disk in a worker thread, to its end; a pending cancellation is delivered afterwards.

    The caller may ask it what was done: a thread that was left alone could record something nobody knows of.
    """
    found = await to_end(lambda: call(*arguments, **named))
    await lowlevel.checkpoint()
    return found


def _threaded(
    call: Callable[Concatenate[Store, P], T],
) -> Callable[Concatenate["AsyncStore", P], Coroutine[Any, Any, T]]:
    async def run(self: "AsyncStore", /, *arguments: P.args, **named: P.kwargs) -> T:
        return await blocking(getattr(self.store, call.__name__), *arguments, **named)

    return run


class AsyncStore(Struct, frozen=True):
    """The calls of a :class:`qmpsnap.store.store.Store`, by the same names."""

    store: Store

    apply = _threaded(Store.apply)
    basis = _threaded(Store.basis)
    chains = _threaded(Store.chains)
    ephemeral = _threaded(Store.ephemeral)
    follow_devices = _threaded(Store.follow_devices)
    forest = _threaded(Store.forest)
    forest_around = _threaded(Store.forest_around)
    forest_below = _threaded(Store.forest_below)
    forget = _threaded(Store.forget)
    layer = _threaded(Store.layer)
    layer_at = _threaded(Store.layer_at)
    layers = _threaded(Store.layers)
    layers_of_file = _threaded(Store.layers_of_file)
    machine = _threaded(Store.machine)
    machines = _threaded(Store.machines)
    mark = _threaded(Store.mark)
    next_serial = _threaded(Store.next_serial)
    open_operation = _threaded(Store.open_operation)
    operations = _threaded(Store.operations)
    require_writable = _threaded(Store.require_writable)
    set_process = _threaded(Store.set_process)
    settle = _threaded(Store.settle)
    snapshots = _threaded(Store.snapshots)
    unborn = _threaded(Store.unborn)
