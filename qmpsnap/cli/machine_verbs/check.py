"""``check``: what does not hold, what it means, and what repair would do; ``--rebuild`` makes a lost store again."""

import argparse
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from qmpsnap.cli import output
from qmpsnap.cli.common import Parsers, add, add_format, home, operating, untold
from qmpsnap.errors import ForeignHost, HomeUntrusted, QmpsnapError, StoreMismatch, UsageError

if TYPE_CHECKING:
    from qmpsnap.model.finding import Finding
    from qmpsnap.ops.base.context import Context
    from qmpsnap.ops.check.check import Checked


def register(parsers: Parsers) -> None:
    """Add the command."""
    command = add(parsers, "check", _check, help="compare store, files and QEMU, and report what does not hold")
    command.add_argument("machine", metavar="VM", nargs="?", help="only this machine")
    command.add_argument("--deep", action="store_true", help="also check every image's tables and every state file")
    command.add_argument(
        "--repair", action="store_true", help="repair what can be repaired; files are moved, not deleted"
    )
    command.add_argument("--rebuild", action="store_true", help="rebuild a lost store from the machines' records")
    command.add_argument(
        "--set-aside", action="store_true", help="with --rebuild: replace an intact store, too, and keep it"
    )
    add_format(command)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.rebuild:
        return _rebuild(arguments)
    if arguments.set_aside:
        raise UsageError("--set-aside needs --rebuild", hint="qmpsnap check --help")
    from qmpsnap.ops.check import check

    left_out: dict[str, QmpsnapError] = {}
    wrong: StoreMismatch | None = None

    async def act(context: "Context") -> list[dict[str, Any]]:
        nonlocal wrong
        wrong = None if arguments.machine else untold(context.store)
        names = [arguments.machine] if arguments.machine else [found.name for found in context.store.machines()]
        documents = []
        for name in names:
            try:
                documents.append(_document(await check.run(context, name, deep=arguments.deep, mend=arguments.repair)))
            except QmpsnapError as error:
                if arguments.machine:
                    raise
                left_out[name] = error
        return documents

    documents = operating(act) if arguments.repair else _trusting(act, arguments.machine)
    output.emit(
        arguments.output,
        document={
            "machines": documents,
            "left_out": [{"machine": name, "why": error.message} for name, error in left_out.items()],
        },
        names=[f"{found['machine']} {one['code']}" for found in documents for one in found["findings"]],
        table=lambda: "\n".join(_text(found) for found in documents),
        done=_repaired(documents),
    )
    for found in documents:
        for failed in found["failed"]:
            output.note(f"{found['machine']}: not repaired: {failed}")
    left = output.told(wrong) or _tell(left_out)
    amiss = {one["code"] for found in documents for one in found["findings"]} - {"machine-busy"}
    return StoreMismatch.exit_code if amiss else left


def _trusting(act: "Callable[[Context], Awaitable[list[dict[str, Any]]]]", machine: str | None) -> list[dict[str, Any]]:
    """Look, but where another user can write to the home tell that alone: nothing in it can be gone by."""
    try:
        return operating(act)
    except HomeUntrusted:
        return [_untrusted(machine)]


def _untrusted(machine: str | None) -> dict[str, Any]:
    from qmpsnap.ops.check.check import Checked
    from qmpsnap.ops.check.judge import owned
    from qmpsnap.store import owner

    places = home()
    found = owner.flaws(places.data, places.machines, places.run)
    return _document(Checked(machine=machine or "*", findings=tuple(owned(machine or "*", found))))


def _repaired(documents: list[dict[str, Any]]) -> str:
    """What repair has changed, in one sentence; empty where that is nothing."""
    done = [f"{found['machine']}: {one['code']}" for found in documents for one in found["repaired"]]
    moved = [one["to"] for found in documents for one in found["moved"]]
    told = [f"repaired {', '.join(done)}"] * bool(done) + [f"moved to {', '.join(moved)}"] * bool(moved)
    return "; ".join(told)


def _tell(left_out: Mapping[str, QmpsnapError]) -> int:
    """Say which machines were not checked; the exit code for that, 0 if they were another host's to check."""
    for name, error in left_out.items():
        output.note(f"{name}: not checked: {error.message}")
        output.hint(error.hint)
    return next((error.exit_code for error in left_out.values() if not isinstance(error, ForeignHost)), 0)


def _document(done: "Checked") -> dict[str, Any]:
    return {
        "machine": done.machine,
        "findings": [_finding(finding) for finding in done.findings],
        "repaired": [_finding(finding) for finding in done.repaired],
        "moved": [{"from": moved.old, "to": moved.new} for moved in done.moved],
        "failed": list(done.failed),
    }


def _finding(finding: "Finding") -> dict[str, Any]:
    return {
        "code": finding.code,
        "invariant": finding.kind.invariant,
        "found": finding.text,
        "means": finding.kind.means,
        "repair": finding.repair or None,
        "disk": finding.disk,
        "layer": finding.layer,
        "file": finding.file,
    }


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['machine']}: {len(found['findings']) or 'no'} finding(s)"]
    for one in found["findings"]:
        lines += [f"  {one['code']} ({one['invariant']}): {output.printable(one['found'])}", f"    {one['means']}"]
        lines += [f"    --repair: {one['repair']}"] if one["repair"] else []
    lines += [f"  repaired {one['code']}: {output.printable(one['found'])}" for one in found["repaired"]]
    lines += [f"  moved to {output.printable(one['to'])}" for one in found["moved"]]
    return "\n".join(lines)


def _rebuild(arguments: argparse.Namespace) -> int:
    if arguments.machine or arguments.deep or arguments.repair:
        raise UsageError(
            "--rebuild rebuilds the whole store and takes no option but --set-aside",
            hint="first qmpsnap check --rebuild, then qmpsnap check --repair",
        )
    import anyio

    from qmpsnap.ops.rebuild import rebuild

    done = anyio.run(lambda: rebuild.run(home(), set_aside=arguments.set_aside))
    document = {
        "machines": [
            {"machine": made.name, "snapshots": list(made.snapshots), "notes": list(made.notes)}
            for made in done.machines
        ],
        "left_out": [{"machine": name, "why": why} for name, why in done.left_out],
        "aside": done.aside,
        "moved_from": done.moved_from,
    }
    output.emit(
        arguments.output,
        document=document,
        names=[made.name for made in done.machines],
        table=lambda: output.table(
            ("MACHINE", "SNAPSHOTS"), [(made.name, ", ".join(made.snapshots) or "none") for made in done.machines]
        ),
        done=f"the store was rebuilt with machines {', '.join(made.name for made in done.machines) or 'none'}",
    )
    for made in done.machines:
        for note in made.notes:
            output.note(f"{made.name}: {note}")
    for name, why in done.left_out:
        output.note(f"{name}: left out: {why}")
    if done.moved_from:
        output.note(f"the headers of the images name {done.moved_from} as the home")
        output.hint("qmpsnap relocate accepts the new place")
    if done.aside:
        output.note(f"the former store is kept as {done.aside}")
    return StoreMismatch.exit_code if done.left_out else 0
