"""What happens to a command line on its way: who is killed, stopped or interrupted, and when."""

import dataclasses
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from tests.outsider import api, looks
from tests.outsider.known import Known
from tests.outsider.typed import Answer, Command
from tests.outsider.verbs import Act
from tests.outsider.world import World

USUAL = frozenset({0, 4})
"""Exit codes of a command that nobody disturbs: done, or refused in this state."""

JSON = {"commit", "stream", "mirror", "save", "restore", "check", "define", "undefine", "snapshot"}


@dataclass
class Hit:
    """One command line that is to be hit, and what it may claim afterwards.

    Attributes:
        second: makes another act for the same machine; its expectations join those of the first.
        codes: exit codes that are no violation; ``None`` for any.
        recover: whether something may be open afterwards.
        alone: nothing else changes the machine, so that a claim can be compared.
        trusted: what it says has come of it still holds now.
        everybody: all machines were hit.
    """

    world: World
    known: Known
    verb: str
    number: int
    usually: float
    dice: random.Random
    second: Callable[[], Act | None]
    codes: frozenset[int] | None = USUAL
    recover: bool = False
    alone: bool = True
    trusted: bool = True
    everybody: bool = False

    def __post_init__(self) -> None:
        """Every throw is made in any case, so that the next step's are the same."""
        self.at, self.which, self.much = self.dice.random(), self.dice.random(), self.dice.random()
        self.form = self.dice.choice(("script", "call", "fork", "fork"))

    def pause(self) -> None:
        """Wait until the moment, spread over what the verb usually takes."""
        time.sleep(self.at * self.usually * 1.1)

    def disturbs(self, *, alone: bool = True, trusted: bool = True) -> None:
        """From now on it may fail, and something may be open."""
        self.codes, self.recover, self.alone, self.trusted = None, True, alone, trusted

    def begin(
        self, words: Sequence[str], *, wrapper: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> Command:
        """The command line: a fork, or the script; or the same by the Python API."""
        if self.form == "call" and not wrapper and not env and api.call(words):
            return Command(words, called=True)
        form = ["-o", "json"] if words[0] in JSON else []
        if self.form == "script" and not env:
            env = {"LC_ALL": "C.UTF-8"}
        return Command([*words, *form], wrapper=wrapper, env=env)

    def qemus(self) -> list[int]:
        """The machine's QEMUs that there are now, its worker too."""
        found = []
        for process in looks.processes(self.world.root):
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if "-nodefaults" in words and any(f"/{self.known.name}/" in word for word in words):
                found.append(process.pid)
        return found


@dataclass(frozen=True)
class Fault:
    """A kind of trouble; ``weight``: how often it is chosen."""

    name: str
    weight: int
    run: Callable[[Hit, list[str]], Answer]


def undisturbed(hit: Hit, words: list[str]) -> Answer:
    """Nothing."""
    return hit.begin(words).wait()


def controller_dies(hit: Hit, words: list[str]) -> Answer:
    """Kill -9 of the command line."""
    hit.disturbs(alone=False, trusted=False)
    command = hit.begin(words)
    hit.pause()
    command.send(signal.SIGKILL)
    return command.wait()


def qemu_dies(hit: Hit, words: list[str]) -> Answer:
    """Kill -9 of whatever QEMU the machine has then; the command line has to end by itself."""
    hit.disturbs()
    command = hit.begin(words)
    hit.pause()
    hit.world.kill(*hit.qemus())
    return command.wait()


def both_die(hit: Hit, words: list[str]) -> Answer:
    """Both at once."""
    hit.disturbs(alone=False, trusted=False)
    command = hit.begin(words)
    hit.pause()
    found = hit.qemus()
    command.send(signal.SIGKILL)
    hit.world.kill(*found)
    return command.wait()


def host_dies(hit: Hit, words: list[str]) -> Answer:
    """All processes of all machines die, and the run folders are gone."""
    hit.disturbs(alone=False, trusted=False)
    hit.everybody = True
    command = hit.begin(words)
    hit.pause()
    command.send(signal.SIGKILL)
    answer = command.wait()
    hit.world.reboot()
    return answer


def recovery_dies(hit: Hit, words: list[str]) -> Answer:
    """The command line dies, and whoever recovers then, too."""
    hit.disturbs(alone=False, trusted=False)
    command = hit.begin(words)
    hit.pause()
    command.send(signal.SIGKILL)
    answer = command.wait()
    again = hit.begin(["recover", hit.known.name])
    time.sleep(0.03 + hit.which * 0.3)
    again.send(signal.SIGKILL)
    again.wait()
    return answer


def interrupted(hit: Hit, words: list[str]) -> Answer:
    """Ctrl-C; now and then a second one."""
    hit.disturbs()
    command = hit.begin(words)
    hit.pause()
    command.send(signal.SIGINT)
    if hit.which < 0.3:
        time.sleep(0.02 + hit.much * 0.2)
        command.send(signal.SIGINT)
        hit.alone = hit.trusted = False
    answer = command.wait()
    if "in run\n" not in answer.err and (answer.code == -signal.SIGINT or "init_import_site" in answer.err):
        answer = dataclasses.replace(answer, code=-signal.SIGINT, err="")  # Python was still on its way to us
    return answer


def qemu_hangs(hit: Hit, words: list[str]) -> Answer:
    """QEMU is stopped for a moment."""
    hit.disturbs()
    command = hit.begin(words)
    hit.pause()
    found = [psutil.Process(pid) for pid in hit.qemus() if psutil.pid_exists(pid)]
    for process in found:
        process.suspend()
    time.sleep(0.5 + hit.which * 2)
    for process in found:
        if process.is_running():
            process.resume()
    return command.wait()


def two_at_once(hit: Hit, words: list[str]) -> Answer:
    """Another command line for the same machine at the same time: one after the other, or refused."""
    command = hit.begin(words)
    other = hit.second()
    if other is None:
        return command.wait()
    hit.codes, hit.alone, hit.trusted = USUAL | {3}, False, False
    hit.pause()
    answer = hit.begin(other.words).wait()
    first = command.wait()
    for one in (answer, first):
        if one.wrong() or (one.code not in hit.codes and not _saw_the_other(one)):
            return one
    hit.codes |= {first.code}
    return first


def _saw_the_other(answer: Answer) -> bool:
    """A check that tells of nothing but another command line at work."""
    if answer.words[0] != "check" or answer.code != 7:
        return False
    return {found["code"] for found in answer.json()["machines"][0]["findings"]} == {"machine-busy"}


KILLS = (
    Fault("kill controller", 8, controller_dies),
    Fault("kill QEMU", 5, qemu_dies),
    Fault("kill both", 4, both_die),
    Fault("kill all, no run folder", 3, host_dies),
    Fault("kill recovery, too", 4, recovery_dies),
    Fault("Ctrl-C", 5, interrupted),
    Fault("SIGSTOP of QEMU", 2, qemu_hangs),
    Fault("two command lines", 6, two_at_once),
)
