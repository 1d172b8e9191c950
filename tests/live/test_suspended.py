"""A guest that sleeps (ACPI S3): its memory is refused where QEMU forgets that, its state is told, and it is woken."""

import json

import anyio
import pytest

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.base import requests
from tests.live.booted import start_booted
from tests.live.machine import hold_invariants

pytestmark = pytest.mark.version

SLEEP = "(sleep 0.5; echo mem >/sys/power/state) >/dev/null 2>&1 </dev/null &"
WAKE = "await vm.wakeup()"


async def asleep(vm: qmpsnap.MachineHandle) -> None:
    await vm.run(SLEEP)
    with anyio.fail_after(60):
        while await vm.state() != "suspended":
            await anyio.sleep(0.05)


async def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert await anyio.to_thread.run_sync(main, [*words, "-o", "json"]) == 0
    return capsys.readouterr().out


async def test_a_guest_that_sleeps(
    q: qmpsnap.Controller, guest_spec: MachineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.snapshot("awake", kind="internal")
    with pytest.raises(StateError, match=r"is not suspended \(running\)"):
        await vm.wakeup()
    await asleep(vm)
    assert json.loads(await told(capsys, "show", "guest"))["state"] == "suspended"
    assert json.loads(await told(capsys, "list"))["machines"][0]["state"] == "suspended"
    for refused in (vm.pause(), vm.resume(), vm.stop(), vm.run("true")):
        with pytest.raises(StateError, match="suspended") as caught:
            await refused
        assert caught.value.hint == WAKE
    with pytest.raises(StateError, match="is suspended: only a running guest can freeze"):
        await vm.snapshot("frozen", quiesce="require")
    process = (await vm.record()).process
    assert process
    keeps = tuple(map(int, process.qemu_version.split("."))) >= requests.SUSPENDED_SINCE
    await (memory_sleeps_on if keeps else memory_is_refused)(vm)
    assert (await vm.snapshot("disks")).mode == "suspended"
    await vm.snapshot("tags", kind="internal", memory=False)
    below = (await vm.chains("vda"))[0].active.id
    await vm.add_layers(disks=["vda"])
    await vm.commit("vda", base=below)
    assert await vm.state() == "suspended"  # whoever held it for an instant has let it sleep on
    await hold_invariants(vm)
    await vm.wakeup()
    assert await vm.state() == "running"
    await hold_invariants(vm)


async def memory_is_refused(vm: qmpsnap.MachineHandle) -> None:
    chains = [chain.ids for chain in await vm.chains()]
    for attempt in (
        vm.snapshot("all", kind="full"),
        vm.snapshot("all", kind="full", degrade=True),
        vm.plan_snapshot("all", kind="full"),
        vm.snapshot("all", kind="internal"),
        vm.plan_snapshot("all", kind="internal"),
        vm.save(),
    ):
        with pytest.raises(StateError, match="it does not keep the suspended state; nothing was changed") as refused:
            await attempt
        assert as_typed(refused.value.hint).startswith("wake it first: qmpsnap wakeup guest; or ")
    assert [chain.ids for chain in await vm.chains()] == chains
    for discard in (False, True):  # nor is other memory loaded into a QEMU that believes its guest to sleep
        with pytest.raises(StateError, match="cannot load other memory into it"):
            await vm.revert("awake", discard=discard)


async def memory_sleeps_on(vm: qmpsnap.MachineHandle) -> None:
    await vm.snapshot("all", kind="full")
    await vm.snapshot("inside", kind="internal")
    assert await vm.state() == "suspended"
    for name in ("inside", "all"):  # in the QEMU that runs, and in another
        assert (await vm.revert(name, discard=True)).state == "suspended"
    assert (await vm.revert("all", discard=True, state="paused")).state == "paused"
    assert await vm.resume() == "suspended"
    await vm.save()
    assert (await vm.restore()).state == "suspended"
