"""The store as async code calls it."""

import inspect

from qmpsnap.ops.base.async_store import AsyncStore
from qmpsnap.store.store import Store


async def test_it_has_every_call_of_the_store_under_its_own_name() -> None:
    class Named:
        def __getattr__(self, name: str) -> object:
            return lambda *arguments, **named: (name, arguments, named)

    calls = {name for name, _ in inspect.getmembers(Store, inspect.isfunction) if not name.startswith("_")}
    asked = AsyncStore(Named())  # type: ignore[arg-type]
    for name in calls - {"at_once"}:  # which is for a thread
        assert await getattr(asked, name)("web", step=1) == (name, ("web",), {"step": 1})
