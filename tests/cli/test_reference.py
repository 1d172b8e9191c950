"""The parts of docs/reference that are made from the code: every command's arguments, every finding.

``QMPSNAP_GOLDEN=write`` writes them into the pages, and fails: a run that writes is no test.
"""

import argparse
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpsnap.model.finding import KINDS
from tests.cli.test_help import LEAVES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
COMMAND = re.compile(r"<!-- parser: (?P<command>[a-z -]+) -->\n.*?<!-- end -->", re.DOTALL)
FINDINGS = re.compile(r"<!-- findings -->\n.*?<!-- end -->", re.DOTALL)


def test_the_command_line_page_has_what_the_parser_says() -> None:
    _hold(REFERENCE / "cli.md", COMMAND, lambda block: _command(block["command"]))


def test_every_command_has_its_block_and_an_alias_that_of_its_command() -> None:
    blocks = [block["command"] for block in COMMAND.finditer((REFERENCE / "cli.md").read_text())]
    aliases = {name for name, command in LEAVES.items() if str(command.description).startswith("the same as ")}
    assert sorted(blocks) == sorted(LEAVES.keys() - aliases)


def test_the_page_of_findings_has_every_kind() -> None:
    page = REFERENCE / "findings.md"
    assert len(FINDINGS.findall(page.read_text())) == 1
    _hold(page, FINDINGS, lambda _: _findings())


def _hold(page: Path, part: re.Pattern[str], make: Callable[[re.Match[str]], str]) -> None:
    text = page.read_text()
    made = part.sub(make, text)
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        page.write_text(made)
        pytest.fail(f"wrote {page}: read the difference, then run without QMPSNAP_GOLDEN")
    assert text == made, "QMPSNAP_GOLDEN=write writes it"


def _findings() -> str:
    rows = [
        f"| `{code}` | {kind.invariant} | {_cell(kind.means)} | {_cell(kind.repair)} |" for code, kind in KINDS.items()
    ]
    head = ["| finding | | meaning | with `--repair` |", "|---|---|---|---|"]
    return "\n".join(["<!-- findings -->", *head, *rows, "<!-- end -->"])


def _command(name: str) -> str:
    command = LEAVES[name]
    actions = [action for action in command._actions if action.dest != "help"]
    rows = [f"| `{_cell(_spelled(action))}` | {_cell(str(action.help))} |" for action in actions]
    lines = ["```text", _synopsis(name, command, actions), "```", "", f"{_sentence(str(command.description))}.", ""]
    table = ["| argument | meaning |", "|---|---|", *rows, ""]
    return "\n".join([f"<!-- parser: {name} -->", *lines, *table, "<!-- end -->"])


def _synopsis(name: str, command: argparse.ArgumentParser, actions: list[argparse.Action]) -> str:
    groups = {id(action): group for group in command._mutually_exclusive_groups for action in group._group_actions}
    words = []
    for action in sorted(actions, key=lambda action: not action.option_strings):  # options first, as argparse has it
        group = groups.get(id(action))
        if group is None:
            words.append(_word(action))
        elif action is group._group_actions[0]:
            inside = " | ".join(_option(member) for member in group._group_actions)
            words.append(f"({inside})" if group.required else f"[{inside}]")
    begin = f"qmpsnap {name} "
    line = begin + " ".join(word.replace(" ", "\0") for word in words)  # a word is never broken
    lines = textwrap.wrap(line, 100, subsequent_indent=" " * len(begin), break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def _word(action: argparse.Action) -> str:
    if action.option_strings:
        return f"[{_option(action)}]" + ("..." if isinstance(action, argparse._AppendAction) else "")
    value = _value(action)
    return {"?": f"[{value}]", "+": f"{value}..."}.get(str(action.nargs), value)


def _option(action: argparse.Action) -> str:
    return f"{action.option_strings[0]} {_value(action)}".rstrip()


def _spelled(action: argparse.Action) -> str:
    return f"{', '.join(action.option_strings)} {_value(action)}".strip()


def _value(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(action.choices)
    return str(action.metavar or "") if action.nargs == 0 or action.metavar else action.dest


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
