"""The same cases through both APIs, with ``await`` and without; between them they call every public method."""

import inspect
import re
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread

import qmpsnap
import qmpsnap.sync
from qmpsnap.errors import NameTaken, NotFoundError, ProcessError, StateError
from qmpsnap.model.machines.spec import MachineSpec
from tests.api.described import CLASSES, public
from tests.live.booted import BOOT
from tests.live.machine import MIB, ONE_DISK
from tests.live.test_adopt import FORMS, Foreign, folder, launched

__all__ = ["folder", "launched"]  # fixtures

HELD_ELSEWHERE = {"vm.fork", "vm.plan_fork", "vm.pool", "vm.wakeup"}
"""They need a guest in a state of its own: tests/live/test_fork.py, tests/live/test_suspended.py."""


class Followed:
    """A controller or handle of either API, for cases that await everything."""

    def __init__(self, of: Any, kind: str) -> None:
        self._of, self._kind = of, kind

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._of, name)
        if not callable(method):
            return method
        if name == "events":
            return partial(self._events, method)
        return partial(self._call, method)

    async def _call(self, method: Any, *arguments: Any, **named: Any) -> Any:
        given = [one._of if isinstance(one, Followed) else one for one in arguments]
        if self._kind == "sync":
            found = await to_thread.run_sync(partial(method, *given, **named))
        else:
            found = method(*given, **named)
            found = await found if inspect.isawaitable(found) else found
        return self._followed(found)

    def _followed(self, found: Any) -> Any:
        if isinstance(found, qmpsnap.MachineHandle | qmpsnap.sync.MachineHandle):
            assert (self._kind == "sync") == isinstance(found, qmpsnap.sync.MachineHandle)
            return Followed(found, self._kind)
        return tuple(map(self._followed, found)) if type(found) is tuple else found

    async def _events(self, method: Any, **named: Any) -> AsyncIterator[Any]:
        if self._kind == "async":
            async for event in method(**named):
                yield event
            return
        found: Iterator[Any] = await to_thread.run_sync(partial(method, **named))
        end = object()
        while (event := await to_thread.run_sync(next, found, end)) is not end:
            yield event


@pytest.fixture(params=["async", "sync"])
async def q(request: pytest.FixtureRequest, home: Path) -> AsyncIterator[Any]:
    if request.param == "async":
        async with qmpsnap.open() as controller:
            yield Followed(controller, "async")
        return
    opening = qmpsnap.sync.open()
    controller_ = await to_thread.run_sync(opening.__enter__)
    try:
        yield Followed(controller_, "sync")
    finally:
        await to_thread.run_sync(opening.__exit__, None, None, None)


async def test_a_machine_from_beginning_to_end(q: Any, tmp_path: Path) -> None:
    spec = tmp_path / "still.yaml"
    spec.write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 16M}]\n")
    assert (await q.read_spec(spec)).name == "still"
    planned = await q.plan_define(spec)
    vm = await q.apply(planned)
    assert (await q.define(spec, exist_ok=True)).name == vm.name
    spec.write_text("name: still\nmemory: 128M\ndisks: [{name: vda, size: 16M}]\n")
    with pytest.raises(NameTaken, match=r"its spec differs: memory \(recorded: 67108864, now: 134217728\)"):
        await q.define(spec, exist_ok=True)
    with pytest.raises(NotFoundError):
        await q.machine("other")
    assert [one.name for one in await q.machines()] == ["still"]
    assert repr((await q.machine("still"))._of) == "<Machine still stopped>"
    assert await q.templates() == ()
    assert (await q.plan_prune_templates()).files == ()
    assert (await q.prune_templates()).removed == ()
    assert (await q.recover("still")) == await vm.recover() == []
    await vm.start(paused=True)
    assert await vm.is_running()
    assert await vm.state() == "prelaunch"
    assert await vm.resume() == "running"
    events = vm.events(interval=0.02)
    assert (await anext(events)).state == "running"
    await vm.pause()
    assert (await anext(events)).state == "paused"
    assert (await vm.record()).name == "still"
    assert await vm.shortage() == await vm.left_out() == await vm.misfits() == ()
    assert await vm.jobs() == ()
    assert await vm.wait() == await vm.cancel() == []
    assert (await vm.check()).findings == ()
    await vm.stop(force=True)
    assert [event.state async for event in events] == ["stopped"]
    assert (await vm.plan_set({"memory": "96M"})).summary == "set memory"
    assert (await vm.set({"memory": "96M"})).changes
    assert (await vm.plan_undefine(disks="remove")).files
    assert await vm.undefine(disks="remove")
    assert await q.machines() == ()


