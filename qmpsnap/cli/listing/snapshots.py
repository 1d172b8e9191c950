"""``snapshot list`` and ``tree``: a machine's snapshots, and how their images are."""

from __future__ import annotations

from qmpsnap.cli import output
from qmpsnap.cli.listing import looks
from qmpsnap.cli.listing.documents import shown, state_word
from qmpsnap.cli.listing.machines import fork_of, origin_of
from qmpsnap.model import tags
from qmpsnap.model.timestamps import moment
from qmpsnap.store.sqlite.listing import listing

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from qmpsnap.store.sqlite.listing import MachineRow, SnapshotRow

    Wanted = Mapping[str, str | None]

NO_TAGS: Wanted = {}
HERE = "(current, you are here)"


def read(name: str) -> tuple[MachineRow, list[SnapshotRow], dict[str, str]]:
    """A machine, its snapshots and the state of each."""
    with listing() as store:
        machine = store.machine(name)
        found = store.snapshots(name)
        return machine, found, looks.states(store.images, machine, found)


def show(name: str, form: output.Format, wanted: Wanted = NO_TAGS) -> None:
    """Print the snapshots of a machine that have the tags that are wanted, oldest first."""
    machine, listed, states = read(name)
    found = [one for one in listed if tags.has(one.tags, wanted)]

    def table() -> str:
        head = ["", "NAME", "KIND", "STATE", "PARENT", "CREATED", "DISKS", "DESCRIPTION"]
        rows = [
            [
                "*" if one.name == machine.current else "",
                one.name,
                one.kind,
                state_word(states[one.name]),
                one.parent or "-",
                moment(one.created),
                ",".join(point.disk for point in one.points),
                one.description,
            ]
            for one in found
        ]
        if any(one.tagged for one in found):
            head.append("TAGS")
            for row, one in zip(rows, found, strict=True):
                row.append(tags.written(one.tags) or "-")
        return output.table(head, rows)

    document = {"machine": name, "snapshots": _documents(machine, found, states) if form == "json" else []}
    output.emit(form, document=document, names=[one.name for one in found], table=table)


def draw(name: str, form: output.Format, wanted: Wanted = NO_TAGS) -> None:
    """Print the tree that a machine's snapshots form.

    ``wanted``: only those with these tags, and what leads to them and to where the machine is.
    """
    machine, found, states = read(name)
    if wanted:
        found = _leading(found, [machine.current, *(one.name for one in found if tags.has(one.tags, wanted))])
    children: dict[str | None, list[tuple[str, str]]] = {}
    for one in found:
        state = states[one.name]
        kind = one.kind if state == "ok" else f"{one.kind} ({state_word(state)})"
        text = f"{one.name}  {moment(one.created)}  {kind}  {one.description}".rstrip()
        text += f"  [{tags.written(one.tags)}]" if one.tagged else ""
        children.setdefault(one.parent, []).append((one.name, text))
    # A name cannot hold a parenthesis, so this key is nobody's parent.
    children.setdefault(machine.current, []).append((HERE, HERE))
    documents = _documents(machine, found, states) if form == "json" else []
    origin = origin_of(machine)
    root = f"{name}  fork of {fork_of(origin)}" if origin else name
    output.emit(
        form,
        document={"machine": name, "current": machine.current, "origin": origin, "snapshots": documents},
        names=[one.name for one in found],
        table=lambda: output.tree(root, lambda key: children.get(key, [])),
    )


def _leading(found: list[SnapshotRow], to: Sequence[str | None]) -> list[SnapshotRow]:
    """Those that are named, and their ancestors."""
    parents = {one.name: one.parent for one in found}
    kept: set[str] = set()
    for at in to:
        name = at
        while name and name not in kept:
            kept.add(name)
            name = parents.get(name)
    return [one for one in found if one.name in kept]


def one(machine: str, name: str) -> tuple[SnapshotRow, dict[str, Any]]:
    """One snapshot, and its JSON.

    Raises:
        NotFoundError: there is none of that name.
    """
    at, found, states = read(machine)
    wanted = next((snapshot for snapshot in found if snapshot.name == name), None)
    if wanted is None:
        from qmpsnap.model.layers.snapshot import no_snapshot

        raise no_snapshot(name, [snapshot.name for snapshot in found], machine=machine)
    return wanted, _documents(at, [wanted], states)[0]


def _documents(machine: MachineRow, found: list[SnapshotRow], states: dict[str, str]) -> list[dict[str, Any]]:
    try:
        return [shown(one, current=machine.current, state=states[one.name]) for one in found]
    except (ValueError, LookupError, TypeError):
        with listing() as damaged, damaged.store() as store:
            store.snapshots(machine.name)  # says what is wrong with the value
        raise
