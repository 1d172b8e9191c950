"""Does a verb while calls of the C library fail below it: each part of a case in a process of its own, forked here.

``python -m tests.faults.calls`` runs with the shim of :mod:`tests.harness.failing`. It reads requests from stdin, one
JSON object a line, and answers each with what the cases of one scenario came to.
"""

import contextlib
import errno
import itertools
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
from msgspec import Struct

import qmpsnap
from qmpsnap.errors import NotFoundError, QmpsnapError
from qmpsnap.machine import templates
from qmpsnap.ops.fork import upkeep
from qmpsnap.qmp import status_poll
from tests.cli import forked
from tests.faults import claims, site
from tests.faults.scenarios import ready
from tests.faults.upkeep import AGAIN, ALL, MOVED
from tests.faults.verbs import OTHER
from tests.harness import failing, watch
from tests.harness.processes import kill_qemus, no_guards
from tests.live.machine import hold_invariants

CAN = {
    "fsync": (errno.EIO, errno.ENOSPC),
    "fdatasync": (errno.EIO, errno.ENOSPC),
    "write": (errno.ENOSPC, errno.EIO, errno.ENOMEM),
    "pwrite": (errno.EIO, errno.ENOSPC, errno.ENOMEM),
    "ftruncate": (errno.EIO, errno.ENOSPC),
    "fallocate": (errno.ENOSPC, errno.EIO),
    "rename": (errno.EIO, errno.ENOSPC, errno.ENOMEM),
    "link": (errno.ENOSPC, errno.EIO, errno.ENOMEM),
    "unlink": (errno.EIO, errno.ENOMEM),
    "create": (errno.EMFILE, errno.ENOSPC, errno.EIO, errno.ENOMEM),
    "open": (errno.ENOMEM, errno.EMFILE, errno.EIO),
}
"""What each call may fail with, in turn."""
TOGETHER = {
    errno.EIO: "fsync fdatasync write pwrite ftruncate fallocate rename link unlink create",
    errno.ENOSPC: "write pwrite fallocate link create",
}
"""Calls that fail for ever where one of them does; with another number only that call."""


TEMPLATES = "templates"


class Request(Struct, frozen=True):
    """The cases of one scenario: once or for ever; of the distinct calls every ``of``-th from ``turn`` on, or all."""

    name: str
    for_ever: bool
    turn: int = 0
    of: int = 0
    home: str = ""


class Answer(Struct):
    """How many cases there were, how many claims were compared, which errors did not know, and what is violated."""

    cases: int = 0
    claims: int = 0
    unknown: list[str] = []
    violations: list[str] = []
    seconds: float = 0.0


class Seen(Struct, frozen=True):
    """One call of an undisturbed run: which, of what kind of file, and after which step of the journal."""

    call: str
    file: str
    step: str
    program: str


class Failed(Struct, frozen=True):
    """What fails, and from which one of these calls on."""

    calls: str
    after: int
    times: int
    error: int
    what: str

    def __str__(self) -> str:
        ever = "once" if self.times == 1 else "for ever"
        return f"{errno.errorcode[self.error]} {ever} of {self.calls} {self.after} ({self.what})"


# --- one process after the other ------------------------------------------------------------------------------------


class Part(Struct):
    """What a forked process has come to: its result, or what it died of; and what it printed."""

    result: Any = None
    died: str = ""
    said: str = ""


