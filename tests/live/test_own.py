"""Images that become qmpsnap's: merges write to them and remove them, and nothing of them has to be copied."""

# ruff: noqa: F811 - "launched" and its "folder" are fixtures

from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.cli.main import main
from qmpsnap.errors import ImageRefused, SpecError, StateError, UsageError
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.live.machine import MIB, content_hash, fill, hold_invariants
from tests.live.test_adopt import FORMS, NAMES, Foreign, digest, folder, launched, run  # noqa: F401
from tests.live.test_import import image

pytestmark = pytest.mark.version


def spec(path: Path, **disk: Any) -> MachineSpec:
    return MachineSpec(name="web", memory=64 * MIB, disks=(DiskSpec(name="vda", image=str(path), own=True, **disk),))


@pytest.mark.parametrize("state", ["running", "stopped"])
async def test_the_first_delete_writes_to_the_image(q: qmpsnap.Controller, place: Path, state: str) -> None:
    web = image(place / "web.qcow2", mark=1)
    vm = await q.define(spec(web), folders=[place])
    await vm.start(paused=True)
    await fill(vm, "vda", 3, offset=3 * MIB)
    first = await vm.snapshot("s1")
    await fill(vm, "vda", 4, offset=4 * MIB)
    await vm.snapshot("s2")
    if state == "stopped":
        await vm.stop(force=True)
    plan: Any = (await vm.plan_delete_snapshots("s1")).details
    (step,) = [step for reduction in plan.reductions for step in reduction.steps]
    assert (step.kind, step.into.path, step.moves < 2 * MIB) == ("commit", str(web), True)
    assert first.points[0].layer == step.into.id
    await vm.delete_snapshots("s1")
    await hold_invariants(vm)
    await vm.delete_snapshots("s2")
    await hold_invariants(vm)
    assert [layer.layer.path for layer in (await vm.chains())[0].layers] == [str(web)]
    await vm.snapshot("s3")
    if state == "running":
        await vm.stop(force=True)
    await vm.stream("vda")
    await hold_invariants(vm)
    with pytest.raises(StateError, match=r"1 snapshot\(s\)"):
        await vm.undefine()
    assert str(web) in await vm.undefine(disks="remove")
    assert not web.exists()


async def test_what_lies_below_the_image_stays_its_owners(q: qmpsnap.Controller, folder: Path) -> None:
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    before = digest(base)
    with pytest.raises(ImageRefused, match=r"names its backing file as base\.qcow2") as refused:
        await q.define(spec(top), folders=[folder])
    assert f"qemu-img rebase -u -F qcow2 -b {base} {top}" in refused.value.hint
    run(folder, "rebase", "-u", "-F", "qcow2", "-b", str(base), "top.qcow2")
    vm = await q.define(spec(top), folders=[folder])
    assert [layer.layer.owned for layer in (await vm.chains())[0].layers] == [False, True]
    await vm.snapshot("s1")
    with pytest.raises(StateError, match="not created by qmpsnap"):
        await vm.commit("vda", base=(await vm.chains())[0].ids[0], consume=True)
    await vm.delete_snapshots("s1")
    await vm.undefine(disks="remove")
    assert (digest(base), top.exists()) == (before, False)


async def test_a_refused_definition_leaves_the_image(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a definition has known before it began is not among the files that undoing it removes."""
    web = image(place / "web.qcow2", mark=1)

    async def settle(*_: object, **__: object) -> None:
        raise UsageError("no")

    with monkeypatch.context() as patch:
        patch.setattr(type(q.context.astore), "settle", settle)
        with pytest.raises(UsageError):
            await q.define(spec(web), folders=[place])
    assert header.read(web).virtual_size == 16 * MIB
    vm = await q.define(spec(web), folders=[place])
    await hold_invariants(vm)


@pytest.mark.parametrize("content", ["size", "base", "device"])
def test_only_an_image_can_be_given(q: qmpsnap.Controller, place: Path, content: str) -> None:
    written = place / "web.yaml"
    written.write_text(
        f"name: web\ndisks:\n  - {{name: vda, {content}: {'1M' if content == 'size' else 'x'}, own: true}}\n"
    )
    with pytest.raises(SpecError, match=f"'own' belongs to 'image', not to '{content}'"):
        q.read_spec(written)


def test_the_cost_of_the_first_delete_is_said(home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web = image(place / "web.qcow2", mark=1)
    (place / "web.yaml").write_text("name: web\nmemory: 64M\ndisks:\n  - {name: vda, image: web.qcow2}\n")
    assert main(["define", str(place / "web.yaml")]) == 0
    said = capsys.readouterr().err
    assert "disk vda: deleting the first snapshot will copy " in said
    assert "own: true" in said
    for name, told in (("s1", True), ("s2", False)):
        assert main(["snapshot", "create", "web", name]) == 0
        assert (f"deleting snapshot {name} will copy" in capsys.readouterr().err) is told
    assert main(["undefine", "web", "--keep-disks"]) == 0
    for own in ([], ["--own"]):
        assert main(["adopt", "web", "--image", f"vda={web}", *own]) == 0
        assert ("will copy" in capsys.readouterr().err) is not bool(own)
        assert main(["undefine", "web", "--keep-disks"]) == 0
    assert web.exists()


@pytest.mark.parametrize(
    "form",
    [
        "drive",
        "blockdev",
        *(pytest.param(form, marks=pytest.mark.grid) for form in sorted({*FORMS} - {"drive", "blockdev"})),
    ],
)
async def test_an_adopted_machine_goes_back_to_its_own_image(
    q: qmpsnap.Controller, folder: Path, launched: Any, form: str
) -> None:
    run(folder, "rebase", "-u", "-F", "qcow2", "-b", str(folder / "base.qcow2"), "top.qcow2")
    theirs: Foreign = launched(form)
    base = digest(theirs.folder / "base.qcow2")
    await theirs.io("write -P 2 1M 1M")
    vm = await q.adopt("theirs", theirs.socket, own=True)
    await vm.snapshot("s1")
    await theirs.io("write -P 3 3M 1M")
    await vm.snapshot("s2")
    kept = await content_hash(vm, (await vm.snapshots())[1].points[0].layer)
    await theirs.io("write -P 4 4M 1M")
    await vm.delete_snapshots("s1")
    assert await content_hash(vm, (await vm.snapshots())[0].points[0].layer) == kept
    assert (await vm.chains())[0].layers[-2].layer.path == str(theirs.folder / "top.qcow2")
    await vm.delete_snapshots("s2")
    assert [Path(layer.layer.path).name for layer in (await vm.chains())[0].layers] == ["base.qcow2", "top.qcow2"]
    await theirs.io("write -P 5 5M 1M")
    for place, pattern in enumerate((1, 2, 0, 3, 4, 5)):
        await theirs.io(f"read -P {pattern} {place}M 1M")
    assert (await vm.check()).findings == ()
    assert digest(theirs.folder / "base.qcow2") == base
    await vm.snapshot("s3")
    await vm.stream(NAMES[form])
    await theirs.io("read -P 5 5M 1M")
    assert (await vm.check()).findings == ()
