"""Random histories on real images: after every step each snapshot in state ok reads as it did, and three agree."""

import random
from collections.abc import Awaitable, Callable

import pytest

import qmpsnap
from qmpsnap.errors import StateError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB, content_hash, context_of, fill, hold_invariants

SPEC = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=8 * MIB),))
STEPS = 9


class History:
    """One machine, what is known of it, and dice."""

    def __init__(self, vm: qmpsnap.MachineHandle, seed: int) -> None:
        self.vm = vm
        self.dice = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.hashes: dict[tuple[str, str], str] = {}
        self.told: list[str] = []

    async def step(self) -> None:
        act = self.dice.choice(
            (self.create, self.create, self.commit, self.stream, self.delete, self.revert, self.mirror)
        )
        try:
            await act()
        except StateError as refused:  # nothing to merge, or somebody would lose: said, and nothing changed
            if refused.effect != "none":
                raise
            self.told.append(f"{act.__name__}: refused")
        else:
            self.told.append(act.__name__)
        await self.check()

    async def check(self) -> None:
        ok = {snapshot.name for snapshot in await self.vm.snapshots() if snapshot.state == "ok"}
        self.hashes = {key: value for key, value in self.hashes.items() if key[0] in ok}
        for snapshot in await self.vm.snapshots():  # what a revert kept has a moment of its own: now
            for point in snapshot.points:
                key = (snapshot.name, point.disk)
                if snapshot.state == "ok" and key not in self.hashes:
                    self.hashes[key] = await content_hash(self.vm, point.layer)
        await hold_invariants(self.vm, self.hashes)

    async def create(self) -> None:
        if await self.vm.is_running():
            offset = self.dice.randrange(8) * MIB
            await fill(self.vm, "vda", self.dice.randrange(1, 256), offset=offset)
        await self.vm.snapshot()

    async def commit(self) -> None:
        ids = (await self.vm.chains())[0].ids
        low = self.dice.randrange(len(ids))
        high = self.dice.randrange(len(ids))
        await self.unchanged(lambda: self.vm.commit("vda", base=ids[low], top=ids[high], consume=True))

    async def stream(self) -> None:
        base = self.dice.choice((None, *(await self.vm.chains())[0].ids))
        await self.unchanged(lambda: self.vm.stream("vda", base=base))

    async def delete(self) -> None:
        names = [snapshot.name for snapshot in await self.vm.snapshots()]
        if names:
            chosen = self.dice.sample(names, self.dice.randint(1, min(3, len(names))))
            children = self.dice.random() < 0.2
            await self.unchanged(lambda: self.vm.delete_snapshots(*chosen, children=children))

    async def revert(self) -> None:
        names = [snapshot.name for snapshot in await self.vm.snapshots() if snapshot.state == "ok"]
        if names:
            name = self.dice.choice(names)
            await self.vm.revert(name, discard=self.dice.random() < 0.3)
            ok = {snapshot.name for snapshot in await self.vm.snapshots()}
            if not await self.vm.is_running() and name in ok:
                assert await self.now() == self.hashes[name, "vda"]

    async def mirror(self) -> None:
        target = context_of(self.vm).home.data / f"copy-{len(self.told)}.qcow2"
        shallow = self.dice.random() < 0.5
        await self.unchanged(lambda: self.vm.mirror("vda", str(target), mode="pivot", shallow=shallow))

    async def unchanged(self, act: Callable[[], Awaitable[object]]) -> None:
        """Do it; a stopped machine's disk reads as before."""
        before = None if await self.vm.is_running() else await self.now()
        await act()
        if before is not None:
            assert await self.now() == before

    async def now(self) -> str:
        return await content_hash(self.vm, (await self.vm.chains())[0].active.id)


@pytest.mark.grid
@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("seed", range(12))
async def test_a_random_history(q: qmpsnap.Controller, seed: int, state: str) -> None:
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    history = History(vm, seed)
    for number in range(2):
        await fill(vm, "vda", number + 1, offset=number * MIB)
        await vm.snapshot()
    await history.check()
    if state == "stopped":
        await vm.stop(force=True)
    for _ in range(STEPS):
        await history.step()
    assert any("refused" not in told for told in history.told), history.told
    if await vm.is_running():
        await vm.stop(force=True)
    await vm.start(paused=True)
    await history.check()
