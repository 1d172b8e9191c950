"""What becomes of an operation that nobody ended: decided from what was durable and what is found, twice as once."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpsnap.block.image import ImageTool
from qmpsnap.errors import OperationPending, StoreMismatch
from qmpsnap.model.names import OperationId
from qmpsnap.model.operation import Change, CreatePlan, DefinePlan
from qmpsnap.model.spec import DiskSpec
from qmpsnap.ops import create, recover
from qmpsnap.ops.broken import Direction
from qmpsnap.ops.create import CreateRequest
from qmpsnap.ops.overlays import EMPTY_LIMIT
from qmpsnap.ops.recover import end_open
from qmpsnap.ops.recover_create import direction as create_direction
from qmpsnap.store.sqlite import SqliteStore
from qmpsnap.store.store import Store
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
def tool() -> ImageTool:
    found = shutil.which(os.environ.get("QMPSNAP_QEMU_IMG") or "qemu-img")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing; in CI these tests must run")
        pytest.skip("qemu-img is not installed")
    return ImageTool(found)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(tmp_path / "qmpsnap.db", machines=tmp_path / "machines") as opened:
        yield opened


@pytest.fixture
async def context(store: SqliteStore, tmp_path: Path, tool: ImageTool) -> BenchContext:
    """The machine ``web`` is recorded with two disks, ``vda-1`` and ``vdb-2``; no QEMU runs."""
    context = context_on(store, tmp_path)
    folder = context.home.machine_dir("web")
    folder.mkdir(parents=True)
    layers = tuple(chain(disk, serial, folder=str(folder)).active for disk, serial in (("vda", 1), ("vdb", 2)))
    for layer in layers:
        await tool.create_base(layer.path, format="qcow2", virtual_size=MIB)
    change = Change(define=WEB, layers=layers, active={"vda": layers[0].id, "vdb": layers[1].id})
    plan = DefinePlan(machine="web", images=layers, overlays=(), change=change)
    operation = store.open_operation("web", lambda _: plan, serials=2)
    store.settle(operation.id, "web", change)
    return context


class Left:
    """The broken operation, as tests look at it."""

    def __init__(self, store: Store, plan: CreatePlan) -> None:
        self._store = store
        self.plan = plan
        self.files = [Path(overlay.layer.path) for overlay in plan.overlays]

    @property
    def state(self) -> str:
        return self._store.operations("web")[-1].state

    @property
    def active(self) -> dict[str, str]:
        return {found.disk: found.active.id for found in self._store.chains("web")}

    def check_undone(self) -> None:
        assert self.state == "failed"
        assert [file.exists() for file in self.files] == [False, False]
        assert self.active == {"vda": "vda-1", "vdb": "vdb-2"}
        assert self._store.snapshots("web") == ()

    def check_settled(self) -> None:
        assert self.state == "settled"
        assert self.active == {"vda": "vda-3", "vdb": "vdb-3"}
        assert [found.name for found in self._store.snapshots("web")] == ["before"]
        for file, layer in zip(
            self.files, [self._store.layer(each.layer.id) for each in self.plan.overlays], strict=True
        ):
            assert (layer.device, layer.inode) == (file.stat().st_dev, file.stat().st_ino)


async def broken(context: BenchContext, tool: ImageTool, *, step: str, made: tuple[str, ...] = ("vda", "vdb")) -> Left:
    """A ``snapshot create`` (number 3) that died after that step, the overlays of some disks made."""
    store = context.store
    chains, snapshots = store.chains("web"), store.snapshots("web")

    def make(serial: OperationId) -> CreatePlan:
        request = CreateRequest(name="before")
        return create.plan(WEB, chains, snapshots, request, serial=serial, home=context.home, mode="live", now=1.0)

    operation = store.open_operation("web", make)
    assert isinstance(operation.plan, CreatePlan)
    for overlay in operation.plan.overlays:
        if overlay.disk in made:
            await tool.create_overlay(overlay.layer.path, backing=overlay.backing, virtual_size=MIB)
    if step != "planned":
        store.mark(operation.id, "running", step=step)
    return Left(store, operation.plan)


OLD = {"vda": ["vda-1"], "vdb": ["vdb-2"]}
NEW = {"vda": ["vda-1", "vda-3"], "vdb": ["vdb-2", "vdb-3"]}


@pytest.mark.parametrize("made", [(), ("vda",), ("vda", "vdb")], ids=["none", "one", "both"])
async def test_before_the_transaction_the_overlays_that_were_made_are_removed(
    context: BenchContext, tool: ImageTool, made: tuple[str, ...]
) -> None:
    left = await broken(context, tool, step="planned", made=made)
    ended = await end_open(context, WEB, None)
    assert [operation.state for operation in ended] == ["planned"]
    left.check_undone()
    assert context.store.operations("web")[-1].error == "interrupted"


async def test_before_the_transaction_nodes_that_qemu_has_opened_are_closed_first(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="planned")
    qemu = FakeQemu(OLD, loose=["vda-3"])
    await end_open(context, WEB, qemu)
    left.check_undone()
    assert qemu.said == [("blockdev-del", {"node-name": "vda-3"})]


async def test_after_the_transaction_without_qemu_the_overlays_are_adopted(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    await end_open(context, WEB, None)
    left.check_settled()


async def test_after_the_transaction_a_qemu_that_ran_it_is_followed(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="transaction")
    qemu = FakeQemu(NEW)
    await end_open(context, WEB, qemu)
    left.check_settled()
    assert qemu.said == []


async def test_after_the_transaction_a_qemu_that_did_not_run_it_loses_its_nodes_and_the_files_go(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    qemu = FakeQemu(OLD, loose=["vda-3", "vdb-3"])
    await end_open(context, WEB, qemu)
    left.check_undone()
    assert qemu.said == [("blockdev-del", {"node-name": "vda-3"}), ("blockdev-del", {"node-name": "vdb-3"})]


async def test_a_qemu_with_only_some_of_the_overlays_is_nobodys_to_decide(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    qemu = FakeQemu({"vda": NEW["vda"], "vdb": OLD["vdb"]}, loose=["vdb-3"])
    with pytest.raises(OperationPending, match="only some of its overlays") as caught:
        await end_open(context, WEB, qemu)
    assert (caught.value.exit_code, caught.value.operation, caught.value.machine) == (8, "3", "web")
    assert (left.state, qemu.said, [file.exists() for file in left.files]) == ("running", [], [True, True])


@pytest.mark.parametrize("step", ["planned", "transaction"])
async def test_an_overlay_that_somebody_has_written_to_is_never_removed(
    context: BenchContext, tool: ImageTool, step: str
) -> None:
    left = await broken(context, tool, step=step)
    with left.files[0].open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"g" * (EMPTY_LIMIT + 4096))
    qemu = FakeQemu(OLD)
    with pytest.raises(OperationPending, match="should be a new, empty image and is not") as caught:
        await end_open(context, WEB, qemu)
    assert (caught.value.exit_code, caught.value.hint) == (8, "put that right, then: qmpsnap recover web")
    assert left.files[0].stat().st_size > EMPTY_LIMIT
    assert left.state != "failed"


async def test_where_an_overlay_stood_and_something_else_stands_it_is_not_removed(
    context: BenchContext, tool: ImageTool, tmp_path: Path
) -> None:
    left = await broken(context, tool, step="planned", made=("vdb",))
    (tmp_path / "precious").write_text("content")
    left.files[0].symlink_to(tmp_path / "precious")
    with pytest.raises(OperationPending):
        await end_open(context, WEB, None)
    assert left.files[0].is_symlink()


async def test_an_overlay_to_adopt_that_is_gone_leaves_the_operation_open(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction", made=("vda",))
    with pytest.raises(OperationPending, match=r"vdb-3\.qcow2"):
        await end_open(context, WEB, None)
    assert (left.state, left.active) == ("running", {"vda": "vda-1", "vdb": "vdb-2"})


@pytest.mark.parametrize(
    ("step", "chains", "loose"),
    [("planned", None, []), ("planned", OLD, ["vda-3", "vdb-3"]), ("transaction", None, []), ("transaction", NEW, [])],
)
async def test_recovered_twice_is_recovered_once(
    context: BenchContext, tool: ImageTool, step: str, chains: dict[str, list[str]] | None, loose: list[str]
) -> None:
    left = await broken(context, tool, step=step)
    qemu = FakeQemu(chains, loose) if chains else None
    await end_open(context, WEB, qemu)
    once = (context.store.operations("web"), left.active, context.store.snapshots("web"), qemu and len(qemu.said))
    assert await end_open(context, WEB, qemu) == []
    assert (
        context.store.operations("web"),
        left.active,
        context.store.snapshots("web"),
        qemu and len(qemu.said),
    ) == once


async def test_a_definition_that_died_leaves_none_of_its_files(context: BenchContext, tool: ImageTool) -> None:
    folder = context.home.machine_dir("new")
    folder.mkdir()
    layers = (chain("vda", 3, folder=str(folder)).active, chain("vdb", 4, folder=str(folder)).active)
    new = machine(DiskSpec(name="vda", size=MIB), DiskSpec(name="vdb", size=MIB), name="new")
    plan = DefinePlan(machine="new", images=layers, overlays=(), change=Change(define=new, layers=layers))
    context.store.open_operation("new", lambda _: plan, serials=2)
    await tool.create_base(layers[0].path, format="qcow2", virtual_size=MIB)
    await end_open(context, new, None)
    assert context.store.operations("new")[-1].state == "failed"
    assert not folder.exists()


# --- told by the error ----------------------------------------------------------------------------------------------


async def after(context: BenchContext, qemu: FakeQemu | None) -> StoreMismatch:
    """What an error of the attempt says once it was found out what became of it."""
    (operation,) = context.store.operations("web", only_open=True)
    error = StoreMismatch("something was wrong", hint="the first hint")
    await recover.after_failure(context, WEB, qemu, operation, error)
    return error


async def test_the_error_of_an_attempt_that_was_undone_says_none(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="planned")
    error = await after(context, None)
    left.check_undone()
    assert (error.effect, error.machine, error.operation, error.hint) == ("none", "web", "3", "the first hint")
    assert context.store.operations("web")[-1].error == "something was wrong"


async def test_the_error_of_an_attempt_that_was_finished_says_applied(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="transaction")
    assert (await after(context, FakeQemu(NEW))).effect == "applied"
    left.check_settled()


async def test_the_error_of_an_attempt_that_cannot_be_ended_says_unknown_and_how_to_go_on(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction", made=("vda",))
    error = await after(context, None)
    assert (error.effect, error.hint) == ("unknown", "qmpsnap recover web finds out and ends it")
    assert left.state == "unknown"


async def test_when_the_store_fails_as_well_the_effect_is_unknown_and_the_operation_stays_open(
    context: BenchContext, store: SqliteStore, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    store._connection.execute("PRAGMA query_only=ON")
    error = await after(context, FakeQemu(NEW))
    assert (error.effect, error.hint) == ("unknown", "qmpsnap recover web finds out and ends it")
    assert left.state == "running"
    store._connection.execute("PRAGMA query_only=OFF")
    await end_open(context, WEB, FakeQemu(NEW))
    left.check_settled()
