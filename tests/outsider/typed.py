"""Command lines of qmpsnap, each in a process of its own that can be killed on its way."""

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import qmpsnap
from qmpsnap.cli import main
from tests.outsider import api

HANGS = 120.0
"""Seconds after which a command line hangs, whatever the host is busy with."""

KNOWN = {*range(10), 130, -signal.SIGKILL, -signal.SIGINT}
"""Exit codes that the documents know, and the signals that the tester sends."""


@dataclass(frozen=True)
class Answer:
    """What became of a command line; ``code`` is negative for a signal."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str
    took: float

    @property
    def error(self) -> dict[str, Any]:
        """The error as it is told with ``-o json``."""
        for line in reversed(self.err.splitlines()):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "effect" in found:
                    return found
        return {}

    def json(self) -> Any:
        """What it printed."""
        return json.loads(self.out)

    def wrong(self) -> str:
        """What no answer may be: a traceback, an exit code of nobody's, a failure without a word."""
        if "Traceback (most recent call last)" in self.err or "Traceback" in self.out:
            return f"a traceback: {self.err[-1500:]}"
        if self.code not in KNOWN:
            return f"exit {self.code}: {self.err[-300:]}"
        if self.code > 0 and not (self.err + self.out).strip():
            return f"exit {self.code} without a word"
        return ""


class Command:
    """A command line that runs."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        wrapper: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        called: bool = False,
    ) -> None:
        """Begin it: in a fork of this process, or by the script behind a wrapper or with an environment.

        ``called``: by the Python API instead, in a fork.
        """
        self.words = tuple(words)
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by wait
        self._since = time.monotonic()
        self._child: subprocess.Popen[bytes] | None = None
        if wrapper or env:
            script = Path(sys.executable).with_name("qmpsnap")
            argv = [*wrapper, str(script), *words]
            self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, env={**os.environ, **(env or {})}
            )
            self.pid = self._child.pid
        elif (pid := os.fork()) == 0:
            _become(self.words, self._out.fileno(), self._err.fileno(), called=called)
        else:
            self.pid = pid
        self._status: int | None = None

    def send(self, number: int) -> None:
        """A signal, if it has not ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has."""
        if self._status is None:
            if self._child:
                self._status = self._child.poll()
            else:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def wait(self, seconds: float = HANGS) -> Answer:
        """Until it has ended; one that hangs is killed."""
        deadline = self._since + seconds
        pause = 0.001
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(0.02, pause * 1.3)
        hung = self._status is None
        while not self.ended():
            self.send(signal.SIGKILL)
            time.sleep(0.01)
        took = time.monotonic() - self._since
        out, err = (self._read(file) for file in (self._out, self._err))
        if hung:
            err += f"\nTraceback: it hung for {took:.0f} s"
        return Answer(self.words, self._status or 0, out, err, took)

    @staticmethod
    def _read(file: Any) -> str:
        file.seek(0)
        text = file.read().decode(errors="replace")
        file.close()
        return str(text)


def typed(*words: str) -> Answer:
    """One command line to its end."""
    return Command(words).wait()


def load() -> None:
    """Import all of qmpsnap, so that forks need not."""
    importlib.import_module("anyio._backends._asyncio")
    for module in pkgutil.walk_packages(qmpsnap.__path__, "qmpsnap."):
        if not module.name.endswith(("__main__", "pytest_plugin")):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)


def _become(words: tuple[str, ...], out: int, err: int, *, called: bool) -> NoReturn:
    code = 0
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 256)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if called:
            sys.exit(api.run(words))
        sys.argv = ["qmpsnap", *words]
        main.run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the interpreter would print
        traceback.print_exc()
        code = 70
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
