"""Turns of phrase that a reader stumbles over: none in the README and the pages of the docs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tutorial", "how-to", "reference", "explanation")
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "docs" / "troubleshooting.md",
        *(page for folder in FOLDERS for page in (ROOT / "docs" / folder).glob("*.md")),
    ]
)
MADE = re.compile(r"^```.*?^```|<!-- (?:parser|findings).*?<!-- end -->|`[^`\n]*`", re.DOTALL | re.MULTILINE)
"""What is no sentence of a page's own: code, output, and what is made from the code."""
_BEGIN = r"(?:^|[.:;|(] )(?:- |\| |\*\*)*"
PATTERNS = {
    "a free relative as subject": [
        rf"{_BEGIN}Who(?:ever)? \w",
        r"\b[Ww]hoever\b",
        rf"{_BEGIN}What [^.?|\n]* (?:is|was|are|were|has|had|stays|goes|counts)\b[^?|\n]*[.:]",
    ],
    "an inverted conditional": [
        rf"(?:{_BEGIN}|[,;] )[Ss]hould (?:a|an|the|it|we|you|they|that|this|all|QEMU|qmpsnap)\b"
    ],
    "a verb of motion for a state": [
        r"\b(?:mark|tag|layer|file|cop(?:y|ie)|memory|snapshot|disk|name)s? go(?:es)?\b(?! (?:up|back|on)\b)",
        r"\bgoes?(?: (?:inside|along)\b|\.)",
        r"\bstands? still\b",
        r"\bstays? what (?:it|they)\b",
    ],
    "a private word for QEMU's own": [
        r"\bguest (?:is|was|were) held\b",
        r"\bhold(?:s|ing)? (?:a|the) guest\b",
        r"\b(?:of|by) (?:ours|theirs)\b",
        r"\bas at (?:its|their) moment\b",
    ],
    "a passive without an actor": [r"\b(?:that|this|which) is (?:said|told)\b", r"\bis to go\b"],
}
BAD = """\
Who comes second is refused.
Whoever was cancelled meanwhile is so now.
What is loaded was read and compared first.
The marks go again.
A tag inside goes.
Should we die it thaws.
Should the save fail, the guest runs on.
Its memory goes inside, too.
The guest is held for it.
It stands still.
Layers of ours.
Layers that a clone reads stay what they are.
A guest that slept sleeps on, and that is said.
It reads as at its moment."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_has_a_pattern_to_drop(page: Path) -> None:
    text = MADE.sub("CODE", page.read_text())
    lines = re.sub(r"(?<=[^\n|])\n(?=[^\n#|<*-])", " ", text).splitlines()  # a paragraph is one line
    found = [
        f"{kind}: {line[max(hit.start() - 40, 0) : hit.end() + 40]}"
        for line in lines
        if not line.startswith("#")
        for kind, patterns in PATTERNS.items()
        for pattern in patterns
        for hit in re.finditer(pattern, line)
    ]
    assert found == []


@pytest.mark.parametrize("sentence", BAD.splitlines())
def test_the_patterns_find_what_they_are_for(sentence: str) -> None:
    assert any(re.search(pattern, sentence) for patterns in PATTERNS.values() for pattern in patterns)


def test_no_page_uses_a_word_for_what_the_glossary_calls_otherwise() -> None:
    glossary = (ROOT / "docs" / "explanation" / "glossary.md").read_text()
    rows = [line.split("|")[1:4] for line in glossary.splitlines() if line.startswith("| ")]
    avoided = [word.strip() for *_, last in rows if last.strip() != "not" for word in last.split(",") if word.strip()]
    assert len(avoided) > 8
    others = {"from-libvirt.md", "from-proxmox-incus.md"}  # they speak of others' words
    texts = {page.name: MADE.sub("", page.read_text()) for page in PAGES if page.name not in others}
    texts["glossary.md"] = "\n".join(f"{word} {meaning}" for word, meaning, _ in rows)
    used = {(name, word) for name, text in texts.items() for word in avoided if re.search(rf"\b{word}s?\b", text)}
    assert used == set()
