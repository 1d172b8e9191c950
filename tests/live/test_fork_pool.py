"""Pools: forks that wait until somebody needs one, and are gone afterwards."""

import time

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import HostCannot, NotFoundError
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.ops.fork import pool as pools
from tests.harness.processes import qemus
from tests.live.booted import start_booted
from tests.live.machine import ONE_DISK, context_of, hold_invariants

pytestmark = pytest.mark.version


async def names(q: qmpsnap.Controller) -> list[str]:
    return [found.name for found in await q.machines()]


async def test_each_fork_of_a_pool_is_used_once(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    await vm.snapshot("warm", kind="full")
    used: dict[str, str] = {}
    async with vm.pool("warm", size=2) as pool:
        with anyio.fail_after(120):
            while pool.waiting < 2:
                await anyio.sleep(0.05)
        assert 0 < await pool.memory() < 2 * guest_spec.memory
        for _ in range(3):
            async with pool.take() as machine:
                done = await machine.run("test ! -e /dev/shm/used && touch /dev/shm/used; hostname; date +%s")
                host, now = done.stdout.split()
                assert (await machine.record()).origin
                assert abs(int(now) - time.time()) < 30
                used[machine.name] = host
    assert list(used) == list(used.values())
    assert len(used) == 3
    assert await names(q) == ["guest"]
    assert len(qemus(context_of(vm).home.data)) == 1
    await hold_invariants(vm)


async def test_a_pool_ends_with_its_block_however_that_ends(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    await vm.snapshot("warm", kind="full")

    async def failing() -> None:
        async with vm.pool("warm", size=2, fresh=False) as pool, pool.take() as machine:
            assert await machine.state() == "running"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()
    assert await names(q) == ["still"]
    with anyio.move_on_after(5) as scope:
        async with vm.pool("warm", size=2, fresh=False):
            scope.cancel()
            await anyio.sleep_forever()
    assert await names(q) == ["still"]
    async with vm.pool("warm", size=1, fresh=False) as pool, pool.take() as machine:
        with pytest.raises(NotFoundError, match="no snapshot 'nothing'"):
            async with vm.pool("nothing", fresh=False):
                pass
        async with vm.pool("warm", size=1, fresh=False) as another, another.take() as theirs:
            assert theirs.name != machine.name
        assert await machine.state() == "running"
    with pytest.raises(HostCannot, match="are available"):
        async with vm.pool("warm", floor=1 << 50):
            pass
    assert await names(q) == ["still"]
    assert len(qemus(context_of(vm).home.data)) == 1


async def test_nobody_waits_for_a_fork_that_the_host_has_no_memory_for(
    q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    await vm.snapshot("warm", kind="full")
    there = [1 << 40]
    monkeypatch.setattr(pools, "available", lambda: there[0])
    monkeypatch.setattr(pools, "_LOOK", 0.01)
    async with vm.pool("warm", size=1, fresh=False) as pool:
        there[0] = 0
        async with pool.take():
            with anyio.move_on_after(0.5) as scope:  # this one's memory will be given back
                async with pool.take():
                    pass
            assert scope.cancelled_caught
        with pytest.raises(HostCannot, match="no fork of snapshot warm is ready"):
            async with pool.take():
                pass
        there[0] = 1 << 40
        async with pool.take() as machine:
            assert await machine.state() == "running"
