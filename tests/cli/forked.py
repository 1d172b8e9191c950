"""Runs command lines in forks of one process that has all modules: with descriptors, limits and a user of their own.

``python -m tests.cli.forked`` reads cases from stdin, one JSON object a line, and writes ``[code, stderr]`` for each.
"""

import contextlib
import difflib  # noqa: F401 - loaded for an error's hint, by a user who may not be allowed to read Python's own folder
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
from importlib import import_module
from typing import Any, NoReturn

import qmpsnap
from qmpsnap.cli import main
from tests.harness import failing

SECONDS = 10
"""After so long a command line hangs."""


def redirected(descriptor: int, target: str) -> None:
    if target == "closed":
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)  # as Python starts
        return
    if target == "pipe":  # that nobody reads
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = os.open(target, os.O_RDONLY if descriptor == 0 else os.O_RDWR)
    os.dup2(opened, descriptor)
    os.close(opened)


def run(case: dict[str, Any], said: int) -> NoReturn:
    os.dup2(said, 2)
    for descriptor, target in case.get("streams", {}).items():
        redirected(int(descriptor), target)
    for name, value in case.get("limits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if case.get("user"):
        os.setgroups([])
        os.setresgid(*[case["user"]] * 3)
        os.setresuid(*[case["user"]] * 3)
    if case.get("fails"):
        failing.fail(**case["fails"])
    signal.alarm(SECONDS)
    sys.argv = ["qmpsnap", *case["words"]]
    main.run()


def served(line: str) -> tuple[int, str]:
    """What became of one case."""
    with tempfile.TemporaryFile() as said:
        if (pid := os.fork()) == 0:
            run(json.loads(line), said.fileno())
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


def load() -> None:
    """Import what any command line wants."""
    import_module("anyio._backends._asyncio")  # as anyio does at run time, where another user may have no right to it
    for module in pkgutil.walk_packages(qmpsnap.__path__, "qmpsnap."):
        if not module.name.endswith(("__main__", "pytest_plugin")):
            with contextlib.suppress(ImportError):
                import_module(module.name)


def serve() -> None:
    load()
    answers = [served(line) for line in sys.stdin.read().splitlines()]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    serve()
