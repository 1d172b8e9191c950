"""The lines of reading verbs as they are mostly typed, told without argparse, which takes as long as their answers.

Any other line, with an abbreviation, ``--help`` or a mistake, is argparse's to judge.
"""

from __future__ import annotations

from qmpsnap.host.value import Value

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qmpsnap.cli.output import Format

_FORMATS: Mapping[str, Format] = {"table": "table", "json": "json", "name": "name"}
_VERBS = {("list",): 0, ("tree",): 1, ("snapshot", "list"): 1}
"""Each verb, and how many words stand after it besides options."""


class Line(Value):
    """What was typed: the verb, its machine (empty for ``list``, which has none) and the form of the answer."""

    verb: str
    machine: str
    form: Format

    def run(self) -> int:
        """Answer; returns the exit code."""
        if self.verb == "list":
            from qmpsnap.cli.listing import machines

            return machines.show(self.form)
        from qmpsnap.cli.listing import snapshots

        answer = snapshots.draw if self.verb == "tree" else snapshots.show
        answer(self.machine, self.form)
        return 0


def plain(words: Sequence[str]) -> Line | None:
    """The line, where it is one of these."""
    verb = next((verb for verb in _VERBS if tuple(words[: len(verb)]) == verb), ())
    if not verb:
        return None
    given, rest = [], iter(words[len(verb) :])
    form: Format = "table"
    for word in rest:
        if not word.startswith("-"):
            given.append(word)
            continue
        if word in ("-o", "--output"):
            value = next(rest, "")
        else:
            value = word.removeprefix("--output=" if word.startswith("--") else "-o")
        if not (asked := _FORMATS.get(value)):
            return None
        form = asked
    return Line(" ".join(verb), "".join(given), form) if len(given) == _VERBS[verb] else None
