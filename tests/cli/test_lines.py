"""The lines of reading verbs that are told without argparse are what argparse takes them for."""

from itertools import product

import pytest

from qmpsnap.cli.command_line import parser
from qmpsnap.cli.listing.lines import Line, plain

WORDS = (
    "list", "tree", "snapshot", "web", "", "-", "--", "-o", "json", "-ojson", "-o=json", "-otab", "--output",
    "--output=name", "--out=name", "-h", "x y",
)  # fmt: skip
VERBS = {("list",), ("tree",), ("snapshot", "list")}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_line_that_is_plain_is_what_argparse_takes_it_for(verb: tuple[str, ...]) -> None:
    parsed = parser(verb[0])
    seen = set()
    for length in range(4):
        for rest in product(WORDS, repeat=length):
            if line := plain([*verb, *rest]):
                arguments = parsed.parse_args([*verb, *rest])
                assert line == Line(" ".join(verb), getattr(arguments, "machine", ""), arguments.output), rest
                seen.add(rest)
    assert len(seen) > 4


@pytest.mark.parametrize(
    "words", [(), ("list", "web"), ("tree",), ("show", "web"), ("snapshot", "show", "web"), ("-ojson", "list")]
)
def test_other_lines_are_for_argparse(words: tuple[str, ...]) -> None:
    assert plain(words) is None


def test_the_usual_ones_are_plain() -> None:
    assert plain(["list"]) == Line("list", "", "table")
    assert plain(["tree", "web", "-o", "name"]) == Line("tree", "web", "name")
    assert plain(["snapshot", "list", "--output=json", "web"]) == Line("snapshot list", "web", "json")
