"""The loop: choose, do, disturb, recover, and hold everything against the oracle."""

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.outsider import births, host, looks
from tests.outsider.contents import Unreadable
from tests.outsider.faults import KILLS, Fault, Hit, undisturbed
from tests.outsider.known import Expect, Judge, Known, Violation, both, outcome
from tests.outsider.looks import Lied
from tests.outsider.others import OTHERS
from tests.outsider.typed import Answer, typed
from tests.outsider.verbs import VERBS, Act, Chooser, weights
from tests.outsider.world import World

NONE = Fault("none", 0, undisturbed)
BIRTHS = {"define": 3, "undefine": 3}


@dataclass
class Figures:
    """What was done, and what was found."""

    steps: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    ended: int = 0
    violations: list[str] = field(default_factory=list)

    def table(self) -> str:
        """For people."""
        lines = [f"{'verb':12}{'steps':>7}{'refused':>9}"]
        lines += [f"{verb:12}{self.steps[verb]:7}{self.refused[verb]:9}" for verb in sorted(self.steps)]
        lines += [f"{'fault':20}{'steps':>7}", *(f"{kind:20}{n:7}" for kind, n in sorted(self.faults.items()))]
        lines += [f"recoveries that had something to end: {self.ended}"]
        lines += [f"steps {sum(self.steps.values())}, violations {len(self.violations)}", *self.violations]
        return "\n".join(lines)


Say = Callable[[str], None]


def _nothing(_line: str) -> None:
    """Say nothing."""


