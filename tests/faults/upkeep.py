"""Verbs that put a machine, a home or an operation right, as scenarios; and all verbs that there are together.

``python -m tests.faults.upkeep`` dies in the middle of a snapshot, so that there is something to recover.
"""

import os
import shutil
import sys
from pathlib import Path

import anyio

import qmpsnap
from qmpsnap.errors import HostCannot, StoreMismatch
from qmpsnap.model.operations import steps
from qmpsnap.ops.base import relocate
from qmpsnap.ops.base.context import opened
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.site import NAME, TWO
from tests.faults.verbs import OTHER, VERBS
from tests.harness import watch
from tests.live.machine import context_of


async def _dies() -> None:
    def hook(verb: str, step: str, when: watch.When) -> None:
        if (verb, step, when) == ("create", steps.SETTLED, "before"):
            os._exit(0)

    with watch.watching(hook):
        async with qmpsnap.open() as q:
            await qmpsnap.MachineHandle(q.context, NAME).snapshot("new")


async def _interrupted(_: qmpsnap.MachineHandle, __: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FAILING_CALLS"}
    await anyio.run_process([sys.executable, "-m", "tests.faults.upkeep"], env=environment)


async def _recover(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.recover()


async def _is_settled(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return not context_of(vm).store.operations(vm.name, only_open=True)


async def _disorder(vm: qmpsnap.MachineHandle, _: Path) -> None:
    context = context_of(vm)
    layer = Path(context.store.chains(NAME)[0].layers[0].path)
    shutil.copy2(layer, layer.with_name("extra.qcow2"))
    layer.chmod(0o644)
    context.home.record(NAME).unlink()


async def _repair(vm: qmpsnap.MachineHandle, _: Path) -> object:
    found = await vm.check(repair=True)
    if found.findings:  # that is how it says that not everything could be done
        raise HostCannot("; ".join(finding.text for finding in found.findings), effect="unknown")
    return found


async def _is_in_order(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return not (await vm.check()).findings


async def _a_copy(vm: qmpsnap.MachineHandle, place: Path) -> None:
    layer = context_of(vm).store.chains(NAME)[0].layers[0].path
    shutil.copy2(layer, place / "copy")
    (place / "copy").replace(layer)


async def _relocate(_: qmpsnap.MachineHandle, __: Path) -> object:
    async with opened() as context:
        done = await relocate.run(context, accept_copies=True)
    if unlike := [found.text for found in done.compared if found.verdict in ("missing", "differs")]:
        raise StoreMismatch("; ".join(unlike), effect="unknown")  # the command line's exit 7
    return done


async def _push(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.push("pushed")


async def _pushed(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return any(found.name == "pushed" for found in await vm.snapshots())


_NO_MEMORY = frozenset({steps.SAVING, steps.CLONING, steps.LOST, steps.ENDING, steps.TRANSACTION})

UPKEEP: dict[str, Scenario] = {
    "push": Scenario(column="create", verb="create", act=_push, without=_NO_MEMORY, happened=_pushed),
    "recover": Scenario(column="others", verb="", act=_recover, prepare=_interrupted, happened=_is_settled),
    "check --repair": Scenario(column="others", verb="", act=_repair, prepare=_disorder, happened=_is_in_order),
    "relocate": Scenario(column="others", verb="", act=_relocate, prepare=_a_copy, spec=TWO, happened=_is_in_order),
    "relocate of a moved home": Scenario(column="others", verb="", act=_relocate, happened=_is_in_order),
}


async def _warm(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.snapshot("warm", kind="full")


async def _fork(vm: qmpsnap.MachineHandle, _: Path) -> object:
    return await vm.fork("warm", OTHER, paused=True)


async def _is_forked(vm: qmpsnap.MachineHandle, _: Path) -> bool:
    return (await qmpsnap.MachineHandle(context_of(vm), OTHER).state()) == "paused"


FORK: dict[str, Scenario] = {
    "fork": Scenario(column="fork", verb="fork", act=_fork, start="running", warm=_warm, happened=_is_forked)
}
MOVED = {"relocate of a moved home"}
"""The home is moved before the verb."""
AGAIN = set(UPKEEP) - {"push"}
"""What is begun by these is ended by doing it again."""

ALL: dict[str, Scenario] = {name: found for name, found in SCENARIOS.items() if not found.ends} | VERBS | UPKEEP | FORK

if __name__ == "__main__":
    anyio.run(_dies)
    sys.exit("it never came to its end")
