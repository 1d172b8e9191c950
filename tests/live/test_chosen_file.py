"""``snapshot create --file``: layers at places of the user's choice, and every verb on them."""

import contextlib
from pathlib import Path
from typing import Any

import anyio
import pytest

import qmpsnap
from qmpsnap.block.image import staged as places
from qmpsnap.cli.main import main
from qmpsnap.errors import DeadlinePassed, HostCannot, ImageRefused, NotFoundError, QmpsnapError, StateError, UsageError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.ops.memory import save
from qmpsnap.qmp import migration
from tests.live.machine import MIB, context_of, fill, hold_invariants, snapshot_hashes
from tests.live.test_full import survives_failure

SPEC = MachineSpec(
    name="still",
    memory=64 * MIB,
    disks=tuple(DiskSpec(name=name, size=16 * MIB, snapshot=name != "vdc") for name in ("vda", "vdb", "vdc")),
)


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_every_verb_on_such_layers(q: qmpsnap.Controller, place: Path, state: str) -> None:
    vm = await q.define(SPEC)

    async def write(pattern: int) -> None:
        if state == "stopped":
            await vm.start(paused=True)
        await fill(vm, "vda", pattern, offset=pattern * MIB)
        if state == "stopped":
            await vm.stop(force=True)

    if state == "running":
        await vm.start(paused=True)
    await write(1)
    with contextlib.chdir(place):
        await vm.snapshot("s1", files={"vda": "one.qcow2"})  # a relative path begins where we are
    one = (await vm.chains("vda"))[0].active
    assert (one.path, one.owned) == (str(place / "one.qcow2"), True)
    assert (place / "one.qcow2").stat().st_mode & 0o777 == 0o600
    assert (await vm.chains("vdb"))[0].active.path.startswith(str(context_of(vm).home.machine_dir("still")))
    await write(2)
    await vm.snapshot("s2", files={"vda": place / "two.qcow2", "vdb": place / "b.qcow2"})
    await write(3)
    await vm.add_layers(disks=["vda"], files={"vda": place / "three.qcow2"})
    await write(4)
    assert _names(place) == ["b.qcow2", "one.qcow2", "three.qcow2", "two.qcow2"]
    hashes = await snapshot_hashes(vm)
    await hold_invariants(vm, hashes)

    await vm.commit("vda", base=(await vm.chains("vda"))[0].ids[2])
    assert _names(place) == ["b.qcow2", "one.qcow2", "two.qcow2"]
    await hold_invariants(vm, hashes)
    await vm.revert("s1")
    await hold_invariants(vm, hashes)
    (auto,) = (s.name for s in await vm.snapshots() if s.name.startswith("auto-"))
    await vm.revert(auto, discard=True)
    hashes = await snapshot_hashes(vm)
    await vm.delete_snapshots("s2")
    hashes = {key: value for key, value in hashes.items() if key[0] != "s2"}
    await hold_invariants(vm, hashes)
    await vm.snapshot("s3", files={"vda": place / "last.qcow2"})
    await vm.stream("vda")
    hashes = await snapshot_hashes(vm)
    await hold_invariants(vm, hashes)
    await vm.delete_snapshots("s1", auto)
    await hold_invariants(vm, {key: value for key, value in hashes.items() if key[0] == "s3"})
    if state == "running":
        await vm.stop(force=True)
    removed = await vm.undefine(disks="remove")
    assert str(place / "last.qcow2") in removed
    assert _names(place) == []


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_branch_of_such_layers_is_measured(q: qmpsnap.Controller, place: Path, state: str) -> None:
    """The cheaper direction is taken, and what is left over goes with the next delete, as in the machine's folder."""
    vm = await q.define(SPEC)
    await vm.start(paused=True)
    await vm.snapshot("s1", disks=["vda"], files={"vda": place / "small"})
    await fill(vm, "vda", 1, length=MIB)
    await vm.snapshot("s2", disks=["vda"], files={"vda": place / "large"})
    await fill(vm, "vda", 2, offset=2 * MIB, length=3 * MIB)
    await vm.snapshot("s3", disks=["vda"])
    await vm.revert("s1", discard=True)
    if state == "stopped":
        await vm.stop(force=True)
    hashes = await snapshot_hashes(vm)
    done = await vm.delete_snapshots("s2")
    assert [choice.how for choice in done._plan.reductions[0].choices] == ["stream", "commit"]
    assert MIB <= done.bytes < 2 * MIB
    assert _names(place) == ["large"]
    del hashes["s2", "vda"]
    await hold_invariants(vm, hashes)
    await vm.delete_snapshots("s3", metadata=True)
    assert _names(place) == ["large"]
    await vm.delete_snapshots("s1")
    assert _names(place) == []
    await hold_invariants(vm)


async def test_files_that_are_kept(q: qmpsnap.Controller, place: Path) -> None:
    vm = await q.define(SPEC)
    await vm.snapshot("s1", files={"vda": place / "one"})
    with pytest.raises(StateError, match="elsewhere/one"):
        await vm.undefine()
    assert str(place / "one") in await vm.undefine(disks="keep")
    assert _names(place) == ["one"]


