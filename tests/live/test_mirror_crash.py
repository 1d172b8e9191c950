"""Mirrors that are cancelled, meet a stranger's file, or lose QEMU; what dies where is in tests/faults."""

import os
import signal
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.errors import QmpsnapError, StateError
from qmpsnap.host.files import FileId
from qmpsnap.model.names import LayerId
from qmpsnap.qmp.commands import JobInfo
from tests.harness.deaths import STORE, Call, die_at
from tests.live.machine import active_hash, content_hash, context_of, grown_and_stopped, hold_invariants

pytestmark = pytest.mark.version


@pytest.mark.parametrize("form", ["pivot", "finish"])
@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_cancelled_scope_leaves_the_chain_as_before(
    q: qmpsnap.Controller, place: Path, state: str, form: str
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    if state == "running":
        await vm.start(paused=True)
    chain = (await vm.chains())[0].ids
    with anyio.CancelScope() as scope:

        def cancel(_: JobInfo) -> None:
            scope.cancel()

        await vm.mirror("vda", place / "copy", mode="pivot" if form == "pivot" else "finish", report=cancel)
    assert scope.cancelled_caught
    assert (await vm.chains())[0].ids == chain
    assert list(place.iterdir()) == []
    await hold_invariants(vm, hashes)
    assert await active_hash(vm) == now


async def test_a_strangers_file_at_the_last_moment_is_not_touched(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, hashes, _ = await grown_and_stopped(q)
    target = place / "copy"
    from qmpsnap.block.image import staged as places

    real = places.put

    async def late(part: str, path: str, file: FileId) -> None:
        target.write_bytes(b"mine")
        await real(part, path, file)

    monkeypatch.setattr(places, "put", late)
    with pytest.raises(StateError, match="exists already") as refused:
        await vm.mirror("vda", target, mode="pivot")
    assert refused.value.effect == "none"
    assert [(file.name, file.read_bytes()) for file in place.iterdir()] == [("copy", b"mine")]
    await hold_invariants(vm, hashes)


async def test_qemu_ends_while_it_copies(q: qmpsnap.Controller, place: Path) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    process = await vm.start(paused=True)
    with pytest.raises(QmpsnapError) as gone:
        await vm.mirror("vda", place / "copy", mode="pivot", report=lambda _: os.kill(process.pid, signal.SIGKILL))
    assert gone.value.exit_code == 5
    await vm.recover()
    assert list(place.iterdir()) == []
    await hold_invariants(vm, hashes)
    assert await content_hash(vm, LayerId("vda-3")) == now


@pytest.mark.parametrize("then", ["moved", "removed", "another", "a link"])
async def test_whoever_takes_a_finished_copy_away_locks_no_machine(
    q: qmpsnap.Controller, place: Path, then: str
) -> None:
    vm, hashes, now = await grown_and_stopped(q)
    await vm.start(paused=True)
    copy = place / "copy"
    # Its marks are `made`, `started` and `finalizing`.
    point = Call(STORE, "SqliteStore.mark", "after", 3)
    await die_at(point, "mirror", "still", "vda", str(copy), "--finish", "--progress", "none")
    copy.rename(place / "mine")
    if then == "removed":
        (place / "mine").unlink()
    elif then == "another":
        copy.write_bytes(b"mine")
    elif then == "a link":
        copy.symlink_to(place / "mine")
    assert await vm.recover()
    assert await vm.recover() == []
    ended = context_of(vm).store.operations("still")[-1]
    assert (ended.verb, ended.state) == ("mirror", "settled")
    assert ended.error
    assert str(copy) in ended.error
    if then == "another":
        assert copy.read_bytes() == b"mine"
    await vm.snapshot("after")
    await hold_invariants(vm, hashes | {("after", "vda"): now})
