"""The documentation against what it speaks of: golden files, spec keys, variables, links, names of tests."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpsnap
from qmpsnap import errors
from qmpsnap.api.controller import Controller
from qmpsnap.api.machine_handle import MachineHandle
from qmpsnap.cli.command_line import parser
from qmpsnap.machine.config import specfile
from qmpsnap.machine.config.launch_dir import launch_dir
from qmpsnap.machine.config.shapes import MachineShape
from qmpsnap.model.machines.spec import DiskSpec, Forward, MachineSpec, NicSpec
from tests.api.described import public

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[el]*/README.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#]*)(?:#([^)]*))?\)")
VARIABLE = re.compile(r"QMPSNAP_[A-Z_]+")


def test_the_readme_shows_the_tree_as_it_is_printed() -> None:
    golden = (ROOT / "tests" / "cli" / "golden" / "tree.table").read_text()
    assert f"```\n{golden}```\n" in (ROOT / "README.md").read_text()


def test_the_figures_of_the_readme_are_those_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    tested = (ROOT / "docs" / "explanation" / "testing.md").read_text()  # what scripts/faults --short printed
    paused = (ROOT / "docs" / "explanation" / "snapshots.md").read_text()  # what scripts/bench pause printed
    cases = re.search(r"^\| all \|.* (\d+) \| (\d+) \|$", tested, re.MULTILINE)
    pause = re.search(r"^\| 256 MiB \| [^|]+\| \d+ \| (\d+) \|.* (\d+) \|$", paused, re.MULTILINE)
    assert cases
    assert pause
    assert f"runs {cases[1]} fault cases against that, with {cases[2]} violations" in " ".join(readme.split())
    assert f"a pause of {pause[1]} ms instead of the {pause[2]} ms of a stopped save" in " ".join(readme.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        assert found.is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


NEWCOMER = {
    "what decides which layers `delete` merges": ("docs/architecture.md", r"\| what `delete` merges .*merging\.py"),
    "where a step of the journal is added": ("docs/architecture.md", r"\| a step of the journal .*steps\.py"),
    "what exit 8 means": ("docs/reference/errors.md", r"\| 8 \| an operation is open"),
    "how a revert is undone": ("docs/tutorial/first-machine.md#undo-the-revert", r"## Undo the revert\n"),
}
"""What somebody new looks for: the page that says it, and how it begins there."""


@pytest.mark.parametrize("question", NEWCOMER)
def test_one_link_of_the_readme_leads_to_the_answer(question: str) -> None:
    target, answer = NEWCOMER[question]
    assert f"]({target})" in (ROOT / "README.md").read_text()
    assert re.search(answer, (ROOT / target.partition("#")[0]).read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_tree_that_is_named_is_there(page: Path) -> None:
    named = set(
        re.findall(r"(?<![\w/.-])(?:tests|scripts|qmpsnap|docs|launch|examples)/[\w@./-]*[\w]", page.read_text())
    ) - {"qmpsnap/1"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_fit(page: Path) -> None:
    text = re.sub(r"^```console\n.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)  # as it is printed
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("of", [MachineSpec, DiskSpec, NicSpec, Forward])
def test_every_key_of_a_spec_is_described(of: type) -> None:
    text = (ROOT / "docs" / "reference" / "spec.md").read_text()
    fields = {*of.__struct_fields__} | ({"profile"} if of is MachineSpec else set())  # type: ignore[attr-defined]
    fields.discard("tcg_cpu")  # what define records is no key
    missing = [field for field in fields if not re.search(rf"^\| `{field.replace('_', '-')}`", text, re.MULTILINE)]
    assert missing == []


def test_every_described_key_of_a_machine_is_one() -> None:
    text = (ROOT / "docs" / "reference" / "spec.md").read_text()
    table = text.partition("## The machine")[2].partition("\n## ")[0]
    described = set(re.findall(r"^\| `([a-z-]+)`", table, flags=re.MULTILINE))
    assert described == {field.replace("_", "-") for field in MachineShape.__struct_fields__}


def test_the_example_of_a_spec_is_one(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "reference" / "spec.md").read_text(), flags=re.DOTALL)
    assert example
    file = tmp_path / "web.yaml"
    file.write_text(example[1])
    spec = specfile.read(file, guest_dir=tmp_path, profile_dir=launch_dir() / "profiles")
    assert (spec.name, spec.firmware, [disk.name for disk in spec.disks]) == ("web", "uefi", ["vda", "data"])


def test_every_profile_is_described() -> None:
    text = (ROOT / "docs" / "reference" / "spec.md").read_text()
    for profile in (launch_dir() / "profiles").glob("*.yaml"):
        assert f"| `{profile.stem}`" in text


def test_every_variable_is_described_and_no_other() -> None:
    described = set(VARIABLE.findall((ROOT / "docs" / "reference" / "spec.md").read_text()))
    read = {name for path in (ROOT / "qmpsnap").rglob("*.py") for name in VARIABLE.findall(path.read_text())}
    assert described == read


def test_every_error_class_is_drawn() -> None:
    drawn = set(re.findall(r"^ *[│├└─ ]*(\w+) +\d+\b", errors.__doc__ or "", flags=re.MULTILINE))
    classes = {
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, errors.QmpsnapError)
    }
    assert drawn == classes


@pytest.mark.parametrize(("letter", "of"), [("q", Controller), ("vm", MachineHandle)])
def test_the_python_page_tells_every_method(letter: str, of: type) -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    methods = set(public(of))
    assert methods == set(
        re.findall(rf"^(?:await |async with |async for \w+ in )?{letter}\.(\w+)\(", page, flags=re.MULTILINE)
    )


def test_all_that_is_public_can_be_imported() -> None:
    assert [name for name in qmpsnap.__all__ if not hasattr(qmpsnap, name)] == []


def test_every_message_of_the_troubleshooting_page_is_one() -> None:
    texts = [text for path in (ROOT / "qmpsnap").rglob("*.py") for text in _texts(ast.parse(path.read_text()))]
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## By message")[2]
    messages: list[str] = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 40
    pattern = {message: ".*".join(map(re.escape, message.split("..."))) for message in messages}
    assert [message for message in messages if not any(re.search(pattern[message], text) for text in texts)] == []


def _texts(module: ast.AST) -> Iterator[str]:
    """Every string of a module; of an f-string what stands between its values."""
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_exit_code_has_a_row_in_troubleshooting() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    codes = {
        found.exit_code
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, errors.QmpsnapError)
    }
    assert [code for code in codes if f"\n| {code} |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_script_is_one(page: Path) -> None:
    for script in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for line in re.findall(r"(?:^|\$\(|\|\| )(qmpsnap [^|\n]*)", script, flags=re.MULTILINE):
            parser().parse_args(shlex.split(line)[1:])
