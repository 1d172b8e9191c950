"""People who know virsh: what they type is accepted, or answered with our word."""

import re
import shlex

import pytest

from qmpsnap.cli import virsh
from qmpsnap.cli.command_line import NOUNS, parser
from qmpsnap.errors import UsageError

LINES = {
    "blockcommit": "blockcommit web vda --base b --top t",
    "blockpull": "blockpull web vda --base b --bandwidth 10M",
    "blockcopy": "blockcopy web vda /copy --finish",
    "blockresize": "blockresize web vda 20G",
}


@pytest.mark.parametrize("name", virsh.HARMLESS)
def test_what_always_is_so_is_accepted_of_the_names_of_virsh(name: str) -> None:
    words = [*LINES[name].split(), *virsh.HARMLESS[name]]
    assert parser(name).parse_args(words).machine == "web"
    ours = {"blockcommit": "commit", "blockpull": "stream", "blockcopy": "mirror", "blockresize": "resize"}[name]
    with pytest.raises(UsageError) as refused:
        parser(ours).parse_args([ours, *words[1:]])
    unknown = [option for option in virsh.HARMLESS[name] if option in refused.value.message]
    assert unknown
    assert all(f"virsh's {option}: " in refused.value.hint for option in unknown if option in virsh.OPTIONS)


@pytest.mark.parametrize("verb", virsh.VERBS)
def test_another_name_is_answered_with_ours(verb: str) -> None:
    with pytest.raises(UsageError, match=f"unknown command '{verb}'") as refused:
        parser(verb).parse_args([verb, "web"])
    assert refused.value.hint == f"virsh's {verb} is qmpsnap {virsh.VERBS[verb]}"


@pytest.mark.parametrize("verb", virsh.SHORT)
def test_a_verb_without_its_noun_is_answered_with_both(verb: str) -> None:
    with pytest.raises(UsageError, match=f"unknown command '{verb}'") as refused:
        parser(verb).parse_args([verb, "web"])
    assert refused.value.hint == f"it is qmpsnap {virsh.SHORT[verb]}"


def test_the_names_that_are_answered_with_exist() -> None:
    known = {command for commands in NOUNS.values() for command in commands}
    for line in (*virsh.VERBS.values(), *virsh.SHORT.values()):
        for words in map(shlex.split, re.split(", (?:or |then )?", line)):
            given = [word.replace("VM", "web").replace("SPEC", "web.yaml").replace("BYTES", "10M") for word in words]
            assert "run" in parser(*given[:2]).parse_args(given)
    assert not known & (virsh.VERBS.keys() | virsh.SHORT.keys())


def test_a_word_of_nobody_is_not_answered() -> None:
    with pytest.raises(UsageError) as refused:
        parser("snapshot", "create").parse_args(["snapshot", "create", "web", "s1", "--atomic", "--colour=x"])
    assert refused.value.hint == f"for virsh's --atomic: {virsh.OPTIONS['--atomic']}"
    with pytest.raises(UsageError, match="did you mean 'snapshot'") as refused:
        parser("snapshots").parse_args(["snapshots", "web"])
    assert refused.value.hint == "see qmpsnap --help"
