"""What is said to be moved at most is at least what is: compressed, sparse, zeroed, of small and of large clusters."""

import os
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import allocated
from qmpsnap.errors import HostCannot
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import DiskSpec, Format
from qmpsnap.model.names import layer_id
from qmpsnap.model.operations.operation import Merge
from qmpsnap.model.planning.state import CLUSTER
from qmpsnap.ops.base import free_space
from qmpsnap.ops.base.free_space import Room
from qmpsnap.ops.merge.commit import StreamRequest, preview
from tests.faults import site
from tests.faults.site import KIB, ONE, qemu_io
from tests.live.conftest import place
from tests.live.machine import MIB, context_of

__all__ = ["place"]

BASES: dict[str, tuple[Format, tuple[str, ...], tuple[str, ...]]] = {
    "compressed": ("qcow2", (), ("write -c -P 1 0 2M",)),
    "small clusters": ("qcow2", ("-o", "cluster_size=4k"), tuple(f"write -P 2 {at}k 4k" for at in range(0, 2048, 128))),
    "large clusters": ("qcow2", ("-o", "cluster_size=2M"), ("write -P 3 0 512",)),
    "subclusters": ("qcow2", ("-o", "extended_l2=on"), ("write -P 4 0 2k", "write -P 4 1M 2k")),
    "zeros": ("qcow2", (), ("write -P 5 0 128k", "write -z 1M 512k")),
    "sparse raw": ("raw", (), ("write -P 6 0 4k", "write -P 6 256k 4k", "write -P 6 1M 4k")),
    "version 2": ("qcow2", ("-o", "compat=0.10"), ("write -P 7 0 1M",)),
}


def _base(folder: Path, name: str, *, size: int = 4 * MIB) -> tuple[Path, Format]:
    kind, options, commands = BASES[name]
    path = folder / "base"
    image = os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img"
    subprocess.run([image, "create", "-q", "-f", kind, *options, path, str(size)], check=True)
    lines = [word for line in commands for word in ("-c", line)]
    subprocess.run([qemu_io(), "-f", kind, *lines, path], check=True, stdout=subprocess.DEVNULL)
    return path, kind


def _occupied(path: str) -> int:
    return Path(path).stat().st_blocks * 512


@pytest.mark.parametrize("name", BASES)
async def test_a_stream_moves_no_more_than_it_says(q: qmpsnap.Controller, place: Path, name: str) -> None:
    base, kind = _base(place, name)
    vm = await q.define(replace(ONE, disks=(DiskSpec(name="vda", base=str(base), format=kind),)))
    active = context_of(vm).store.chains(vm.name)[0].active.path
    before = _occupied(active)
    made, _ = await preview(context_of(vm), vm.name, StreamRequest(disk="vda"))
    done = await vm.stream("vda")
    written = _occupied(active) - before
    (said,) = {step.moves for step in made.steps if isinstance(step, Merge)}
    assert done.bytes == said
    assert written <= said, f"{written} bytes were written, {said} at most were foretold"
    assert said <= 4 * MIB + 6 * CLUSTER


@pytest.mark.parametrize(("top", "zeros"), [("s2", True), (None, False)], ids=["middle", "active"])
async def test_a_commit_of_zeros_moves_no_more_than_it_says(
    q: qmpsnap.Controller, top: str | None, *, zeros: bool
) -> None:
    vm = await q.define(ONE)
    await vm.snapshot("s1")
    _write(context_of(vm).store.chains(vm.name)[0].active.path, "write -z 0 1M")
    await vm.snapshot("s2")
    base = context_of(vm).store.chains(vm.name)[0].base.path
    if zeros:
        await vm.start(paused=True)  # without a QEMU of its own whatever is committed is a worker's active layer
    before = _occupied(base)
    done = await vm.commit("vda", top=top, consume=True)
    (said,) = [step.moves for step in done._plan.steps if hasattr(step, "moves")]
    assert _occupied(base) - before <= said
    assert (said >= MIB) == zeros


def _write(path: str, command: str) -> None:
    subprocess.run([qemu_io(), "-f", "qcow2", "-c", command, path], check=True, stdout=subprocess.DEVNULL)


async def test_too_little_room_for_what_is_compressed_is_told_before(
    q: qmpsnap.Controller, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kind = _base(place, "compressed")
    assert _occupied(str(base)) < MIB
    vm = await q.define(replace(ONE, disks=(DiskSpec(name="vda", base=str(base), format=kind),)))
    monkeypatch.setattr(free_space, "room", lambda _: Room(1, MIB + 512 * KIB))
    with pytest.raises(HostCannot, match=r"may grow by .* nothing was changed"):
        await vm.stream("vda")


async def test_a_delete_goes_the_way_that_writes_less_and_not_that_of_the_smaller_file(q: qmpsnap.Controller) -> None:
    """Below the snapshot lie 2 MiB in a few compressed bytes, above it 256 KiB as they are."""
    vm = await q.define(ONE)
    await vm.snapshot("s1")
    chain = context_of(vm).store.chains(vm.name)[0]
    _write(chain.active.path, "write -c -P 1 0 1536k")
    await vm.snapshot("s2")
    await site.write(vm, "vda", 9, offset=0, length=256 * KIB)
    below, above = (_occupied(layer.path) for layer in context_of(vm).store.chains(vm.name)[0].layers[1:])
    assert below < above
    done = await vm.delete_snapshots("s2")
    (reduction,) = done._plan.reductions
    assert [choice.how for choice in reduction.choices] == ["commit", "stream"]


@pytest.mark.parametrize("damage", [0, 1])
def test_what_cannot_be_counted_is_all_there(tmp_path: Path, damage: int) -> None:
    path, kind = _base(tmp_path, "compressed")
    if damage:
        os.truncate(path, 3 * CLUSTER)  # its tables lie behind that
    else:
        path.unlink()
    layer = Layer(id=layer_id("vda", 1), path=str(path), format=kind, backing=None, virtual_size=4 * MIB)
    assert allocated.held(layer).data >= 2 * MIB
