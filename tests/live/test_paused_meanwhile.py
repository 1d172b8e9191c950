"""A guest that QEMU pauses right before it would be held for its memory: QEMU would abort, and goes on."""

import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import StateError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.memory import save
from tests.live.machine import MIB, context_of, hold_invariants, user_monitor
from tests.live.test_space import HOLE, mount

pytestmark = pytest.mark.version


@pytest.fixture
def small(place: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount(place, 4 * MIB)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def before_it_is_held(patch: pytest.MonkeyPatch, act: Callable[[], Awaitable[object]]) -> None:
    """Something happens once all is made ready and reserved, right before the guest is held."""
    real = save.shorten

    async def shorten(*arguments: Any) -> None:
        await real(*arguments)
        await act()

    patch.setattr(save, "shorten", shorten)


async def until(vm: qmpsnap.MachineHandle, state: str) -> None:
    async with user_monitor(vm) as qemu:
        with anyio.fail_after(60):
            while (await qemu.execute("query-status"))["status"] != state:  # type: ignore[index]
                await anyio.sleep(0.02)


async def is_refused(vm: qmpsnap.MachineHandle, state: str) -> StateError:
    """The snapshot is refused, QEMU lives, the disks have not moved, and all that was made for it is given back."""
    process, chains = (await vm.record()).process, [chain.ids for chain in await vm.chains()]
    before = await vm.snapshots()
    with pytest.raises(StateError, match=rf"is {state}; nothing was changed") as refused:
        await vm.snapshot("all", kind="full")
    assert (refused.value.exit_code, refused.value.effect) == (4, "none")
    assert await vm.state() == state
    assert ((await vm.record()).process, await vm.snapshots()) == (process, before)
    assert [chain.ids for chain in await vm.chains()] == chains
    assert await vm.recover() == []
    assert list(context_of(vm).home.machine_dir(vm.name).glob("*.vmstate*")) == []
    return refused.value


async def test_over_a_full_disk(
    q: qmpsnap.Controller, guest_spec: MachineSpec, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    await vm.snapshot("s1", files={"vdb": small / "layer"})

    async def write() -> None:
        await vm.run(f"({HOLE}) >/tmp/said 2>&1 </dev/null &")
        await until(vm, "io-error")

    with monkeypatch.context() as patch:
        before_it_is_held(patch, write)
        refused = await is_refused(vm, "paused: no space")
    assert "qmpsnap resume guest" in as_typed(refused.hint)
    subprocess.run(["mount", "-o", f"remount,size={64 * MIB}", small], check=True)  # noqa: ASYNC221
    await vm.resume()
    done = await vm.run("while pidof dd >/dev/null; do sleep 0.1; done; tail -1 /tmp/said")
    assert "30+0 records out" in done.stdout  # nothing that the guest wrote was lost or refused
    await vm.snapshot("all", kind="full")
    await hold_invariants(vm)
    await vm.stop(force=True)


async def test_over_a_panic(q: qmpsnap.Controller, still_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ("-device", "pvpanic", "-action", "panic=pause")
    vm = await q.define(replace(still_spec, extra=extra), allow_extra=True)
    await vm.start()

    async def panic() -> None:
        async with user_monitor(vm) as qemu:
            await qemu.execute("human-monitor-command", {"command-line": "o/b 0x505 1"})
        await until(vm, "guest-panicked")

    before_it_is_held(monkeypatch, panic)
    refused = await is_refused(vm, "guest-panicked")
    assert "qmpsnap show still" in as_typed(refused.hint)