async def test_snapshots_and_layers(q: Any, tmp_path: Path) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    taken = await vm.apply(await vm.plan_snapshot("s1"))
    assert taken.name == (await vm.snapshots())[0].name == "s1"
    await vm.snapshot("in", kind="internal", memory=False)
    assert (await vm.plan_rename_snapshot("in", "inside")).summary
    await vm.rename_snapshot("in", "inside")
    await vm.snapshot("s2")
    told: list[str] = []
    assert (await vm.plan_stream("vda", base="s1")).qmp
    done = await vm.stream("vda", base="s1", report=lambda info: told.append(info.status))
    assert (done.disk, told[-1]) == ("vda", "concluded")
    assert (await vm.plan_delete_snapshots("s2")).bytes == 0
    assert (await vm.delete_snapshots("s2")).names == ("s2",)
    await vm.apply(await vm.plan_add_layers())
    assert len(await vm.add_layers()) == 1
    above = (await vm.chains())[0].layers[1].layer.id
    assert (await vm.plan_commit("vda", base=above)).qmp
    assert (await vm.commit("vda", base=above)).into == above
    assert (await vm.plan_mirror("vda", tmp_path / "copy", mode="finish")).files[0].path == str(tmp_path / "copy")
    assert (await vm.mirror("vda", tmp_path / "copy", mode="finish")).layer is None
    await vm.apply(await vm.plan_resize("vda", "32M"))
    with pytest.raises(StateError):
        await vm.resize("vda", "32M")
    with pytest.raises(StateError, match="lies on no clone in a Ceph cluster"):
        await vm.plan_flatten("vda")
    with pytest.raises(StateError, match="lies on no clone in a Ceph cluster"):
        await vm.flatten("vda")
    with pytest.raises(NotFoundError):
        await vm.set_speed(1 << 20)
    await vm.stop(force=True)
    assert (await vm.chains("vda"))[0].active.virtual_size == 32 * MIB
    new = await vm.apply(await vm.plan_attach_disk({"size": "1M"}))
    assert (new.disk.name, (await vm.plan_detach_disk("vdb")).files[0].path) == ("vdb", new.path)
    assert (await vm.detach_disk("vdb")).kept
    assert (await vm.attach_disk({"size": "1M"})).disk.name == "vdc"
    nic = await vm.apply(await vm.plan_attach_nic({}))
    assert (await vm.plan_detach_nic(nic.mac)).summary
    assert (await vm.detach_nic(nic.number)).mac == nic.mac
    assert (await vm.attach_nic({"model": "e1000"})).plan.nic.model == "e1000"
    await vm.apply(await vm.plan_rename("moved"))
    vm = await q.machine("moved")
    assert (await vm.rename("back")).name == "back"


async def test_back_and_forth(q: Any) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start(paused=True)
    assert (await vm.plan_push("a")).qmp
    before = await vm.push("a")
    assert (await vm.plan_describe_snapshot(before, "first")).summary
    assert (await vm.describe_snapshot(before, "first", tags={"k": "v"})).description == "first"
    assert (await vm.plan_revert(before)).files
    assert (await vm.revert(before, discard=True, state="paused")).snapshot.name == "a"
    assert (await vm.plan_pop()).summary
    assert (await vm.pop()).state == "paused"
    assert (await vm.plan_save(name="bed")).files
    assert (await vm.save(name="bed")).vmstate
    assert (await vm.plan_restore(discard=True)).files
    assert (await vm.restore(discard=True, paused=True)).memory
    await vm.stop(force=True)


async def test_a_guest(q: Any, guest_spec: MachineSpec, tmp_path: Path) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    assert (await vm.run("echo hello", timeout=BOOT)).stdout == "hello\n"
    with pytest.raises(ProcessError) as failed:
        await vm.run("exit 7")
    assert failed.value.exit_status == 7
    assert await vm.put(b"content", "/tmp/file") == await vm.get("/tmp/file", tmp_path / "file") == 7
    assert isinstance(await vm.fstrim(), tuple)
    await vm.stop()


async def test_a_qemu_of_somebody_else(q: Any, launched: Any) -> None:
    theirs: Foreign = launched(FORMS["drive"])
    assert (await q.plan_adopt("theirs", theirs.socket)).files
    vm = await q.adopt("theirs", theirs.socket)
    spec = (await vm.launched_as()).spec
    assert (await vm.plan_take(spec)).summary
    assert (await vm.take(spec)).waits_for == theirs.process.pid


def test_every_method_is_called() -> None:
    every = {f"{letter}.{name}" for letter, of in CLASSES.items() for name in public(of)} - HELD_ELSEWHERE
    called = {".".join(found) for found in re.findall(r"\b(q|vm)\.(\w+)\(", Path(__file__).read_text())}
    assert every - called == set()
