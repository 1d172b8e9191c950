"""A clone is defined on a layer while another machine's operation changes it: whoever comes second is refused."""

import json
from pathlib import Path

import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.hints import as_typed
from qmpsnap.cli.main import main
from qmpsnap.errors import OperationPending, StateError
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.model.operations.operation import Change
from tests.harness.deaths import JOBS, STORE, Call, die_at, stopped_at
from tests.live.machine import MIB, context_of, grown, hold_invariants

FOLLOWS = Call(JOBS, "follow", "before", 1)
STOPPING = Call("qmpsnap.ops.revert.revert", "switch", "before", 1)
OPENS = Call(STORE, "SqliteStore.open_operation", "before", 1)
SETTLES = Call(STORE, "SqliteStore.settle", "before", 1)

CONSUME = ("commit", "still", "vda", "--consume")


def clone_on(layer: Layer) -> MachineSpec:
    return MachineSpec(name="clone", memory=64 * MIB, disks=(DiskSpec(name="vda", base=layer.path),))


def spec_file(home: Path, layer: Layer) -> str:
    path = home / "clone.json"  # YAML, too
    disks = [{"name": "vda", "base": layer.path}]
    path.write_text(json.dumps({"name": "clone", "memory": "64 MiB", "disks": disks}))
    return str(path)


def layers_of(vm: qmpsnap.MachineHandle) -> tuple[Layer, ...]:
    return context_of(vm).store.chains(vm.name)[0].layers


@pytest.mark.parametrize(
    ("point", "words", "layer"),
    [
        pytest.param(FOLLOWS, CONSUME, 0, id="commit, its base"),
        pytest.param(FOLLOWS, CONSUME, 1, id="commit, what goes"),
        pytest.param(FOLLOWS, ("snapshot", "delete", "still", "s1"), 0, id="delete"),
        pytest.param(FOLLOWS, ("stream", "still", "vda"), 1, id="stream"),
        pytest.param(STOPPING, ("snapshot", "revert", "still", "s1", "--discard"), 1, id="revert"),
        pytest.param(FOLLOWS, ("mirror", "still", "vda", "{copy}", "--pivot"), 1, id="mirror"),
    ],
)
async def test_no_clone_on_what_an_interrupted_operation_changes(
    q: qmpsnap.Controller, home: Path, point: Call, words: tuple[str, ...], layer: int
) -> None:
    vm = await grown(q, "s1", "s2")
    if "--consume" not in words:
        await vm.delete_snapshots("s2", metadata=True)  # its layer stays, and goes with what removes it
    on = layers_of(vm)[layer]
    await die_at(point, *(word.format(copy=home / "copy") for word in words))
    with pytest.raises(OperationPending, match="on machine still is still open and changes") as refused:
        await q.define(clone_on(on))
    assert as_typed(refused.value.hint).startswith("qmpsnap job wait still")
    assert as_typed(refused.value.hint).endswith("qmpsnap recover still")
    assert [found.name for found in await q.machines()] == ["still"]
    assert not (home / "machines" / "clone").exists()
    await vm.wait()
    await hold_invariants(vm)


async def test_a_clone_that_is_being_defined_counts_as_a_reader(q: qmpsnap.Controller, home: Path) -> None:
    vm = await grown(q, "s1", "s2")
    base = layers_of(vm)[0]
    async with stopped_at(SETTLES, "define", spec_file(home, base)) as other:
        with pytest.raises(OperationPending, match="machine clone is still open and is about to read") as refused:
            await vm.commit("vda", consume=True)
        assert as_typed(refused.value.hint) == "qmpsnap recover clone"
        assert [snapshot.state for snapshot in await vm.snapshots()] == ["ok", "ok"]
    assert other.returncode == 0
    with pytest.raises(StateError, match="of clone"):
        await vm.commit("vda", consume=True)
    await hold_invariants(vm)
    await hold_invariants(await q.machine("clone"))


async def test_a_definition_that_died_is_ended_by_its_name(
    q: qmpsnap.Controller, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = await grown(q, "s1")
    base = layers_of(vm)[0]
    await die_at(SETTLES, "define", spec_file(home, base))
    with pytest.raises(OperationPending):
        await vm.commit("vda", consume=True)
    capsys.readouterr()
    assert await to_thread.run_sync(main, ["recover", "clone"]) == 0
    assert "(define) was planned and is recovered" in capsys.readouterr().err
    assert await to_thread.run_sync(main, ["recover", "clone"]) == 3
    assert not (home / "machines" / "clone").exists()
    await vm.commit("vda", consume=True)
    await hold_invariants(vm)


async def test_a_plan_that_has_become_old_is_not_opened(q: qmpsnap.Controller, home: Path) -> None:
    vm = await grown(q, "s1", "s2")
    base = layers_of(vm)[0]
    spec = spec_file(home, base)
    async with stopped_at(OPENS, *CONSUME) as merging:
        clone = await q.define(clone_on(base))
    assert merging.returncode == 4
    await hold_invariants(vm)
    await clone.undefine(disks="remove")
    async with stopped_at(OPENS, "define", spec) as defining:
        await vm.commit("vda", consume=True)
    assert defining.returncode == 4
    assert [found.name for found in await q.machines()] == ["still"]
    await hold_invariants(vm)


async def test_a_guest_does_not_start_on_what_others_read(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    await vm.stop(force=True)
    active = layers_of(vm)[-1]
    reader = Layer(id=LayerId("vda-99"), path="/i/99", format="qcow2", backing=active.id, virtual_size=MIB)
    context_of(vm).store.apply(vm.name, Change(layers=(reader,)))
    with pytest.raises(StateError, match="which is read by layer vda-99; nothing was changed"):
        await vm.start(paused=True)
    context_of(vm).store.apply(vm.name, Change(removed_layers=(reader.id,)))
    await vm.start(paused=True)
    await hold_invariants(vm)
