"""Every command explains itself; docs/reference has exactly the commands, options and exit codes there are."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap import errors
from qmpsnap.cli.command_line import EXIT_CODES, NOUNS, parser
from qmpsnap.cli.main import main
from qmpsnap.errors import QmpsnapError

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def commands(top: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command of the parser, groups such as ``snapshot`` included, with its words."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                assert helps.get(name), f"{name} has no help"
                yield " ".join((*path, name)), command
                yield from commands(command, (*path, name))


COMMANDS = dict(commands(parser()))
LEAVES = {name: command for name, command in COMMANDS.items() if command.get_default("run")}


def families() -> Iterator[type[QmpsnapError]]:
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, QmpsnapError):
            yield found


def sections() -> dict[str, str]:
    """docs/reference/cli.md by its headings of commands: ``### `qmpsnap snapshot create```; aliases share a section."""
    parts = re.split(r"^#{2,3} (.+)$", (REFERENCE / "cli.md").read_text(), flags=re.MULTILINE)
    found = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        for words in re.findall(r"`qmpsnap ([a-z -]+)`", heading):
            found[words] = text
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    assert command.description
    for action in command._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), f"{action.dest} has no help"
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    assert command.description in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("noun", NOUNS)
def test_a_noun_has_the_commands_it_is_looked_up_by(noun: str) -> None:
    for command in NOUNS[noun]:
        found = dict(commands(parser(command)))
        assert tuple(name for name in found if " " not in name) == NOUNS[noun]
        assert {name: made.format_help() for name, made in found.items()} == {
            name: made.format_help() for name, made in COMMANDS.items() if name.split()[0] in NOUNS[noun]
        }


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert EXIT_CODES in capsys.readouterr().out


def test_every_command_is_in_the_docs_and_no_other() -> None:
    assert sorted(sections()) == sorted(LEAVES)


@pytest.mark.parametrize("name", LEAVES)
def test_the_docs_tell_every_option(name: str) -> None:
    text = sections()[name]
    for action in LEAVES[name]._actions:
        longest = max(action.option_strings, key=len, default="")
        if longest != "--help":
            assert (longest or str(action.metavar or action.dest)) in text, action.option_strings
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    known = {option for command in COMMANDS.values() for action in command._actions for option in action.option_strings}
    assert told <= known


@pytest.mark.parametrize("family", list(families()), ids=lambda family: family.__name__)
def test_the_docs_tell_every_error(family: type[QmpsnapError]) -> None:
    row = re.search(rf"^\|[^|]*`{family.code}`[^|]*\|(.*)$", (REFERENCE / "errors.md").read_text(), re.MULTILINE)
    assert row, f"errors.md has no row for {family.code}"
    exit_code, exception = (cell.strip() for cell in row[1].split("|")[:2])
    assert (exit_code, exception) == (str(family.exit_code), f"`{family.__name__}`")
    assert str(family.exit_code) in EXIT_CODES


def test_codes_are_told_apart() -> None:
    codes = [family.code for family in families()]
    assert len(codes) == len(set(codes))
