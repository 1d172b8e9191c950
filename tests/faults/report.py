"""What a run of faults comes to: a table of faults and verbs, and the steps that no case came by."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from qmpsnap.model.operations import steps

COLUMNS = (
    "define",
    "create",
    "create full",
    "create internal",
    "save",
    "revert",
    "commit",
    "stream",
    "delete",
    "mirror",
    "resize",
    "undefine",
    "fork",
    "others",
)
"""The verbs; others: start, stop, rename of a snapshot and of a machine, disk attach and detach, recover, relocate,
check --repair."""


ELSEWHERE = frozenset({"flatten"})
"""Verbs whose steps have their faults where the storage is: tests/live/test_volumes_rbd.py."""


class Fault:
    """One case tells what it is and what it came by; it travels with the test's report."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    def case(self, fault: str, verb: str) -> None:
        """It is a case of this fault and this verb."""
        assert verb in COLUMNS
        self._record("fault", fault)
        self._record("verb", verb)

    def reached(self, verb: str, step: str) -> None:
        """An operation of this verb was hit at this step."""
        self._record("step", f"{verb}/{step}")

    def claim(self) -> None:
        """What was said to have come of the verb was compared with what has."""
        self._record("claim", "")

    def together(self, cases: int, *, violations: int, claims: int) -> None:
        """The test was so many cases at once, so many of them violations, and in so many a claim was compared."""
        self._record("together", (cases, violations, claims))

    def too_late(self) -> None:
        """The fault found the verb over already: no case."""
        self._record("too late", "")


class Tally:
    """Cases and violations by fault and verb, and the steps that were hit."""

    def __init__(self) -> None:
        self.cases: Counter[tuple[str, str]] = Counter()
        self.violations: Counter[tuple[str, str]] = Counter()
        self.claims: Counter[str] = Counter()
        self.steps: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, properties: Iterable[tuple[str, Any]], *, violated: bool) -> None:
        """One test's end."""
        properties = list(properties)
        told = dict(properties)
        if "fault" not in told or ("too late" in told and not violated):
            return
        cell = (str(told["fault"]), str(told["verb"]))
        cases, violations, claims = told.get("together", (1, int(violated), int("claim" in told)))
        self.cases[cell] += cases
        self.violations[cell] += max(violations, int(violated))
        self.claims[cell[1]] += claims
        for name, value in properties:
            if name == "step":
                verb, _, step = str(value).partition("/")
                self.steps[verb].add(step)

    def uncovered(self) -> list[str]:
        """The registered steps that no case came by."""
        return [
            f"{verb}: {step.name}"
            for verb, known in steps.STEPS.items()
            for step in known
            if verb not in ELSEWHERE and step.name not in self.steps[verb]
        ]

    def table(self) -> str:
        """Cases by fault and verb; violations behind a stroke where there are any."""
        faults = sorted({fault for fault, _ in self.cases})
        verbs = [verb for verb in COLUMNS if any(self.cases[fault, verb] for fault in faults)]
        rows = [["fault", *verbs, "cases", "violations"]]
        for fault in faults:
            cells = [self._cell(self.cases[fault, verb], self.violations[fault, verb]) for verb in verbs]
            rows.append([fault, *cells, *self._sums((fault, verb) for verb in verbs)])
        sums = [self._cell(*map(int, self._sums((fault, verb) for fault in faults))) for verb in verbs]
        rows.append(["all", *sums, *self._sums(self.cases)])
        if compared := sum(self.claims.values()):
            claims = [str(self.claims[verb] or "-") for verb in verbs]
            rows.append(["of them with a claim compared", *claims, str(compared), ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        return "\n".join(lines)

    def _sums(self, cells: Iterable[tuple[str, str]]) -> list[str]:
        found = list(cells)
        return [str(sum(counter[cell] for cell in found)) for counter in (self.cases, self.violations)]

    @staticmethod
    def _cell(cases: int, violations: int) -> str:
        return "-" if not cases else f"{cases}/{violations}" if violations else str(cases)
