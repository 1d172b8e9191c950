"""docs/reference/qmp.md lists every QMP command that each verb sends, as counted here on the QEMU at hand.

``QMPSNAP_GOLDEN=write`` writes what this version is sent, leaves what the page has of others, and fails all the same.
"""

import os
import re
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import qmpsnap
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.qmp.session import Session
from tests.live.machine import MIB, fill

pytestmark = pytest.mark.version

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "qmp.md"
TABLE = re.compile(r"<!-- qmp -->\n(?P<rows>.*?)<!-- end -->", re.DOTALL)
VERSIONS: Final = ("7.2", "10.0", "11.1")
QUESTION: Final = re.compile(r"query-|x-debug-query|qom-get|qom-list")
SPEC = MachineSpec(name="still", memory=16 * MIB, disks=(DiskSpec(name="vda", size=16 * MIB),), agent=False)
Act = Callable[[qmpsnap.MachineHandle, Path], Awaitable[object]]
Sent = dict[str, dict[str, frozenset[str]]]
"""Verb to QMP command to the versions that are sent it."""

STEPS: dict[str, Act] = {
    "start --paused": lambda vm, _: vm.start(paused=True),
    "snapshot create": lambda vm, _: vm.snapshot("s1"),
    "snapshot create --by blockdev-snapshot-sync": lambda vm, _: vm.snapshot("s2", by="blockdev-snapshot-sync"),
    "": lambda vm, _: _more(vm),
    "commit, a middle layer": lambda vm, _: vm.commit("vda", base="s3", top="s4", consume=True),
    "commit, the active layer": lambda vm, _: _commit_active(vm),
    "snapshot delete, by a merge": lambda vm, _: vm.delete_snapshots("s2"),
    "stream": lambda vm, _: vm.stream("vda"),
    "mirror --finish": lambda vm, place: vm.mirror("vda", place / "a", mode="finish"),
    "mirror --pivot": lambda vm, place: vm.mirror("vda", place / "b", mode="pivot"),
    "mirror --finish --by drive-mirror": lambda vm, place: vm.mirror(
        "vda", place / "c", mode="finish", by="drive-mirror"
    ),
    "mirror --pivot --by drive-mirror": lambda vm, place: vm.mirror(
        "vda", place / "d", mode="pivot", by="drive-mirror"
    ),
    "resize": lambda vm, _: vm.resize("vda", "+1M"),
    "resume": lambda vm, _: vm.resume(),
    "pause": lambda vm, _: vm.pause(),
    " ": lambda vm, _: vm.resume(),
    "snapshot create --kind full": lambda vm, _: vm.snapshot("full", kind="full"),
    "snapshot revert, to a full one": lambda vm, _: vm.revert("full", discard=True),
    "snapshot push": lambda vm, _: vm.push("pushed"),
    "snapshot pop": lambda vm, _: vm.pop(),
    "snapshot create --kind internal": lambda vm, _: vm.snapshot("in", kind="internal"),
    "snapshot create --kind internal --by savevm": lambda vm, _: vm.snapshot("vm", kind="internal", by="savevm"),
    "snapshot create --kind internal --no-memory": lambda vm, _: vm.snapshot("out", kind="internal", memory=False),
    "snapshot revert, to an internal one": lambda vm, _: vm.revert("in", discard=True),
    "snapshot revert --by loadvm": lambda vm, _: vm.revert("vm", discard=True, by="loadvm"),
    "snapshot delete, an internal one": lambda vm, _: vm.delete_snapshots("in"),
    "snapshot delete --by delvm": lambda vm, _: vm.delete_snapshots("vm", by="delvm"),
    "snapshot revert": lambda vm, _: vm.revert("s1", discard=True),
    "save": lambda vm, _: vm.save(name="bed"),
    "restore": lambda vm, _: vm.restore(discard=True),
    "fork": lambda vm, _: vm.fork("full", "child"),
    "check": lambda vm, _: vm.check(),
    "show": lambda vm, _: vm.state(),
    "chain": lambda vm, _: vm.chains(),
    "stop --force": lambda vm, _: vm.stop(force=True),
}
"""In this order on one machine; what has no name only makes it ready."""