async def test_what_is_refused(q: qmpsnap.Controller, place: Path) -> None:
    vm = await q.define(SPEC)
    folder = context_of(vm).home.machine_dir("still")
    (place / "taken").write_bytes(b"mine")
    (place / "dangling").symlink_to(place / "nowhere")
    await vm.snapshot("s0", files={"vda": place / "gone"})
    (place / "gone").rename(place / "moved")
    cases: list[tuple[type[QmpsnapError], dict[str, Any]]] = [
        (NotFoundError, {"files": {"vdz": place / "new"}}),
        (UsageError, {"files": {"vdc": place / "new"}}),
        (UsageError, {"files": {"vda": place / "new"}, "disks": ["vdb"]}),
        (UsageError, {"files": {"vda": place / "new", "vdb": place / "new"}}),
        (UsageError, {"files": {"vda": place / ".." / "new"}}),
        (UsageError, {"files": {"vda": folder / "vda-77.qcow2"}}),
        (UsageError, {"files": {"vda": folder / "vars.fd"}}),
        (UsageError, {"files": {"vda": folder.parent / "other" / "x"}}),
        (ImageRefused, {"files": {"vda": str(place / "new\nline")}}),
        (StateError, {"files": {"vda": place / "taken"}}),
        (StateError, {"files": {"vda": place / "dangling"}}),
        (StateError, {"files": {"vda": place / "gone"}}),
        (HostCannot, {"files": {"vda": place / "no" / "new"}}),
        (HostCannot, {"files": {"vda": place / "taken" / "new"}}),
    ]
    serial, names = context_of(vm).store.next_serial(), _names(place)
    for family, options in cases:
        for call in (vm.snapshot, vm.plan_snapshot):
            with pytest.raises(QmpsnapError) as refused:
                await call(**options)
            assert type(refused.value) is family, (options, refused.value)
            assert refused.value.effect == "none"
    assert (context_of(vm).store.next_serial(), _names(place)) == (serial, names)
    (place / "moved").rename(place / "gone")
    await hold_invariants(vm)


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_a_strangers_file_at_the_last_moment_is_not_touched(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    vm = await q.define(SPEC)
    if state == "running":
        await vm.start(paused=True)
    real = places.claim

    async def late(part: str, path: str) -> None:
        if path.endswith("b"):
            Path(path).write_bytes(b"mine")
        await real(part, path)

    monkeypatch.setattr(places, "claim", late)
    with pytest.raises(StateError, match="exists already") as refused:
        await vm.snapshot("s", files={"vda": place / "a", "vdb": place / "b"})
    assert refused.value.effect == "none"
    assert [(file.name, file.read_bytes()) for file in place.iterdir()] == [("b", b"mine")]
    await hold_invariants(vm)


async def test_beside_the_memory(q: qmpsnap.Controller, still_spec: MachineSpec, place: Path) -> None:
    vm = await q.define(still_spec)
    await vm.start()  # its firmware runs and waits, which is guest enough
    await fill(vm, "vda", 1)
    planned = (await vm.plan_snapshot(kind="full", files={"vda": place / "a"})).details
    assert planned.memory
    assert planned.overlays[0].layer.path == str(place / "a")
    assert _names(place) == []
    taken = await vm.snapshot("all", kind="full", files={"vda": place / "a"})
    assert taken.vmstate
    assert _names(place) == ["a"]
    await fill(vm, "vda", 2)
    hashes = await snapshot_hashes(vm)
    await hold_invariants(vm, hashes)
    done = await vm.revert("all", discard=True)
    assert (done.state, done.memory) == ("running", True)
    assert _names(place) == []
    await hold_invariants(vm, hashes)
    with pytest.raises(UsageError, match="creates no layers"):
        await vm.snapshot("in", kind="internal", files={"vda": place / "a"})  # type: ignore[call-overload]


async def test_memory_that_fails_leaves_nothing_there(
    q: qmpsnap.Controller, still_spec: MachineSpec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = await q.define(still_spec)
    await vm.start()
    if not await survives_failure(vm):
        return  # nothing fails there once the disks have moved

    async def never(*_: Any) -> migration.Migration:
        await anyio.sleep_forever()
        raise AssertionError

    chain = (await vm.chains())[0].ids
    for degrade in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(save, "fixed", never)
            attempt = vm.snapshot("slow", kind="full", max_pause_ms=500, degrade=degrade, files={"vda": place / "a"})
            if degrade:
                assert (await attempt).kind == "disk"
            else:
                with pytest.raises(DeadlinePassed):
                    await attempt
        assert _names(place) == ["a"] * degrade
        assert ((await vm.chains())[0].ids == chain) == (not degrade)
        await hold_invariants(vm)


def test_on_the_command_line(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "s.yaml").write_text("name: still\nmemory: 64M\ndisks: [{name: vda, size: 1M}, {name: vdb, size: 1M}]\n")
    assert main(["define", str(home / "s.yaml")]) == 0
    create = ["snapshot", "create", "still"]
    assert main([*create, "--file", f"vda={place}/a", "--dry-run"]) == 0
    assert f"create {place}/a on" in capsys.readouterr().out
    assert _names(place) == []
    assert main([*create, "--file", f"vda={place}/a", "--file", f"vda={place}/b"]) == 2
    assert main([*create, "--file", "vda"]) == 2
    assert main([*create, "--kind", "internal", "--file", f"vda={place}/a"]) == 2
    assert main([*create, "--file", f"vda={place}/a", "--file", f"vdb={place}/b"]) == 0
    assert _names(place) == ["a", "b"]
    assert main([*create, "--file", f"vda={place}/a"]) == 4
    assert main([*create, "--no-snapshot", "--file", f"vda={place}/c"]) == 0
    assert _names(place) == ["a", "b", "c"]
