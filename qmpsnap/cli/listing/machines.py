"""``list``: the machines, and whether each runs."""

from __future__ import annotations

import os

from qmpsnap.cli import output
from qmpsnap.cli.listing import looks
from qmpsnap.machine.starting import alive
from qmpsnap.machine.starting.run_files import QMP_SOCKET, USER_SOCKET
from qmpsnap.store.sqlite.listing import listing

TYPE_CHECKING = False  # as typing has it, which costs a tenth of a reading verb
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from qmpsnap.block.usage.survey import Seen
    from qmpsnap.errors import StoreMismatch
    from qmpsnap.model.places import Places
    from qmpsnap.store.sqlite.listing import Listing, MachineRow


def show(form: output.Format) -> int:
    """Print the machines of the store; returns the exit code."""
    with listing() as store:
        at, found, copied = store.places, store.machines(), store.copied_from
        pids = {machine.name: pid for machine in found if (pid := _pid(machine, at, copied))}
        paused = _paused(found, pids, at)
        seen = looks.images_of_all(store.images, found, pids)
        machines = [
            {
                "name": name,
                "state": paused.get(name) or _state(machine, at, pids.get(name), seen.get(name)),
                "pid": pids.get(name),
                "host": machine.host,
                "current": machine.current,
                "snapshots": machine.snapshots,
                "images": seen[name].word if name in seen else "not asked",
                "origin": origin_of(machine),
            }
            for machine in found
            for name in [machine.name]
        ]
        wrong = None if store.is_complete else _wrong(store)
    output.emit(
        form,
        document={"machines": machines},
        names=[str(machine["name"]) for machine in machines],
        table=lambda: _table(machines),
    )
    looks.tell_all(seen)
    return output.told(wrong)


def _table(machines: Sequence[Mapping[str, Any]]) -> str:
    head = ["NAME", "STATE", "PID", "SNAPSHOTS", "CURRENT"]
    rows = [[m["name"], m["state"], m["pid"] or "-", m["snapshots"], m["current"] or "-"] for m in machines]
    if any(m["origin"] for m in machines):
        head.append("FORK OF")
        for row, machine in zip(rows, machines, strict=True):
            row.append(fork_of(machine["origin"]) if machine["origin"] else "-")
    return output.table(head, rows)


def origin_of(machine: MachineRow) -> dict[str, Any] | None:
    """What a fork went on from, for JSON; None of any other machine."""
    if not (found := machine.origin):
        return None
    return {
        "machine": found["machine"],
        "snapshot": found["snapshot"],
        "identity": found.get("identity", "twin"),
        "lacks": found.get("lacks", []),
        "ephemeral": found.get("ephemeral", False),
        "guest_uuid": found["uuid"],
    }


def fork_of(origin: Mapping[str, Any]) -> str:
    """The same in a few words."""
    return f"{origin['machine']}@{origin['snapshot']}{' (ephemeral)' if origin['ephemeral'] else ''}"


def _pid(machine: MachineRow, at: Places, copied: str | None) -> int | None:
    run_dir = f"{at.run}/{machine.name}"
    found = alive.find(machine.process, run_dir, uuid=machine.uuid, adopted=machine.adopted, not_of=copied)
    return found.pid if found else None


def _paused(machines: Sequence[MachineRow], pids: Mapping[str, int], at: Places) -> dict[str, str]:
    """Which guests sleep or were paused over a failed request, as far as their QEMUs say so at once."""
    # One that is not recorded yet waits for whoever starts it, one that a signal has stopped answers nobody, and the
    # monitor of one that was adopted is not ours to play with.
    asked = [
        machine.name
        for machine in machines
        if machine.process and not machine.adopted and looks.is_here(machine)
        if (pid := pids.get(machine.name)) and not alive.is_stopped(pid)
    ]
    if not asked:
        return {}
    from qmpsnap.qmp import runstate, status_poll

    found = status_poll.states({name: f"{at.run}/{name}/{QMP_SOCKET}" for name in asked})
    return {name: state for name, state in found.items() if runstate.remedy(state, name)}


def _state(machine: MachineRow, at: Places, pid: int | None, seen: Seen | None) -> str:
    """``running`` or ``stopped``; ``unknown`` where a QEMU that cannot be seen from here may run."""
    if not looks.is_here(machine):
        return "unknown"
    if pid:
        return "running"
    return "unknown" if (seen and seen.unseen) or _answers(machine, at) else "stopped"


def _answers(machine: MachineRow, at: Places) -> bool:
    socket = f"{at.run}/{machine.name}/{USER_SOCKET}"
    if machine.adopted or not os.path.lexists(socket):
        return False
    from qmpsnap.qmp import unixsocket

    return unixsocket.listens(socket)


def _wrong(listing: Listing) -> StoreMismatch | None:
    from qmpsnap.cli.common import untold

    with listing.store() as store:
        return untold(store)