async def _more(vm: qmpsnap.MachineHandle) -> None:
    for number, name in enumerate(("s3", "s4"), 1):
        await fill(vm, "vda", number, offset=number * MIB)
        await vm.snapshot(name)
    await fill(vm, "vda", 9, offset=9 * MIB)


async def _commit_active(vm: qmpsnap.MachineHandle) -> object:
    return await vm.commit("vda", base=(await vm.chains())[0].layers[-2].layer.id, consume=True)


async def test_the_page_lists_what_is_sent(q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = _version()
    sent: set[str] = set()
    real = Session.execute

    async def execute(session: Session, command: str, arguments: Any = None, **options: Any) -> Any:
        sent.add(_shown(command, arguments or {}))
        return await real(session, command, arguments, **options)

    monkeypatch.setattr(Session, "execute", execute)
    vm = await q.define(SPEC)
    found: dict[str, frozenset[str]] = {}
    for verb, act in STEPS.items():
        sent.clear()
        await act(vm, place)
        if verb.strip():
            found[verb] = frozenset(sent)
    page = _read()
    if os.environ.get("QMPSNAP_GOLDEN") == "write":
        _write(page, found, version)
        pytest.fail(f"wrote {PAGE}: read the difference, then run without QMPSNAP_GOLDEN")
    told = {verb: frozenset(name for name, at in page[verb].items() if version in at) for verb in page}
    assert told == found, "QMPSNAP_GOLDEN=write writes it"


def _shown(command: str, arguments: dict[str, Any]) -> str:
    """A command by its name, with what it carries: the actions of a transaction, the command for the human monitor."""
    carried = {action["type"] for action in arguments.get("actions", ())}
    carried |= {line.partition(" ")[0] for key, line in arguments.items() if key == "command-line"}
    return f"{command} ({', '.join(sorted(carried))})" if carried else command


def _version() -> str:
    qemu = os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64"
    said = subprocess.run([qemu, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"version (\d+\.\d+)", said)
    assert match
    assert match[1] in VERSIONS, f"the page does not have QEMU {match[1]}"
    return match[1]


def _read() -> Sent:
    table = TABLE.search(PAGE.read_text())
    assert table
    found: Sent = {}
    for line in table["rows"].splitlines()[2:]:
        _, verb, *cells, _ = line.split("|")
        found[_plain(verb)] = dict(command for cell in cells for command in _commands(cell))
    return found


def _plain(verb: str) -> str:
    return verb.strip().replace("`", "")


def _commands(cell: str) -> Iterator[tuple[str, frozenset[str]]]:
    for one in filter(None, cell.strip().split(", `")):
        name, _, versions = one.strip("`").partition("`")
        yield name, frozenset(versions.strip(" ()").split("; ")) if versions else frozenset(VERSIONS)


def _write(page: Sent, found: dict[str, frozenset[str]], version: str) -> None:
    rows = []
    for verb, names in found.items():
        at = {name: known - {version} for name, known in page.get(verb, {}).items()}
        at |= {name: at.get(name, frozenset()) | {version} for name in names}
        known = {name: versions for name, versions in at.items() if versions}
        title, comma, rest = verb.partition(",")
        cells = [
            ", ".join(_told(name, known[name]) for name in sorted(known) if bool(QUESTION.match(name)) is asks)
            for asks in (False, True)
        ]
        rows.append(f"| `{title}`{comma}{rest} | {cells[0]} | {cells[1]} |\n")
    head = "| verb | commands | questions |\n|---|---|---|\n"
    text = PAGE.read_text()
    PAGE.write_text(TABLE.sub(lambda _: f"<!-- qmp -->\n{head}{''.join(rows)}<!-- end -->", text))


def _told(name: str, versions: frozenset[str]) -> str:
    some = "; ".join(version for version in VERSIONS if version in versions)
    return f"`{name}`" if versions == frozenset(VERSIONS) else f"`{name}` ({some})"
