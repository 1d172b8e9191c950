"""docs/architecture.md draws the layers that import-linter enforces, and names only files that there are."""

import re
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
CONTRACTS = [
    contract
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
]
BLOCK = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)


def drawn(container: str, layers: list[str]) -> str:
    """The drawing of one contract: a box for each layer, an arrow down to the next."""
    lines = [f"%% {container}", "flowchart TD"]
    lines += [f'    l{number}["{layer.replace(" | ", " · ")}"]' for number, layer in enumerate(layers)]
    lines += [f"    l{upper} --> l{lower}" for upper, lower in pairwise(range(len(layers)))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["containers"][0])
def test_the_page_draws_the_contract(contract: dict[str, list[str]]) -> None:
    (container,) = contract["containers"]
    expected = drawn(container, contract["layers"])
    assert expected in BLOCK.findall(PAGE.read_text()), f"put this into the page:\n{expected}"


def test_nothing_else_is_drawn_as_enforced() -> None:
    enforced = {contract["containers"][0] for contract in CONTRACTS}
    assert set(re.findall(r"^%% (\S+)$", PAGE.read_text(), re.MULTILINE)) == enforced


def test_the_files_that_it_names_are_there() -> None:
    named = set(re.findall(r"`((?:qmpsnap|tests|scripts|docs|launch|examples)/[\w./-]*)`", PAGE.read_text()))
    assert len(named) > 20
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    folders = {str(path.parent.relative_to(ROOT)) + "/" for path in ROOT.glob("qmpsnap/**/__init__.py")}
    assert sorted(folders - named - {"qmpsnap/"}) == [], "folders that the page does not mention"


def test_no_folder_and_no_module_is_too_large_to_see_through() -> None:
    """A reason for a longer module stands in its first line; those that are written by a program have one."""
    modules = [path for path in (ROOT / "qmpsnap").rglob("*.py") if path.name != "__init__.py"]
    crowded = {folder: number for folder, number in Counter(path.parent for path in modules).items() if number > 16}
    assert crowded == {}
    long = {path.name: size for path in modules if (size := len(path.read_text().splitlines())) > 400}
    assert {name for name in long if not (ROOT / "qmpsnap" / "sync" / name).exists()} == set()
