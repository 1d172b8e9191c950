"""kill -9 between the journal's steps: right before or after one call of the product's own functions. Then: recover."""

from pathlib import Path

import pytest
from msgspec import Struct

import qmpsnap
from tests.faults import site
from tests.faults.deaths import controller_dies
from tests.faults.report import Fault
from tests.faults.scenarios import SCENARIOS, ended, ready
from tests.harness.deaths import Call

IMAGE, COMMANDS, JOBS = "qmpsnap.block.image.create", "qmpsnap.qmp.commands", "qmpsnap.qmp.jobs"
MIGRATION, MEMORY, STATEFILE = "qmpsnap.qmp.migration", "qmpsnap.ops.memory.save", "qmpsnap.machine.statefile"
MERGE, SWITCH, TAGS, TAGGING = (
    "qmpsnap.ops.merge.job",
    "qmpsnap.ops.revert.cutover",
    "qmpsnap.block.image.internal_snapshots",
    "qmpsnap.ops.internal.tags",
)

OVERLAYS = {
    "one overlay made": Call(IMAGE, "ImageTool.create_overlay", "after", 1),
    "both overlays made": Call(IMAGE, "ImageTool.create_overlay", "after", 2),
}
MOVED = {
    "one node opened": Call(COMMANDS, "blockdev_add", "after", 1),
    "the disks moved": Call(COMMANDS, "transaction", "after", 1),
}
CHOSEN = {
    "the name claimed": Call("qmpsnap.block.image.staged", "claim", "after", 1),
    "one name left": Call("qmpsnap.ops.base.overlay_paths", "let_go", "after", 1),
}
WRITTEN = {
    "the file made": Call(STATEFILE, "create", "after", 1),
    "the file handed over": Call(MIGRATION, "hand_over", "after", 1),
    "the guest held": Call(COMMANDS, "control", "after", 1),
    "the memory on its way": Call(MIGRATION, "start", "after", 1),
    "the memory fixed": Call(MEMORY, "fixed", "after", 1),
    "the memory written": Call(MEMORY, "written", "after", 1),
    "QEMU put back": Call(MIGRATION, "put_back", "after", 1),
    "the manifest appended": Call(STATEFILE, "_seal", "after", 1),
    "the name given": Call(STATEFILE, "sync_folder", "before", 1),
    "the file finished": Call(STATEFILE, "finish", "after", 1),
}
JOB = {
    "the job at work": Call(JOBS, "follow", "before", 1),
    "the job over its work": Call(JOBS, "follow", "after", 1),
    "finalized": Call(JOBS, "finalize", "after", 1),
    "dismissed": Call(JOBS, "dismiss", "after", 1),
    "nodes closed": Call(MERGE, "close_nodes", "after", 1),
    "files removed": Call(MERGE, "remove_files", "after", 1),
}
HELD = {
    "the guest held": Call(COMMANDS, "control", "after", 1),
    "the job begun": Call(JOBS, "begin", "after", 1),
    "the guest going on": Call(COMMANDS, "control", "after", 2),
}
COPY = {
    "the file made": Call(IMAGE, "ImageTool.create_base", "after", 1),
    "the file at its place": Call("qmpsnap.block.image.staged", "put", "after", 1),
    "the target open": Call(COMMANDS, "blockdev_add", "after", 1),
    "the job at work": Call(JOBS, "follow_mirror", "before", 1),
    "ready": Call(JOBS, "follow_mirror", "after", 1),
    "finalized": Call(JOBS, "finalize", "after", 1),
    "dismissed": Call(JOBS, "dismiss", "after", 1),
    "nodes closed": Call(MERGE, "close_nodes", "after", 1),
    "files removed": Call(MERGE, "remove_files", "after", 1),
}
INSIDE = {
    "the memory on its way": Call(JOBS, "follow", "before", 1),
    "the memory inside": Call(JOBS, "follow", "after", 1),
}
ENDED = {
    "QEMU ended": Call(SWITCH, "require_ended", "after", 1),
    "QEMU started": Call("qmpsnap.ops.lifecycle.power", "launch", "after", 1),
}
CALLS: dict[str, dict[str, Call]] = {
    "create, paused": OVERLAYS | MOVED,
    "create, stopped": OVERLAYS,
    "create in a chosen file, paused": CHOSEN | MOVED,
    "create in a chosen file, stopped": CHOSEN,
    "create full": OVERLAYS | MOVED | WRITTEN,
    "create full in a chosen file": CHOSEN | MOVED,
    "save": MOVED | {name: call for name, call in WRITTEN.items() if name != "the guest held"},
    "create internal": INSIDE,
    "create internal without memory": {"tagged": Call(COMMANDS, "transaction", "after", 1)},
    "create internal, stopped": {
        "one tagged": Call(COMMANDS, "transaction", "after", 1),
        "both tagged": Call(COMMANDS, "transaction", "after", 2),
    },
    "revert, paused": OVERLAYS | ENDED,
    "revert, stopped": {"a file removed": Call(SWITCH, "remove", "after", 1)},
    "revert to memory": ENDED
    | {
        "the memory on its way back": Call(MIGRATION, "start", "before", 1),
        "the memory back": Call("qmpsnap.ops.lifecycle.power", "load", "after", 1),
    },
    "revert to memory inside": ENDED
    | {
        "one copied": Call(TAGS, "take_out", "after", 1),
        "loading": Call(TAGGING, "load_into", "before", 1),
        "loaded": Call(TAGGING, "load_into", "after", 1),
        "the tag gone": Call(COMMANDS, "delete_tag", "after", 1),
    },
    "revert in place": {
        "loading": Call(JOBS, "follow", "before", 1),
        "loaded": Call(JOBS, "follow", "after", 1),
    },
    **{name: JOB for name in SCENARIOS if SCENARIOS[name].column in ("commit", "stream")},
    **{name: JOB for name in SCENARIOS if name.startswith(("delete upwards", "delete downwards"))},
    **{name: COPY for name in SCENARIOS if name.startswith(("mirror, pivot", "mirror, finish"))},
    "commit of the active layer, running": JOB | HELD,
    "mirror, pivot, running": COPY | HELD,
}

BACK = {("create internal, stopped", "one tagged")}
"""What has to be undone whatever dies there; always in the short form."""


class Case(Struct, frozen=True):
    """A scenario, what has just happened in it, and what dies."""

    name: str
    at: str
    death: str

    def __str__(self) -> str:
        return f"{self.name}-{self.at}-{self.death}"


def _params() -> list[object]:
    cases = [
        Case(name, at, death)
        for name, calls in CALLS.items()
        for at in calls
        for death in ("controller", "both")
        if death == "controller" or SCENARIOS[name].start != "stopped"
    ]
    return [
        pytest.param(
            case, id=str(case), marks=pytest.mark.short if place % 5 == 0 or (case.name, case.at) in BACK else ()
        )
        for place, case in enumerate(cases)
    ]


@pytest.mark.parametrize("case", _params())
async def test_killed_between(q: qmpsnap.Controller, place: Path, fault: Fault, case: Case) -> None:
    scenario = SCENARIOS[case.name]
    fault.case(f"kill -9 between steps: {case.death}", scenario.column)
    vm = await ready(q, scenario, place)
    before = await site.look(vm)
    died = await controller_dies(case.name, place, CALLS[case.name][case.at], qemu_too=case.death == "both")
    assert died.died, died.said

    async def goes_back() -> None:
        if (case.name, case.at) in BACK:
            await ended(scenario, vm, place, forward=False)

    await site.judge(vm, place, before, scenario.expected, also=goes_back)
