"""Turns of phrase that a reader stumbles over: none in the pages and messages.

The patterns are extended regular expressions, so that ``grep -nE`` takes them as well.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[el]*/README.md"), *(ROOT / "docs").rglob("*.md")])
MODULES = sorted((ROOT / "qmpsnap").rglob("*.py"))
MADE = re.compile(r"^```.*?^```|<!-- (?:parser|findings).*?<!-- end -->|`[^`\n]*`", re.DOTALL | re.MULTILINE)
"""What is no sentence of a page's own: code, output, and what is made from the code."""
_BEGIN = r"(^|[.:;|(] )(- |\| |\*\*)*"
_THING = "(marks?|tags?|layers?|files?|copy|copies|memory|snapshots?|disks?|names?)"
PATTERNS = {
    "a free relative as subject": [
        r"\b[Ww]hoever\b",
        rf"{_BEGIN}Who [a-z]",
        rf"{_BEGIN}[Ww]hat [^.?|]* (is|was|are|were|has|had|stays|goes|counts)\b[^?|]*([.:]|$)",
    ],
    "an inverted conditional": [
        rf"({_BEGIN}|[,;] )[Ss]hould (a|an|the|it|we|you|they|that|this|all|QEMU|qmpsnap)\b",
        rf"{_BEGIN}(Were|Had) (a|an|the|it|we|you|they|QEMU|qmpsnap)\b",
    ],
    "a verb of motion for a state": [
        rf"\b{_THING} goe?s?( (again|along|away|first|inside|too|with)\b|[.,;]|$)",
        r"\bgoes?( (inside|along)\b|\.)",
        r"\bstands? (still|on)\b",
        r"\bstays? what (it|they)\b",
        r"\bcomes? (of it|out of it)\b",
    ],
    "a clause without a verb": [
        rf"{_BEGIN}(Also|As|Back|Else|Forward|Likewise|Nor|Not|Nothing|Same|Too)( [^ .;:?]+){{0,4}}[.;]( |$)",
        r"[;,:] (and |or |else )?(back|forward|no others|no other|nothing)([.;]|$)",
    ],
    "it or that without an antecedent": [
        r"\b(that|this|which|it) is (said|told|so)([.,;:]|$)",
        r"\bis (so|none) now\b",
        rf"{_BEGIN}(It|That) (counts|goes|stands|tells)\b",
        r"; (it|that) is (done|ended|refused|undone)\b",
        r"\bis to go\b",
    ],
    "a private word for QEMU's own": [
        r"\bguest (is|was|were) held\b",
        r"\bhold(s|ing)? (a|the) guest\b",
        r"\b(of|by) (ours|theirs)\b",
        r"\bas at (its|their) moment\b",
        r"\bguest (sleeps|slept|is asleep)\b",
    ],
}
BAD = """\
Who comes second is refused.
Whoever was cancelled meanwhile is so now.
What is loaded was read and compared first.
what lies there is removed
The marks go again.
A tag inside goes.
disks that have moved stay moved, and the tag goes
Should we die it thaws.
Should the save fail, the guest runs on.
Were it full, the job would pause.
Its memory goes inside, too.
It stands still.
machine web stands on snapshot s1
Layers that a clone reads stay what they are.
Each kind has its steps, and no others.
Is it written whole, forward; else back.
Also of a stopped machine.
A guest that slept sleeps on, and that is said.
It refuses by itself; that is undone.
The guest is held for it.
Layers of ours.
It reads as at its moment."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_has_a_pattern_to_drop(page: Path) -> None:
    text = MADE.sub("CODE", page.read_text())
    lines = re.sub(r"(?<=[^\n|])\n(?=[^\n#|<*-])", " ", text).splitlines()  # a paragraph is one line
    assert [found for line in lines if not line.startswith("#") for found in _found(line)] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_no_message_hint_or_help_text_has_a_pattern_to_drop(module: Path) -> None:
    assert [found for text in _texts(ast.parse(module.read_text())) for found in _found(text)] == []


@pytest.mark.parametrize("sentence", BAD.splitlines())
def test_the_patterns_find_what_they_are_for(sentence: str) -> None:
    assert _found(sentence)


def test_texts_of_a_module_are_found() -> None:
    module = 'def f() -> None:\n    """Who reads it."""\n    raise E(f"{vm} stands on {s}", hint="the tag" " goes")\n'
    assert [bool(_found(text)) for text in _texts(ast.parse(module))] == [True, True]


def _found(text: str) -> list[str]:
    """Each pattern that a sentence has, with its surroundings."""
    return [
        f"{kind}: {text[max(hit.start() - 40, 0) : hit.end() + 40]}"
        for kind, patterns in PATTERNS.items()
        for pattern in patterns
        for hit in re.finditer(pattern, text)
    ]


def _texts(node: ast.AST) -> Iterator[str]:
    """What a module says to its users: its strings of several words, without docstrings; VALUE where one is put in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "VALUE" for part in child.values]
            yield " ".join("".join(map(str, parts)).split())
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            if " " in child.value:
                yield " ".join(child.value.split())
        else:
            yield from _texts(child)


def test_no_page_uses_a_word_for_what_the_glossary_calls_otherwise() -> None:
    glossary = (ROOT / "docs" / "explanation" / "glossary.md").read_text()
    rows = [line.split("|")[1:4] for line in glossary.splitlines() if line.startswith("| ")]
    avoided = [word.strip() for *_, last in rows if last.strip() != "not" for word in last.split(",") if word.strip()]
    assert len(avoided) > 8
    others = {"from-libvirt.md", "from-proxmox-incus.md"}  # they speak of others' words
    folders = ("tutorial", "how-to", "reference", "explanation")
    pages = [ROOT / "README.md", ROOT / "docs" / "troubleshooting.md"]
    pages += [page for folder in folders for page in (ROOT / "docs" / folder).glob("*.md")]
    texts = {page.name: MADE.sub("", page.read_text()) for page in pages if page.name not in others}
    texts["glossary.md"] = "\n".join(f"{word} {meaning}" for word, meaning, _ in rows)
    used = {(name, word) for name, text in texts.items() for word in avoided if re.search(rf"\b{word}s?\b", text)}
    assert used == set()
