"""Names that methods and arguments had before; each warns, and goes with the next release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def warn(old: str, new: str, *, above: int = 3) -> None:
    """Say what to write instead; ``above`` frames up is the caller who wrote it."""
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=above)


def was(**old: str) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Let a method take arguments by their former names: ``was(deadline="timeout")``."""

    def renaming(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        @functools.wraps(method)
        async def called(*arguments: P.args, **named: P.kwargs) -> R:
            for name, new in old.items():
                if name in named:
                    warn(f"{method.__name__}({name}=)", f"{new}=", above=4)
                    named[new] = named.pop(name)
            return await method(*arguments, **named)

        return called

    return renaming


def previewed(new: str, pick: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    """The former method of a plan: ``pick`` makes what it returned of the handle and the plan."""

    async def preview(handle: Any, *arguments: Any, **named: Any) -> Any:
        warn(f"preview_{new}()", f"plan_{new}()")
        return await pick(handle, await getattr(handle, f"plan_{new}")(*arguments, **named))

    preview.__deprecated__ = True  # type: ignore[attr-defined] # as PEP 702 has it
    return preview


async def details(_: Any, plan: Any) -> Any:
    """The plan as it was returned before."""
    return plan.details


async def with_machine(handle: Any, plan: Any) -> Any:
    """The machine's record, and the plan."""
    return await handle.record(), plan.details


class OldPreviews:
    """``preview_*`` of a machine's handle."""

    preview_snapshot = previewed("snapshot", with_machine)
    preview_save = previewed("save", with_machine)
    preview_restore = previewed("restore", details)
    preview_add_layers = previewed("add_layers", with_machine)
    preview_revert = previewed("revert", details)
    preview_push = previewed("push", with_machine)
    preview_pop = previewed("pop", details)
    preview_fork = previewed("fork", details)
    preview_set = previewed("set", details)
    preview_resize = previewed("resize", details)
    preview_undefine = previewed("undefine", details)

    async def preview_rename(self, old: str, new: str) -> None:
        """Refused where the snapshot could not be renamed."""
        warn("preview_rename()", "plan_rename_snapshot()")
        await self.plan_rename_snapshot(old, new)  # type: ignore[attr-defined]

    preview_rename.__deprecated__ = True  # type: ignore[attr-defined]
