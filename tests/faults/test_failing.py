"""A call of the C library fails below the verb, once or for ever. Then: it fails no longer, and recover.

The calls that the verb makes are counted first. The long form takes each of those that differ by name, kind of file and
step (with QMPSNAP_FAULTS_CALLS=every all of them, which takes hours), the short form chooses of those.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.faults.calls import Answer, Request
from tests.faults.report import Fault
from tests.faults.reporting import FORM
from tests.faults.upkeep import ALL
from tests.harness import failing

OF = (0 if os.environ.get("QMPSNAP_FAULTS_CALLS") == "every" else 1) if FORM == "long" else 40
"""Of how many distinct calls one is taken; 0: all calls, distinct or not."""
TURNS = {False: "failing call, once", True: "failing call, for ever"}


class Server:
    """A process that has everything loaded, and the shim, and forks what every case needs; a new one when it fails."""

    def __init__(self, folder: Path) -> None:
        self._environment = {**os.environ, "LD_PRELOAD": str(failing.built(folder))}
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Request) -> Answer:
        """Have the cases of one request done."""
        argv = [sys.executable, "-m", "tests.faults.calls"]
        process = self._process or subprocess.Popen(
            argv, env=self._environment, stdin=-1, stdout=-1, text=True, start_new_session=True
        )
        self._process = process
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(f"{json.dumps(msgspec.to_builtins(request))}\n")
            process.stdin.flush()
            said = process.stdout.readline()
            assert said, "the process of the cases has died"
        except BaseException:  # it took too long as well: what it says now would be taken for the next answer
            self.end()
            raise
        return msgspec.json.decode(said, type=Answer)

    def end(self) -> None:
        """End it and whatever it is in the midst of."""
        process, self._process = self._process, None
        if process:
            with process:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all cases of this worker."""
    found = Server(tmp_path_factory.mktemp("failing"))
    yield found
    found.end()


def _params() -> list[Any]:
    """In the short form every scenario once, in turn once and for ever."""
    cases = [(place, name, ever) for place, name in enumerate(ALL) for ever in (False, True)]
    return [
        pytest.param(
            Request(name=name, for_ever=ever, turn=place * 7, of=OF),
            id=f"{name}-{TURNS[ever]}",
            marks=pytest.mark.short if place % 2 == ever else (),
        )
        for place, name, ever in cases
    ]


@pytest.mark.timeout(3600 if FORM == "long" else 400)
@pytest.mark.parametrize("case", _params())
def test_a_call_fails(server: Server, home: Path, fault: Fault, case: Request) -> None:
    fault.case(TURNS[case.for_ever], ALL[case.name].column)
    answer = server.ask(replace(case, home=str(home)))
    if not answer.cases:
        fault.too_late()
    fault.together(answer.cases, violations=len(answer.violations), claims=answer.claims)
    assert not answer.violations, "\n\n".join(answer.violations)
