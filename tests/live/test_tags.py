"""What is said of snapshots: descriptions and tags, given with the snapshot or later, and lists that go by them."""

import json
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import NotFoundError, UsageError
from qmpsnap.model.tags import MAX_TAGS, MAX_VALUE
from tests.live.test_dry_runs import dry, told

SPEC = "name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n"


@pytest.fixture
def still(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A machine with the branches a - b - c and a - d, of which b, c and the internal d have tags."""
    spec = tmp_path / "s.yaml"
    spec.write_text(SPEC)
    for line in (
        f"define {spec}",
        "snapshot create still a -m first",
        "snapshot create still b --tag env=prod --tag keep=",
        "snapshot create still c --tag env=test",
        "snapshot revert still a --discard",
        "snapshot create still d --kind internal --tag env=prod",
    ):
        told(capsys, line)
    return home


def listed(capsys: pytest.CaptureFixture[str], words: str = "") -> list[str]:
    return str(told(capsys, f"snapshot list still -o name {words}")).split()


@pytest.mark.usefixtures("still")
def test_lists_go_by_tags(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys) == ["a", "b", "c", "d"]
    assert listed(capsys, "--tag env=prod") == ["b", "d"]
    assert listed(capsys, "--tag env") == ["b", "c", "d"]
    assert listed(capsys, "--tag env=prod --tag keep") == ["b"]
    assert listed(capsys, "--tag none") == []
    found = told(capsys, "snapshot list still --tag keep -o json")["snapshots"]
    assert [(one["name"], one["tags"]) for one in found] == [("b", {"env": "prod", "keep": ""})]
    table = told(capsys, "snapshot list still").splitlines()
    assert [line.split()[-1] for line in table] == ["TAGS", "-", "keep=", "env=test", "env=prod"]
    assert "tags:         env=test\n" in told(capsys, "snapshot show still c")
    assert "tags:" not in told(capsys, "snapshot show still a")


@pytest.mark.usefixtures("still")
def test_a_tree_of_tags_has_what_leads_to_them_and_to_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(words: str) -> list[str]:
        return [line.split("── ")[1].split()[0] for line in told(capsys, f"tree still {words}").splitlines()[1:]]

    assert drawn("") == ["a", "b", "c", "d", "(current,"]
    assert drawn("--tag env=test") == ["a", "b", "c", "d", "(current,"]
    assert drawn("--tag keep") == ["a", "b", "d", "(current,"]
    assert drawn("--tag none") == ["a", "d", "(current,"]
    assert [one["name"] for one in told(capsys, "tree still --tag keep -o json")["snapshots"]] == ["a", "b", "d"]
    assert "[env=prod, keep=]" in told(capsys, "tree still")


def test_a_snapshot_is_described_later(still: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(name: str) -> tuple[Any, ...]:
        found = told(capsys, f"snapshot show still {name} -o json")["snapshot"]
        return found["description"], found["tags"], found["disks"], found["parent"], found["created"]

    before = shown("b")
    would = dry(capsys, still, "snapshot describe still b second --tag env=dev --tag x/y.z=1 --untag keep")
    assert told(capsys, "snapshot describe still b second --tag env=dev --tag x/y.z=1 --untag keep") == ""
    assert shown("b") == ("second", would["tags"], *before[2:]) == ("second", {"env": "dev", "x/y.z": "1"}, *before[2:])
    said = told(capsys, "snapshot describe still b -o json --untag env --untag x/y.z")
    assert (said["snapshot"], said["description"], said["tags"]) == ("b", "second", {})
    told(capsys, "snapshot describe still a " + "''")
    noted = json.loads((still / "machines" / "still" / "record.json").read_text())["snapshots"]
    assert {one["name"]: one["tags"] for one in noted}["c"] == {"env": "test"}
    (still / "qmpsnap.db").unlink()
    told(capsys, "check --rebuild")
    assert listed(capsys, "--tag env=test") == ["c"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("b", 2), ("b --tag x", 2), ("b --tag =x", 2), ("b --tag x=1 --tag x=2", 2), ("b --tag -x=1", 2),
        ("b --tag x=1 --untag x", 2), ("b --untag x", 3), ("zzz text", 3), (f"b --tag x={'y' * (MAX_VALUE + 1)}", 2),
        ("b " + " ".join(f"--tag k{number}=" for number in range(MAX_TAGS)), 2), (f"b --tag {'k' * 64}=1", 2),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("still")
def test_what_cannot_be_said_is_refused(capsys: pytest.CaptureFixture[str], words: str, code: int) -> None:
    before = told(capsys, "snapshot list still -o json")
    assert main(f"snapshot describe still {words}".split()) == code
    capsys.readouterr()
    assert told(capsys, "snapshot list still -o json") == before


@pytest.mark.usefixtures("still")
async def test_programs_describe_and_find(q: qmpsnap.Controller) -> None:
    vm = await q.machine("still")
    plan = await vm.plan_describe_snapshot("a", tags={"z": "1", "a": "é✓"})
    assert (plan.summary, plan.details.tags) == ("describe snapshot a", {"a": "é✓", "z": "1"})
    assert (await vm.apply(plan)).description == "first"
    assert [one.name for one in await vm.snapshots() if one.tags.get("a") == "é✓"] == ["a"]
    taken = await vm.snapshot(tags={"k": "v"})
    assert (await vm.describe_snapshot(taken, "")).tags == {"k": "v"}
    for tags in ({"k": "\x1b[31m"}, {"k": "\udcff"}, {"k": 1}, {"": "v"}):
        with pytest.raises(UsageError):
            await vm.snapshot(tags=tags)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="list of names"):
        await vm.describe_snapshot(taken, untag="k")
    with pytest.raises(NotFoundError):
        await vm.describe_snapshot(taken, untag=["none"])
