"""The public methods, as their signatures and docstrings describe them."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qmpsnap.api.controller import Controller
from qmpsnap.api.machine_handle import MachineHandle


@dataclass
class Described:
    """A docstring in its parts."""

    text: list[str] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    returns: str = ""
    errors: dict[str, str] = field(default_factory=dict)


def public(of: type) -> dict[str, Callable[..., Any]]:
    """The methods that are no former names, those of base classes first, in the order of their source."""
    found = {name: value for part in reversed(of.__mro__[:-1]) for name, value in vars(part).items()}
    return {
        name: value
        for name, value in found.items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(value, "__deprecated__")
    }


def declared_in(of: type, name: str) -> type:
    """The class that has the method."""
    return next(part for part in of.__mro__ if name in vars(part))


def is_job(method: Callable[..., Any]) -> bool:
    if str(inspect.signature(method).return_annotation).startswith("Job["):
        return True
    return inspect.iscoroutinefunction(inspect.unwrap(method)) and not inspect.iscoroutinefunction(method)


def kind(method: Callable[..., Any]) -> str:
    """``job``, ``coroutine``, ``generator``, ``block`` (for ``async with``) or ``function``."""
    if is_job(method):
        return "job"
    if inspect.isasyncgenfunction(inspect.unwrap(method)):
        return "generator" if inspect.isasyncgenfunction(method) else "block"
    return "coroutine" if inspect.iscoroutinefunction(inspect.unwrap(method)) else "function"


def described(method: Callable[..., Any]) -> Described:
    """The docstring's parts; in Google's style."""
    found = Described()
    part, name = "text", ""
    for line in (inspect.getdoc(method) or "").splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            part, name = line, ""
        elif part == "text":
            found.text.append(line)
        elif part == "Returns:":
            found.returns = f"{found.returns} {line.strip()}".strip()
        else:
            into = found.arguments if part == "Args:" else found.errors
            if entry := re.match(r"    (?! )([\w, ]+): (.*)", line):
                name = entry[1]
                into[name] = entry[2]
            elif name:
                into[name] = f"{into[name]}\n{line[8:]}"
    return found


def parameters(method: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    """All but ``self``."""
    return (found for name, found in inspect.signature(method).parameters.items() if name != "self")


CLASSES: dict[str, type] = {"q": Controller, "vm": MachineHandle}
