"""``qmpsnap/sync``: the public methods without ``await``, written from the source of the API."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qmpsnap.api.change_plans import ChangePlans
from qmpsnap.api.machine_plans import MachinePlans
from tests.api.described import CLASSES, declared_in, public

HEAD = '''"""{title}

Written by tests/api/sync_api.py from the source of ``qmpsnap.api``, whose docstrings say more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from qmpsnap.sync.{base_module} import {base}
{runtime}

if TYPE_CHECKING:
{typed}

R = TypeVar("R")


class {name}({base}):
    """:class:`qmpsnap.{name}` without ``await``."""

'''


_PLANS = (MachinePlans, ChangePlans)


@dataclass(frozen=True)
class Module:
    """One module to write: a class, the one it builds on, and which methods it has."""

    title: str
    letter: str
    name: str
    base: str
    base_module: str
    takes: Callable[[type], bool] = lambda _: True


MODULES = {
    "controller": Module(
        "All machines of one home, for programs without asyncio.", "q", "Controller", "Opened", "runner"
    ),
    "machine_plans": Module(
        "Plans of one machine, for programs without asyncio.",
        "vm",
        "MachinePlans",
        "Delegating",
        "runner",
        lambda of: of in _PLANS,
    ),
    "machine": Module(
        "One machine, for programs without asyncio.",
        "vm",
        "MachineHandle",
        "MachinePlans",
        "machine_plans",
        lambda of: of not in _PLANS,
    ),
}


def module(key: str) -> str:
    """The source of one module."""
    wanted = MODULES[key]
    of = CLASSES[wanted.letter]
    bodies: list[str] = []
    imports: set[str] = set()
    for name in public(of):
        if wanted.takes(part := declared_in(of, name)):
            source = _Source(part)
            for node in source.methods(name):
                bodies.append(_method(node, wanted.letter))
                imports |= {source.imports[used] for used in _names(node) if used in source.imports}
                imports |= {"from qmpsnap.sync.pool import ForkPool"} if "ForkPool" in _names(node) else set()
                block = _is_block(node)
                imports |= {"from collections.abc import Iterator"} if _generates(node) or block else set()
                imports |= {"from contextlib import contextmanager"} if block else set()
    imports.discard("from qmpsnap.api.machine_handle import MachineHandle")
    imports.discard("from collections.abc import AsyncIterator")
    typed = sorted(imports - _RUNTIME)
    typed += ["from qmpsnap.sync.machine import MachineHandle"] if wanted.letter == "q" else []
    return (
        HEAD.format(
            title=wanted.title,
            name=wanted.name,
            base=wanted.base,
            base_module=wanted.base_module,
            runtime="\n".join(sorted(imports & _RUNTIME)),
            typed=textwrap.indent("\n".join(typed), "    "),
        )
        + "\n\n".join(bodies)
        + "\n"
    )


_RUNTIME = {
    "from contextlib import contextmanager",
    "from qmpsnap.qmp.jobs import unreported",
    "from pathlib import Path",
}


class _Source:
    """The module that a class is written in."""

    def __init__(self, of: type) -> None:
        tree = ast.parse(Path(inspect.getfile(of)).read_text())
        self._class = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == of.__name__)
        self.imports: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
                for name in node.names:
                    end = f" as {name.asname}" if name.asname else ""
                    self.imports[name.asname or name.name] = f"from {node.module} import {name.name}{end}"
            elif isinstance(node, ast.Import):
                for name in node.names:
                    self.imports[name.name] = f"import {name.name}"

    def methods(self, name: str) -> Iterable[ast.AsyncFunctionDef | ast.FunctionDef]:
        """The definitions of that name: its overloads, then the method itself."""
        for node in self._class.body:
            if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) and node.name == name:
                yield node


def _names(node: ast.AsyncFunctionDef | ast.FunctionDef) -> set[str]:
    """Names that a signature needs."""
    found: set[str] = set()
    parts: list[ast.AST] = [node.args, *([node.returns] if node.returns else [])]
    for part in parts:
        found |= {one.id for one in ast.walk(part) if isinstance(one, ast.Name)}
    return found - {"Job", "AsyncGenerator", "Any"}


def _generates(node: ast.AsyncFunctionDef | ast.FunctionDef) -> bool:
    return node.returns is not None and ast.unparse(node.returns).startswith("AsyncGenerator[")


def _method(node: ast.AsyncFunctionDef | ast.FunctionDef, letter: str) -> str:
    overload = any(ast.unparse(one) == "overload" for one in node.decorator_list)
    returns = ast.unparse(node.returns) if node.returns else "None"
    if returns.startswith("Job["):
        returns = returns[4:-1]
    if _is_block(node):
        return _block(node, returns, letter)
    if _generates(node):
        returns = f"Iterator[{returns.removeprefix('AsyncGenerator[').removesuffix(', None]')}]"
    head = f"def {node.name}({ast.unparse(node.args)}) -> {returns}:"
    if overload:
        return textwrap.indent(f"@overload\n{head} ...", "    ")
    told = (ast.get_docstring(node) or "").splitlines()[0]
    act = f"self._{'handle' if letter == 'vm' else 'controller'}.{node.name}"
    call = "_iterate" if _generates(node) else "_call" if _waits(node, returns) else "_now"
    arguments = ", ".join(_passed(node.args))
    return textwrap.indent(f'{head}\n    """{told}"""\n    return self.{call}({act}({arguments}))', "    ")


def _is_block(node: ast.AsyncFunctionDef | ast.FunctionDef) -> bool:
    return any(ast.unparse(one) == "asynccontextmanager" for one in node.decorator_list)


def _block(node: ast.AsyncFunctionDef | ast.FunctionDef, returns: str, letter: str) -> str:
    """A method for ``with``."""
    returns = returns.replace("AsyncIterator[", "Iterator[")
    told = (ast.get_docstring(node) or "").splitlines()[0].replace("async with", "with")
    act = f"self._{'handle' if letter == 'vm' else 'controller'}.{node.name}({', '.join(_passed(node.args))})"
    body = f'"""{told}"""\nwith self._entered({act}) as found:\n    yield found'
    head = f"@contextmanager\ndef {node.name}({ast.unparse(node.args)}) -> {returns}:\n"
    return textwrap.indent(head + textwrap.indent(body, "    "), "    ")


def _waits(node: ast.AsyncFunctionDef | ast.FunctionDef, returns: str) -> bool:
    return isinstance(node, ast.AsyncFunctionDef) or (node.returns is not None and ast.unparse(node.returns) != returns)


def _passed(given: ast.arguments) -> Iterable[str]:
    yield from (one.arg for one in given.args if one.arg != "self")
    if given.vararg:
        yield f"*{given.vararg.arg}"
    yield from (f"{one.arg}={one.arg}" for one in given.kwonlyargs)
    if given.kwarg:
        yield f"**{given.kwarg.arg}"
