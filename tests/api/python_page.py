"""The part of docs/reference/python.md that the docstrings say."""

import inspect
import re
import textwrap
from collections.abc import Callable
from enum import Enum
from typing import Any

import qmpsnap
from qmpsnap.api.change_plans import ChangePlans
from qmpsnap.api.forks import Forking
from qmpsnap.api.machine_base import MachineBase
from qmpsnap.api.machine_changes import Changing
from qmpsnap.api.machine_guest import MachineGuest
from qmpsnap.api.machine_handle import MachineHandle
from qmpsnap.api.machine_life import MachineLife
from qmpsnap.api.machine_plans import MachinePlans
from tests.api.described import CLASSES, declared_in, described, kind, parameters, public

BEGIN, END = "<!-- written from the docstrings by tests/api -->\n", "<!-- end of what is written -->\n"
WIDTH = 118
SECTIONS: dict[type, str] = {
    MachineHandle: "Snapshots and layers",
    MachinePlans: "Plans",
    ChangePlans: "Plans",
    MachineLife: "Start, stop and look",
    MachineBase: "Start, stop and look",
    MachineGuest: "In the guest",
    Changing: "Changes",
    Forking: "Forks",
}
VALUES = (
    qmpsnap.Job,
    qmpsnap.Plan,
    qmpsnap.PlannedFile,
    qmpsnap.Committed,
    qmpsnap.Streamed,
    qmpsnap.Mirrored,
    qmpsnap.Deleted,
    qmpsnap.Reverted,
    qmpsnap.Forked,
    qmpsnap.ForkPool,
    qmpsnap.Shelved,
    qmpsnap.Pruned,
    qmpsnap.State,
    qmpsnap.Shortage,
    qmpsnap.StateChanged,
    qmpsnap.JobChanged,
    qmpsnap.ShortageChanged,
)

_BEGIN = {"block": "async with", "function": ""}


def page() -> str:
    """Everything between the marks."""
    lines = ["## Controller", ""]
    for name, method in public(CLASSES["q"]).items():
        lines += _method("q", name, method)
    lines += ["## Machines", "", *_wrapped(_plain(inspect.getdoc(MachineHandle) or "")), ""]
    methods = public(MachineHandle)
    for title in dict.fromkeys(SECTIONS.values()):
        lines += [f"### {title}", ""]
        for name, method in methods.items():
            if SECTIONS[declared_in(MachineHandle, name)] == title:
                lines += _method("vm", name, method)
    lines += ["## What methods return", ""]
    for value in VALUES:
        lines += _value(value)
    return "\n".join(lines).rstrip() + "\n\n"


def _method(letter: str, name: str, method: Callable[..., Any]) -> list[str]:
    told = described(method)
    lines = ["```python", *_call(letter, name, method), "```", "", *_paragraphs(told.text), ""]
    for argument, text in told.arguments.items():
        lines += _item(f"`{argument}`: ", text)
    lines += [""] if told.arguments else []
    lines += [*_wrapped(f"Returns: {_plain(told.returns)}"), ""] if told.returns else []
    lines += ["Raises:", ""] if told.errors else []
    for error, text in told.errors.items():
        lines += _item(", ".join(f"`{one.strip()}`" for one in error.split(",")) + ": ", text)
    lines += [""] if told.errors else []
    return lines


def _call(letter: str, name: str, method: Callable[..., Any]) -> list[str]:
    signature = inspect.signature(method)
    given: list[str] = []
    starred = False
    for one in parameters(method):
        if one.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            given.append("*")
            starred = True
        starred = starred or one.kind is inspect.Parameter.VAR_POSITIONAL
        star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(one.kind.name, "")
        default = "" if one.default is inspect.Parameter.empty else f"={_default(one.default)}"
        given.append(f"{star}{one.name}{default}")
    returns = re.sub(r"^Job\[(.*)\]$", r"\1", str(signature.return_annotation))
    begin = {"generator": "async for event in ", "block": "async with ", "function": ""}.get(kind(method), "await ")
    end = {"generator": ": ...", "block": f" as {name}: ...", "job": f" -> {returns}  # a job"}.get(
        kind(method), f" -> {returns}"
    )
    line = f"{begin}{letter}.{name}({', '.join(given)}){end}"
    if len(line) <= WIDTH:
        return [line]
    inside = textwrap.wrap(", ".join(given), WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
    return [f"{begin}{letter}.{name}(", *inside, f"){end}"]


def _default(value: object) -> str:
    return "None" if inspect.isfunction(value) else repr(value)


def _value(of: type) -> list[str]:
    told = inspect.getdoc(of) or ""
    text, _, attributes = told.partition("\nAttributes:\n")
    lines = [f"### {of.__name__}", "", *_paragraphs(text.splitlines()), ""]
    if issubclass(of, Enum):
        lines += [*_wrapped("Values: " + ", ".join(f"`{one.value}`" for one in of) + "."), ""]
    name = ""
    items: dict[str, str] = {}
    for line in attributes.splitlines():
        if entry := re.match(r"    (?! )(\w+): (.*)", line):
            name = entry[1]
            items[name] = entry[2]
        elif name and line.strip():
            items[name] += " " + line.strip()
    for name, value in vars(of).items():
        if isinstance(value, property) and not name.startswith("_") and value.__doc__:
            items[name] = inspect.cleandoc(value.__doc__).replace("\n", " ")
        elif inspect.isfunction(value) and not name.startswith("_") and value.__doc__:
            begin = "async for" if name == "progress" else _BEGIN.get(kind(value), "await")
            items[f"{begin} {name}()".strip()] = " ".join(inspect.cleandoc(value.__doc__).split())
    for name, text in items.items():
        lines += _item(f"`{name}`: ", text)
    return [*lines, ""] if items else lines


def _item(head: str, text: str) -> list[str]:
    first, *nested = re.split(r"\n\n?(?=- )", text)
    lines = textwrap.wrap(f"- {head}{_plain(first)}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    for one in nested:
        body = _plain(one.removeprefix("- "))
        lines += textwrap.wrap(
            f"  - {body}", WIDTH, initial_indent="", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


def _paragraphs(lines: list[str]) -> list[str]:
    found: list[str] = []
    for paragraph in "\n".join(lines).strip().split("\n\n"):
        if paragraph.endswith("::"):
            found += _wrapped(_plain(paragraph[:-1]))
        elif paragraph.startswith("::"):
            continue
        elif paragraph.startswith("    "):
            found += ["```python", *textwrap.dedent(paragraph).splitlines(), "```"]
        else:
            found += _wrapped(_plain(paragraph))
        found.append("")
    return found[:-1]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _plain(text: str) -> str:
    """Markdown of reStructuredText, in one line."""
    text = re.sub(r":meth:`~?([\w.]+)`", lambda found: f"`{found[1].rpartition('.')[2]}()`", text)
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    return " ".join(text.replace("``", "`").split())
