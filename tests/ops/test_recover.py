"""What becomes of an operation that nobody ended: decided from what was durable and what is found, twice as once."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from qmpsnap.block.image import ImageTool
from qmpsnap.errors import HostCannot, OperationPending, StoreMismatch
from qmpsnap.model.chain import Chain
from qmpsnap.model.operation import Change, CreatePlan, DefinePlan, Operation
from qmpsnap.model.snapshot import Snapshot
from qmpsnap.model.spec import DiskSpec
from qmpsnap.ops import create, recover
from qmpsnap.ops.create import CreateRequest
from qmpsnap.ops.recover import EMPTY_LIMIT, Direction, create_direction, end_open
from qmpsnap.store.sqlite import SqliteStore
from tests.ops.bench import MIB, BenchContext, FakeQemu, chain, context_on, machine

WEB = machine()
FOUND = (None, 0, 1, 2)


@pytest.mark.parametrize("step", ["planned", "settled", "", "anything-else"])
@pytest.mark.parametrize("active", FOUND)
def test_before_the_transaction_was_sent_a_creation_is_undone_whatever_is_found(step: str, active: int | None) -> None:
    assert create_direction(step, active=active, total=2) == "back"


@pytest.mark.parametrize(
    ("active", "direction"),
    [(None, "forward"), (0, "back"), (1, None), (2, "forward")],
    ids=["no-qemu", "none", "some", "all"],
)
def test_after_it_was_sent_qemu_tells(active: int | None, direction: Direction | None) -> None:
    assert create_direction("transaction", active=active, total=2) == direction


def test_of_one_disk_it_is_never_undecided() -> None:
    assert [create_direction("transaction", active=active, total=1) for active in (None, 0, 1)] == [
        "forward",
        "back",
        "forward",
    ]


# --- on real files and a real store ---------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "qmpsnap.db", machines=tmp_path / "machines") as opened:
        yield opened


@pytest.fixture
def context(store: SqliteStore, tmp_path: Path) -> BenchContext:
    """The machine ``web`` is recorded with two disks; no QEMU runs."""
    context = context_on(store, tmp_path)
    folder = context.home.machine_dir("web")
    folder.mkdir(parents=True)
    chains = (chain("vda", 1, folder=str(folder)), chain("vdb", 2, folder=str(folder)))
    layers = tuple(found.active for found in chains)
    for layer in layers:
        Path(layer.path).write_bytes(b"the base")
    change = Change(define=WEB, layers=layers, active={found.disk: found.active.id for found in chains})
    plan = DefinePlan(machine="web", images=layers, overlays=(), change=change)
    operation = store.open_operation("web", lambda _: plan, serials=2)
    store.settle(operation.id, "web", change)
    return context


async def broken(context: BenchContext, *, step: str, made: bool = True) -> Operation:
    """A ``snapshot create`` that died after that step, its overlays made or not."""
    store = context.store

    def plan(serial: object) -> CreatePlan:
        assert isinstance(serial, int)
        return create.plan(
            WEB,
            store.chains("web"),
            store.snapshots("web"),
            CreateRequest(name="before"),
            serial=recover.Operation.__annotations__["id"](serial),
            home=context.home,
            mode="live",
            now=1.0,
        )

    operation = store.open_operation("web", plan)
    if step != "planned":
        store.mark(operation.id, "running", step=step)
    if made:
        tool = ImageTool(_qemu_img())
        for overlay in overlays(operation):
            base = Path(overlay.backing.path)
            if base.read_bytes() == b"the base":
                base.unlink()
                await tool.create_base(base, format="qcow2", virtual_size=MIB)
            await tool.create_overlay(overlay.layer.path, backing=overlay.backing, virtual_size=MIB)
    return operation


def _qemu_img() -> str:
    found = shutil.which(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing; in CI these tests must run")
        pytest.skip("qemu-img is not installed")
    return found


def overlays(operation: Operation) -> tuple[recover.CreatePlan.__annotations__["overlays"], ...]:  # type: ignore[misc]
    assert isinstance(operation.plan, CreatePlan)
    return operation.plan.overlays
