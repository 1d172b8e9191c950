"""Hints: verbs and options as values, which the command line and Python each write as their users type them."""

import argparse
import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.cli.command_line import NOUNS, parser
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import QmpsnapError, StateError
from qmpsnap.hint import Call, Hint, Option, call, option

PACKAGE = Path(qmpsnap.__file__).parent
LIBRARY = [path for path in sorted(PACKAGE.rglob("*.py")) if "cli" not in path.relative_to(PACKAGE).parts]
VERBS = sorted({verb for verbs in NOUNS.values() for verb in verbs})
COMMAND = re.compile(rf"\bqmpsnap ({'|'.join(VERBS)})\b")
OPTION = re.compile(r"(?<![\w-])--[a-z]")
ARGUMENT = re.compile(r"--[a-z-]+(=X?)?")
"""Of another program, and not a sentence."""
OTHER_PROGRAMS = re.compile(r"\b(adduser|lvextend,|bunzip2|gunzip|nsenter|qemu-img|qemu-nbd|unxz) ")
API = (qmpsnap.MachineHandle, qmpsnap.Controller)
COMMAND_LINE_ONLY = {"demo", "doctor", "import_argv", "import_libvirt", "import_proxmox", "rebuild", "relocate"}


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string that is no docstring and no argument in a list, each f-string as a whole."""
    apart: set[ast.expr] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant() as lone):  # a docstring
                apart.add(lone)
            case ast.List(elts=elements) | ast.JoinedStr(values=elements):
                apart.update(elements)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in apart:
            yield node.lineno, node.value


def test_the_library_names_no_command_and_no_option() -> None:
    found = [
        f"{path}:{line}: {text}"
        for path in LIBRARY
        for line, text in texts(ast.parse(path.read_text()))
        if COMMAND.search(text)
        or (OPTION.search(text) and not OTHER_PROGRAMS.search(text) and not ARGUMENT.fullmatch(text))
    ]
    assert found == []


def made() -> Iterator[tuple[str, Hint]]:
    """Every call and option in the library, what is not constant replaced by a name."""
    for path in LIBRARY:
        if "from qmpsnap.hint import" not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("call", "option"):
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                make: Any = call if node.func.id == "call" else option
                given = [_constant(argument) for argument in node.args]
                yield where, make(*given, **{str(one.arg): _constant(one.value) for one in node.keywords})


def _constant(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    return {"vda": "PATH"} if isinstance(node, ast.Name) and node.id == "files" else "web"


def test_a_hint_is_not_put_into_an_f_string() -> None:
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FormattedValue):
                inside = {
                    of.func.id for of in ast.walk(node) if isinstance(of, ast.Call) and isinstance(of.func, ast.Name)
                }
                assert not inside & {"call", "option"}, f"{path}:{node.lineno}: its parts are lost there, use +"


def test_python_has_what_a_hint_names() -> None:
    methods = [each for of in API for name, each in inspect.getmembers(of, inspect.isfunction) if name[0] != "_"]
    keywords = {name for each in methods for name in inspect.signature(each).parameters}
    keywords |= {"define", "set_aside", "snapshot", "storage", *qmpsnap.SnapshotOptions.__annotations__}
    for where, hint in made():
        (part,) = hint.parts
        if isinstance(part, Option):
            assert part.name in keywords, where
        elif isinstance(part, Call) and part.verb not in COMMAND_LINE_ONLY:
            of = qmpsnap.Controller if hint.startswith("await q.") else qmpsnap.MachineHandle
            first = (part.machine,) if of is qmpsnap.Controller and part.machine else ()
            options = {each.name: each.value for each in part.options}
            inspect.signature(getattr(of, part.verb)).bind(None, *first, *part.arguments, **options)


def test_the_command_line_takes_what_a_hint_names() -> None:
    whole = parser()
    options = _options(whole)
    for where, hint in made():
        typed = shlex.split(as_typed(hint))
        if typed[0] == "qmpsnap":
            whole.parse_args(typed[1:])
        else:
            assert typed[0] in options, where


def _options(of: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in of._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found.update(*map(_options, action.choices.values()))
    return found


def test_an_error_writes_its_hint_for_python() -> None:
    hint = "it hangs: " + call("stop", "web", force=True) + ", then " + call("recover", "web")
    error = StateError("no answer", hint=hint, machine="web")
    assert str(error) == (
        "no answer; nothing was changed\nhint: it hangs: await vm.stop(force=True), then await q.recover('web')"
    )
    assert error.sentence == "no answer; nothing was changed"
    assert as_typed(error.hint) == "it hangs: qmpsnap stop web --force, then qmpsnap recover web"


@pytest.mark.parametrize(
    ("hint", "python", "typed"),
    [
        (option("max_pause_ms", "MS"), "max_pause_ms=MS", "--max-pause MS"),
        (option("memory", False), "memory=False", "--no-memory"),
        (call("undefine", "web", disks="keep"), "await vm.undefine(disks='keep')", "qmpsnap undefine web --keep-disks"),
        (
            call("snapshot", "web", files={"vda": "PATH"}),
            "await vm.snapshot(files={'vda': 'PATH'})",
            "qmpsnap snapshot create web --file vda=PATH",
        ),
        (call("wait", "web"), "await vm.wait()", "qmpsnap job wait web"),
        (call("rebuild", set_aside=True), "rebuild (at the command line)", "qmpsnap check --rebuild --set-aside"),
    ],
)
def test_a_verb_is_written_in_both_ways(hint: Hint, python: str, typed: str) -> None:
    assert (str(hint), as_typed(hint)) == (python, typed)


def test_an_error_without_a_hint_is_its_sentence() -> None:
    assert str(QmpsnapError("no")) == "no; nothing was changed"
    assert as_typed("plain") == "plain"