class Tester:
    """One seed: a world, and steps in it."""

    def __init__(
        self, seed: int, *, small: bool = True, only: str = "", keep: bool = False, say: Say = _nothing
    ) -> None:
        """``only`` faults of that name, if any; ``keep`` the home of a violation; ``say`` is told each step."""
        self.seed, self.small, self.only, self.keep, self.say = seed, small, only, keep, say
        self.figures = Figures()
        self.took: dict[str, float] = {}
        self.told: list[str] = []
        self.world = World(small=small)
        self.tools = Path(tempfile.mkdtemp(prefix="qo-tools-"))
        kinds = (NONE, *KILLS, *OTHERS, *host.there(self.tools, small=self.world.small))
        self.faults = [fault for fault in kinds if only in ("", fault.name)]
        self._people()

    def _people(self) -> None:
        """Two machines whose disks the tester writes to, and one with a guest that counts."""
        for guest, second in (("still", "qcow2"), ("still", "raw"), ("writer", "qcow2")):
            known = self.world.define(guest, second)
            if second == "qcow2":
                typed("start", known.name, *(["--paused"] if guest == "still" else []))
            self._judge(known, Expect(), "none")

    def close(self) -> None:
        """The end."""
        self.world.close(keep=False)
        shutil.rmtree(self.tools)

    def step(self, number: int) -> None:
        """One of them; a violation is noted, and a new world begins."""
        dice = random.Random(f"{self.seed}/{number}")  # noqa: S311 - reproducible, not secret
        try:
            self._step(number, dice)
        except (Violation, Lied, Unreadable, OSError) as wrong:
            self._violated(number, wrong)

    def _violated(self, number: int, wrong: Exception) -> None:
        told = "\n    ".join(self.told[-12:])
        self.figures.violations.append(f"seed {self.seed} step {number}: {wrong}\n    {told}")
        self.say(self.figures.violations[-1])
        self.world.close(keep=self.keep)
        self.world = World(small=self.small)
        self._people()

    def _step(self, number: int, dice: random.Random) -> None:
        names = sorted(self.world.machines)
        known = self.world.machines[names[int(dice.random() * len(names))]]
        self._write(known, dice)
        chances = {**weights(known), **BIRTHS}
        verb = dice.choices(list(chances), list(chances.values()))[0]
        fault = self._fault(dice)
        chooser = Chooser(self.world, known, dice, number)
        act = self._made(verb, chooser)
        if act is None:
            return
        self.figures.steps[verb] += 1
        usually = self.took.get(verb, 0.7)
        hit = Hit(self.world, act.newborn or known, verb, number, usually, dice, partial(self._second, act, chooser))
        self._do(act, fault, hit)
        if known.spoiled and known.name in self.world.machines:
            self._retire(known)
        if number % 5 == 0 or hit.everybody:
            for other in self.world.machines.values():
                if other is not known:
                    self._judge(other, Expect(), "none")

    def _made(self, verb: str, chooser: Chooser) -> Act | None:
        if verb == "define":
            return births.define(chooser)
        if verb == "undefine":
            return births.undefine(chooser)
        return VERBS[verb][1](chooser)

    def _second(self, act: Act, chooser: Chooser) -> Act | None:
        """Another command line beside the first; what is expected then is of both."""
        if act.newborn or act.gone:
            return None
        chances = weights(chooser.known)
        verb = chooser.dice.choices(list(chances), list(chances.values()))[0]
        other = VERBS[verb][1](Chooser(self.world, chooser.known, chooser.dice, chooser.number + 100_000))
        if other is None or (other.expect.rename and act.expect.rename) or "pop" in (*act.words, *other.words):
            return None  # which snapshot is popped, or has which name, would be anybody's guess
        self.told.append(f"beside: {' '.join(other.words)}")
        act.expect = both(chooser.known, act.expect, other.expect)
        return other

    def _fault(self, dice: random.Random) -> Fault:
        quiet, kinds = dice.random() < 0.4, self.faults
        fault = dice.choices(kinds, [fault.weight for fault in kinds])[0]
        return NONE if quiet and not self.only else fault

    def _write(self, known: Known, dice: random.Random) -> None:
        """What the guest of a machine that stands does between two commands."""
        throws = [(dice.random(), dice.randrange(16), dice.randrange(1, 256)) for _ in range(4)]
        if known.guest != "still":
            return
        for which, at, byte in throws[: 1 + int(throws[0][0] * 4)]:
            self.world.write(known, "vda" if which < 0.5 else "vdb", at, byte)

    def _do(self, act: Act, fault: Fault, hit: Hit) -> None:
        known, verb = hit.known, hit.verb
        before = known.seen.print() if known.seen else ""
        answer = fault.run(hit, act.words)
        said = answer.error.get("message", "") or answer.err[-160:]
        self.told.append(f"{hit.number}: {' '.join(act.words)} [{fault.name}] -> {answer.code} {said[:160]!r}")
        self.say(f"{answer.took:5.2f} s {self.told[-1]}")
        self.figures.faults[fault.name] += 1
        if answer.code == 0:
            self.took[verb] = 0.7 * self.took.get(verb, answer.took) + 0.3 * answer.took
        self.figures.refused[verb] += answer.code == 4
        if wrong := answer.wrong():
            raise Violation(wrong)
        if hit.codes is not None and answer.code not in hit.codes and not self._has_leaks_alone(answer):
            raise Violation(f"exit {answer.code} of {' '.join(answer.words)}: {answer.err[-600:]}{answer.out[-600:]}")
        came = outcome(answer)
        if act.newborn or act.gone:
            self._came_or_went(act, hit, came if hit.trusted else "open", told=answer.err)
            return
        if hit.alone and came == "none" and (after := looks.look(known.name).print()) != before:
            raise Violation(f"it says that nothing was changed: {answer.err[-300:]}\nbefore {before}\nafter {after}")
        if hit.recover:
            self._recover(known.name, hit)
        if hit.everybody:
            self._resume()
        self._judge(known, act.expect, came if hit.trusted else "open", ran=hit.codes is None)

    def _has_leaks_alone(self, answer: Answer) -> bool:
        """A deep check that tells of lost space alone, once a QEMU was killed in this run: that may leave some."""
        kills = sum(self.figures.faults[fault] for fault in ("kill QEMU", "kill both", "kill all, no run folder"))
        if "--deep" not in answer.words or answer.code != 7 or not kills:
            return False
        return {found["code"] for found in answer.json()["machines"][0]["findings"]} == {"image-leaks"}

    def _came_or_went(self, act: Act, hit: Hit, came: str, *, told: str) -> None:
        """A machine that was defined or undefined is there, or not at all, but for files that it has ``told`` of."""
        known = hit.known
        there = known.name in births.names()
        if hit.recover:  # also where no machine is left: its files may be
            self._recover(known.name, hit)
            there = known.name in births.names()
        if came == "done" and there != bool(act.newborn):
            raise Violation(f"{known.name} is {'' if there else 'not '}there after {' '.join(act.words)}")
        if came == "none" and there == bool(act.newborn):
            raise Violation(f"{' '.join(act.words)} has failed, and {known.name} is {'' if there else 'not '}there")
        if there:
            self.world.machines[known.name] = known
            self._judge(known, act.expect, "open")
        else:
            self.world.machines.pop(known.name, None)
            births.gone(self.world, known, kept="--keep-disks" in act.words, born=bool(act.newborn), told=told)

    def _retire(self, known: Known) -> None:
        """Somebody has overwritten its images: it can be given up all the same."""
        if known.running:
            typed("stop", known.name, "--force")
        answer = typed("undefine", known.name, "--remove-disks")
        if answer.code:
            raise Violation(f"{known.name} cannot be given up: exit {answer.code} {answer.err[-300:]}")
        del self.world.machines[known.name]
        births.gone(self.world, known, kept=False, born=False)
        self._judge(self.world.define(known.guest), Expect(), "none")

    def _recover(self, name: str, hit: Hit) -> None:
        """End what is open; who works already, as a guard that has become a recovery, is waited for.

        A job that still works is left alone by recover, which names the two commands that end it.
        """
        deadline = time.monotonic() + 60
        while True:
            answer = self._well("recover", name)
            if answer.code == 0 or (answer.code == 3 and name not in births.names()):
                self.figures.ended += "no operation was open" not in answer.out
                break
            if answer.code == 8 and f"qmpsnap job wait {name}" in answer.err:
                answer = self._well("job", "wait" if hit.which < 0.5 else "cancel", name)
            if answer.code not in {0, 4} or time.monotonic() > deadline:
                raise Violation(f"recover is stuck: exit {answer.code}: {answer.err[-600:]}")
            time.sleep(0.1)
        if name not in births.names():
            return
        if left := looks.open_operations(name):
            raise Violation(f"recovered, and open: {left}")
        first = looks.look(name).print()
        again = typed("recover", name)
        if again.code or looks.look(name).print() != first:
            raise Violation(f"a second recover changes something, or fails: {again.code} {again.err[-300:]}")

    def _well(self, *words: str) -> Answer:
        """A command line after the one that was hit."""
        answer = typed(*words)
        if words[0] == "job":
            self.told.append(f"{' '.join(words)} -> {answer.code} {answer.err[-160:]!r}")
        if wrong := answer.wrong():
            raise Violation(f"{' '.join(words)}: {wrong}")
        return answer

    def _resume(self) -> None:
        """Guests that QEMU has paused over a full disk go on."""
        for row in looks.asked("list", may=(0, 7)).json()["machines"]:
            if row["state"].startswith("paused: ") and (answer := typed("resume", row["name"])).code:
                raise Violation(f"there is room again, and resume fails: {answer.err[-300:]}")

    def _judge(self, known: Known, expect: Expect, came: str, *, ran: bool = False) -> None:
        """``ran``: its QEMU may have died meanwhile."""
        seen = looks.look(known.name)
        Judge(known, seen, expect, came).judge()
        if came == "done" and not ran and expect.running is not None and seen.running != expect.running:
            raise Violation(f"it should {'run' if expect.running else 'stand'}, and is {seen.state}")
        checked = looks.asked("check", known.name, may=(0, 7))
        findings = checked.json()["machines"][0]["findings"] if checked.json()["machines"] else []
        if (findings or checked.code) and not known.spoiled:
            raise Violation(f"check: {[(found['code'], found['found']) for found in findings]} {checked.err[-300:]}")
        rest = [one.seen for one in self.world.machines.values() if one is not known]
        expected = {seen.pid} | {one.pid for one in rest if one}
        if left := self.world.settled({pid for pid in expected if pid}):
            raise Violation(left)
        if seen.pid:
            files = {layer["path"] for chain in seen.chains.values() for layer in chain}
            if extra := looks.opened(seen.pid, self.world.root) - files:
                raise Violation(f"QEMU has open what is no layer of its chains: {sorted(extra)}")
