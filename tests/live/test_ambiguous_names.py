"""A name stands for one thing that is there: layers, snapshots and files are not taken for each other."""

import json
from pathlib import Path

import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import NameRefused, StateError, UsageError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.operations.operation import Change
from tests.live.machine import MIB, context_of

SPEC = MachineSpec(name="still", memory=64 * MIB, disks=(DiskSpec(name="vda", size=MIB),))


async def commit(*options: str) -> int:
    return await to_thread.run_sync(main, ["commit", "still", "vda", "--progress", "none", *options])


async def test_a_consumed_snapshot_stands_for_nothing(
    q: qmpsnap.Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await q.define(SPEC)
    for name in ("s1", "s2", "s3"):
        await vm.snapshot(name)
    await vm.commit("vda", base="s1", top="s2", consume=True)
    snapshots = {snapshot.name: snapshot for snapshot in await vm.snapshots()}
    assert (snapshots["s1"].state, snapshots["s2"].state) == ("consumed", "ok")
    assert snapshots["s1"].points == snapshots["s2"].points  # where s2 lies now, s1 did before
    for options in (["--base", "s1"], ["--top", "s1"], ["--base", "s1", "--dry-run"], ["--base", "s1", "--top", "s3"]):
        assert await commit(*options) == 4
        assert "snapshot s1 of machine still was invalidated" in capsys.readouterr().err
    with pytest.raises(StateError, match="s1 of machine still was invalidated"):
        await vm.stream("vda", base="s1")
    place = context_of(vm).store.layer(snapshots["s2"].points[0].layer).path
    for words in (["snapshot", "show", "still", "s1"], ["snapshot", "show", "still", "s1", "-o", "json"]):
        assert await to_thread.run_sync(main, words) == 0
        assert place not in capsys.readouterr().out
    assert await to_thread.run_sync(main, ["tree", "still", "-o", "json"]) == 0
    shown = {found["name"]: found["disks"]["vda"] for found in json.loads(capsys.readouterr().out)["snapshots"]}
    assert (shown["s1"]["path"], shown["s2"]["path"]) == (None, place)
    assert await commit("--base", "s2", "--dry-run") == 0


async def test_no_snapshot_is_called_like_a_layer(q: qmpsnap.Controller) -> None:
    base = await q.define(MachineSpec(name="base", memory=64 * MIB, disks=(DiskSpec(name="sda", size=MIB),)))
    path = (await base.chains())[0].active.path
    await base.snapshot("frozen")
    disks = (DiskSpec(name="vda", base=path), DiskSpec(name="snap", size=MIB), DiskSpec(name="auto", size=MIB))
    vm = await q.define(MachineSpec(name="clone", memory=64 * MIB, disks=disks))
    await vm.snapshot("mine")
    for name in ("vda-3", "vda-999999", "snap-1", "auto-7", "sda-1", "sda-40"):  # sda's are the layers of base
        for attempt in (vm.snapshot(name), vm.push(name), vm.rename_snapshot("mine", name), vm.plan_snapshot(name)):
            with pytest.raises(NameRefused, match=f"{name} is a name of layers"):
                await attempt
        with pytest.raises(NameRefused):
            await vm.snapshot(name, kind="internal")
    assert [found.name for found in await vm.snapshots()] == ["mine"]
    assert (await vm.snapshot()).name == "snap.1"
    for name in ("vda-03", "vdb-3", "vda-3a", "vda.3"):  # no layer is called so
        assert (await vm.snapshot(name)).name == name
    reverted = await vm.revert("mine")
    assert reverted.kept is None or reverted.kept.name.startswith("auto.")


async def test_what_an_older_store_has_is_asked_about(
    q: qmpsnap.Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await q.define(SPEC)
    await vm.snapshot("s1")
    await vm.snapshot("s2")
    first, second, _ = (layer.layer.id for layer in (await vm.chains())[0].layers)
    context_of(vm).store.apply("still", Change(renamed={"s1": second, "s2": "vda-77"}))
    assert await commit("--base", second, "--dry-run") == 4
    told = capsys.readouterr().err
    assert f"{second} is both a layer of disk vda and a snapshot, at layer {first}" in told
    assert f"qmpsnap snapshot rename still {second} NAME" in told
    assert await commit("--base", "vda-77", "--dry-run") == 0  # a layer of that name there is not
    context_of(vm).store.apply("still", Change(renamed={second: first}))
    assert await commit("--base", first, "--consume", "--dry-run") == 0  # both mean the same


async def test_a_machine_and_a_file(q: qmpsnap.Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await q.define(SPEC)
    Path("still").write_text("name: other\nmemory: 64M\n")
    with (
        pytest.warns(DeprecationWarning, match="q.start"),
        pytest.raises(UsageError, match="'still' names both a machine and the file"),
    ):
        await q.start("still")