def apart(act: Callable[[], Awaitable[object]]) -> Part:
    """Do it in a fork of this process."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as told:
        if (pid := os.fork()) == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            part = Part()
            try:
                part.result = anyio.run(act)
                pickle.dump(part, told)
            except BaseException:  # noqa: BLE001 - told to whoever asked
                told.seek(0)
                pickle.dump(Part(died=traceback.format_exc()), told)
            told.flush()
            os._exit(0)
        os.waitpid(pid, 0)
        for file in (said, told):
            file.seek(0)
        found: Part = pickle.load(told)  # noqa: S301 - our own
        found.said = said.read().decode(errors="replace")
        return found


class Machine:
    """A machine made ready in a home of its own, and what it was like; made anew once a verb has changed it."""

    def __init__(self, home: Path, name: str) -> None:
        self._home, self._name, self.scenario, self._number = home, name, ALL[name], itertools.count()
        self.folder, self.place = home, home
        self.before: Any = None

    def make(self) -> None:
        """Make it, unless it is as it was."""
        shutil.rmtree(self.folder / TEMPLATES, ignore_errors=True)  # what a case has baked, the next one has to bake
        if self.before:
            return
        self.end()
        self._go_to(self._home / str(next(self._number)))
        self.place.mkdir(parents=True)
        found = apart(self._ready)
        if self._name in MOVED:
            self._go_to(self.folder.rename(self._home / str(next(self._number))))
        stood = apart(self._standing)
        assert not found.died + stood.died, found.died + stood.died
        self.before = found.result, stood.result

    def _go_to(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "elsewhere"
        os.environ["QMPSNAP_HOME"] = str(folder)
        os.environ["QMPSNAP_TEMPLATES"] = str(folder / TEMPLATES)

    async def _ready(self) -> Any:
        async with qmpsnap.open() as q:
            return await site.look(await ready(q, self.scenario, self.place))

    async def _standing(self) -> Any:
        async with qmpsnap.open() as q:
            return await claims.standing(qmpsnap.MachineHandle(q.context, site.NAME), self.place)

    def end(self) -> None:
        """End its QEMUs and remove its files."""
        if self.folder != self._home:
            kill_qemus(self.folder)
            shutil.rmtree(self.folder)

    def act(self, fails: Failed | None, log: Path | None = None) -> Part:
        """The verb; returns the error it ended with, and how many calls that had to fail did not."""
        below = str(self.folder)

        async def acting() -> tuple[QmpsnapError | None, int]:
            try:
                if fails:
                    failing.fail(fails.calls, after=fails.after, times=fails.times, error=fails.error, below=below)
                elif log:
                    failing.log(log, below=below)
                async with qmpsnap.open() as q:
                    await self.scenario.act(qmpsnap.MachineHandle(q.context, site.NAME), self.place)
            except QmpsnapError as error:
                return error, self._lifted()
            finally:
                self._lifted()
            return None, self._left

        return apart(acting)

    _left = 0

    def _lifted(self) -> int:
        self._left = self._left or failing.left()
        failing.fail("", times=0)
        failing.log(None)
        return self._left

    def judge(self, error: QmpsnapError | None) -> Part:
        """What is violated raises; returns whether the machine is as it was, and then what it is like."""
        before, stood = self.before

        async def judging() -> Any:
            async with qmpsnap.open() as q:
                vm = qmpsnap.MachineHandle(q.context, site.NAME)
                await no_guards()
                return await self._verdict(vm, before, stood, error)

        return apart(judging)

    async def _verdict(self, vm: qmpsnap.MachineHandle, before: Any, stood: Any, error: QmpsnapError | None) -> Any:
        scenario = self.scenario
        now = await claims.standing(vm, self.place)
        if error:
            claims.hold_effect(error, stood, now)
        elif scenario.happened:
            assert await scenario.happened(vm, self.place), "it says that it was done"
        with contextlib.suppress(NotFoundError):
            await qmpsnap.Controller(vm._context).recover(OTHER)
            if self._name == "fork":
                await hold_invariants(qmpsnap.MachineHandle(vm._context, OTHER))
        (shelf,) = templates.shelves(vm._context.home)
        if shelf.folder.is_dir():  # what could not be removed, either
            await upkeep.prune(vm._context)
        assert not shelf.unfinished(), "part of a template is left"
        if error and self._name in AGAIN:
            await scenario.act(vm, self.place)
        try:
            await vm.record()
        except NotFoundError:
            return None
        await site.judge(vm, self.place, before, scenario.expected, then=False)
        if same := not claims.differs(stood, await claims.standing(vm, self.place)):
            return site.Before(before.hashes, before.disks, before.state, claims.look(vm)), stood
        found = await vm.check(deep=True)
        assert not found.findings, found.findings
        await site.works_on(vm, before, scenario.expected)
        return same


# --- which calls there are ------------------------------------------------------------------------------------------

_KINDS = (
    (r"\.db$", "store"),
    (r"\.db-(wal|shm|journal)$", r"\1"),
    (r"/record\.json(\.part)?$", "record"),
    (r"/locks/.*|\.lock$", "lock"),
    (r"\.qcow2$|\.raw$|/elsewhere/\w+$", "image"),
    (r"\.part$|\.tmp$|/\.[^/]*$", "file in the making"),
)


def _kind(path: str) -> str:
    for pattern, kind in _KINDS:
        if found := re.search(pattern, path):
            return found.expand(kind)
    return re.sub(r"\d+", "N", "/".join(Path(path).parts[-2:]))


def seen(log: Path) -> list[Seen]:
    """The calls of an undisturbed run, in order; a line of a step lies between them."""
    found, step = [], "opened"
    for line in log.read_text().splitlines():
        call, path, program, *_ = line.split("\t")
        if call == "step":
            step = path
        else:
            found.append(Seen(call, _kind(path), step, program.removesuffix("3")))
    return found


def chosen(calls: list[Seen], request: Request) -> Iterator[Failed]:
    """What is to fail: each distinct call once, every ``of``-th of those; without it every call."""
    distinct = list(dict.fromkeys(calls)) if request.of else calls
    places = {call: calls.index(call) for call in distinct} if request.of else {}
    for number, call in enumerate(distinct):
        if request.of and number % request.of != request.turn % request.of:
            continue
        place = places.get(call, number)
        errors = CAN[call.call]
        error = errors[(number // (request.of or 1)) % len(errors)]
        together = TOGETHER.get(error, call.call) if request.for_ever else call.call
        names = together.split() if call.call in together.split() else [call.call]
        after = sum(other.call in names for other in calls[:place])
        what = f"{call.file} by {call.program}, {call.step}"
        yield Failed(" ".join(names), after, failing.FOR_EVER if request.for_ever else 1, error, what)


def counted(machine: Machine) -> list[Seen]:
    """The calls that the verb makes when nothing fails."""
    machine.make()
    log = machine.folder.parent / "calls"
    log.unlink(missing_ok=True)

    def hook(verb: str, step: str, when: watch.When) -> None:
        with log.open("a") as file:
            file.write(f"step\t{when} {step} of {verb}\t-\n")

    with watch.watching(hook):
        part = machine.act(None, log)
    assert not part.died, part.died
    machine.before = None
    return seen(log)


# --- the cases ------------------------------------------------------------------------------------------------------


def held(machine: Machine, fails: Failed, answer: Answer) -> None:
    """One case."""
    machine.make()
    acted = machine.act(fails)
    if acted.died or acted.said:
        answer.violations.append(f"{fails}: {acted.died}{acted.said}")
    error, left = acted.result or (None, 0)
    if left == fails.times:
        return  # it came by fewer such calls this time
    answer.cases += 1
    answer.claims += error is not None
    if error and error.effect == "unknown":
        answer.unknown.append(f"{fails}: {error.message}")
    judged = machine.judge(error)
    machine.before = judged.result
    if judged.died or judged.said:
        said = f" after {type(error).__name__}: {error!s}" if error else ""
        answer.violations.append(f"{fails}{said}: {judged.died[-1800:]}{judged.said}")
        machine.before = None


def answered(request: Request) -> Answer:
    """Every case of a request."""
    answer, machine = Answer(), Machine(Path(request.home), request.name)
    try:
        for fails in chosen(counted(machine), request):
            held(machine, fails, answer)
    finally:
        machine.end()
    return answer


def serve() -> None:
    forked.load()
    status_poll.DEADLINE = 5.0  # as tests.live.conftest has it
    with tempfile.NamedTemporaryFile() as state:
        failing.share(Path(state.name))
        for line in sys.stdin:
            answer = answered(msgspec.json.decode(line, type=Request))
            sys.stdout.write(f"{json.dumps(msgspec.to_builtins(answer))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve()
