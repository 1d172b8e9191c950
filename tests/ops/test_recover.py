"""What becomes of an operation that nobody ended: decided from what was durable and what is found, twice as once."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace

from qmpsnap.block.image.create import ImageTool
from qmpsnap.cli.hints import as_typed
from qmpsnap.errors import OperationPending, StateError, StoreMismatch
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.model.names import LayerId, OperationId
from qmpsnap.model.operations.operation import Change, CreatePlan, DefinePlan, Overlay
from qmpsnap.model.planning.inputs import PlanInputs
from qmpsnap.ops.base.machine_session import MachineSession
from qmpsnap.ops.base.overlays import EMPTY_LIMIT, remove_new, require_free
from qmpsnap.ops.merge import job
from qmpsnap.ops.session import recovery
from qmpsnap.ops.session.pending import Direction
from qmpsnap.ops.session.recovery import end_open
from qmpsnap.ops.snapshot import plan as create_plan
from qmpsnap.ops.snapshot.plan import CreateRequest
from qmpsnap.ops.snapshot.recover import direction as create_direction
from qmpsnap.store.records import Record, Records
from qmpsnap.store.sqlite.backend import SqliteStore
from qmpsnap.store.store import Store
from tests.ops.bench import MIB, BenchContext, FakeQemu, chain, context_on, machine
from tests.store.samples import journalled

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
    operation = journalled(store, plan, serials=2)
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
    inputs = PlanInputs(
        basis=store.basis("web"), serial=OperationId(store.next_serial()), home=context.home, mode="live", now=1.0
    )
    operation = journalled(store, create_plan.plan(inputs, CreateRequest(name="before")))
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
    ended = await end_open(MachineSession(context, WEB, None))
    assert [operation.state for operation in ended] == ["planned"]
    left.check_undone()
    assert context.store.operations("web")[-1].error == "interrupted"


async def test_before_the_transaction_nodes_that_qemu_has_opened_are_closed_first(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="planned")
    qemu = FakeQemu(OLD, loose=["vda-3"])
    await end_open(MachineSession(context, WEB, qemu))
    left.check_undone()
    assert qemu.said == [("blockdev-del", {"node-name": "vda-3"})]


async def test_after_the_transaction_without_qemu_the_overlays_are_adopted(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    await end_open(MachineSession(context, WEB, None))
    left.check_settled()


async def test_after_the_transaction_a_qemu_that_ran_it_is_followed(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="transaction")
    qemu = FakeQemu(NEW)
    await end_open(MachineSession(context, WEB, qemu))
    left.check_settled()
    assert qemu.said == []


async def test_after_the_transaction_a_qemu_that_did_not_run_it_loses_its_nodes_and_the_files_go(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    qemu = FakeQemu(OLD, loose=["vda-3", "vdb-3"])
    await end_open(MachineSession(context, WEB, qemu))
    left.check_undone()
    assert qemu.said == [("blockdev-del", {"node-name": "vda-3"}), ("blockdev-del", {"node-name": "vdb-3"})]


async def test_a_qemu_with_only_some_of_the_overlays_is_nobodys_to_decide(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    qemu = FakeQemu({"vda": NEW["vda"], "vdb": OLD["vdb"]}, loose=["vdb-3"])
    with pytest.raises(OperationPending, match="only some of its overlays") as caught:
        await end_open(MachineSession(context, WEB, qemu))
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
    with pytest.raises(OperationPending, match="is not a new, empty image") as caught:
        await end_open(MachineSession(context, WEB, qemu))
    assert caught.value.exit_code == 8
    assert as_typed(caught.value.hint).startswith("fix that, then qmpsnap recover web; ")
    assert left.files[0].stat().st_size > EMPTY_LIMIT
    assert left.state != "failed"


async def _write(tool: ImageTool, path: Path, *command: str) -> None:
    """As a guest would, with qemu-img alone: a block of the image becomes other than its backing's."""
    await anyio.run_process([tool.binary, *command, str(path)], stdout=subprocess.DEVNULL)


async def _recover_refuses(context: BenchContext, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(OperationPending, match="is not a new, empty image; it was not touched"):
        await end_open(MachineSession(context, WEB, None))
    assert file.read_bytes() == before


async def test_little_data_of_a_guest_is_data(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="planned")
    await _write(tool, left.files[0], "bench", "-q", "-w", "-c", "1", "-f", "qcow2", "-o", "0")
    assert left.files[0].stat().st_blocks * 512 < EMPTY_LIMIT
    await _recover_refuses(context, left.files[0])


async def test_an_empty_image_that_holds_a_tag_is_never_removed(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="planned")
    await _write(tool, left.files[0], "snapshot", "-c", "tag")
    await _recover_refuses(context, left.files[0])


async def test_an_empty_image_of_another_size_is_not_the_planned_one(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="planned", made=("vdb",))
    backing = left.plan.overlays[0].backing
    await tool.create_overlay(left.files[0], backing=backing, virtual_size=2 * MIB)
    await _recover_refuses(context, left.files[0])


async def test_what_is_no_image_is_not_the_planned_one(context: BenchContext, tool: ImageTool) -> None:
    left = await broken(context, tool, step="planned", made=("vdb",))
    left.files[0].write_text("the only copy of something")
    await _recover_refuses(context, left.files[0])


@pytest.mark.parametrize("bytes_kept", [0, 65536])
async def test_the_beginning_of_an_overlay_goes(context: BenchContext, tool: ImageTool, bytes_kept: int) -> None:
    """qemu-img died: its file has nothing in it yet, or the header of a disk of no bytes."""
    left = await broken(context, tool, step="planned")
    head = bytearray(left.files[0].read_bytes()[:bytes_kept])
    head[8:48] = bytes(len(head[8:48]))  # no backing, no size, no L1 table
    left.files[0].write_bytes(head)
    await end_open(MachineSession(context, WEB, None))
    left.check_undone()


HEAD, TABLE, BLOCK = 65536, slice(65536, 2 * 65536), slice(2 * 65536, 3 * 65536)


@pytest.mark.parametrize("length", [1, HEAD, HEAD + 8, 2 * HEAD + 2, 3 * HEAD])
@pytest.mark.parametrize("lost", [slice(0), TABLE, BLOCK], ids=["nothing", "table", "block"])
async def test_an_overlay_without_its_header_goes(
    context: BenchContext, tool: ImageTool, length: int, lost: slice
) -> None:
    """We died before we wrote it, which comes last; or after a power loss parts of the rest are not there either."""
    left = await broken(context, tool, step="planned")
    data = bytearray(left.files[0].read_bytes())
    data[:HEAD], data[lost] = bytes(HEAD), bytes(len(data[lost]))
    left.files[0].write_bytes(data[:length])
    await end_open(MachineSession(context, WEB, None))
    left.check_undone()


@pytest.mark.parametrize("place", [40, HEAD, HEAD + 9, 3 * HEAD, 3 * HEAD + 8])
async def test_what_has_no_header_and_other_bytes_is_not_the_planned_one(
    context: BenchContext, tool: ImageTool, place: int
) -> None:
    left = await broken(context, tool, step="planned")
    data = bytearray(left.files[0].read_bytes().ljust(place + 1, b"\0"))
    data[:HEAD] = bytes(HEAD)
    data[place] = 7
    left.files[0].write_bytes(data)
    await _recover_refuses(context, left.files[0])


async def test_an_overlay_of_another_image_is_not_the_planned_one(context: BenchContext, tool: ImageTool) -> None:
    planned, other = context.store.chains("web")
    new = replace(planned.active, id=LayerId("vda-9"), path=str(context.home.data / "x"), backing=planned.active.id)
    await tool.create_overlay(new.path, backing=other.active, virtual_size=MIB)
    with pytest.raises(StoreMismatch, match="it was not touched"):
        await remove_new([Overlay(disk="vda", layer=new, backing=planned.active)])
    await remove_new([Overlay(disk="vda", layer=new, backing=other.active)])
    assert not Path(new.path).exists()


@pytest.mark.parametrize("written", ["zeros", "data"])
async def test_a_raw_image_goes_only_while_it_holds_nothing(
    context: BenchContext, tool: ImageTool, written: str
) -> None:
    new = replace(context.store.chains("web")[0].base, path=str(context.home.data / "x"), format="raw")
    await tool.create_base(new.path, format="raw", virtual_size=MIB)
    Path(new.path).write_bytes(bytes(MIB - 1) + (b"g" if written == "data" else b"\0"))
    if written == "data":
        with pytest.raises(StoreMismatch, match="it was not touched"):
            await remove_new([new])
    else:
        await remove_new([new])
    assert Path(new.path).exists() == (written == "data")


def test_nothing_is_planned_where_something_is(tmp_path: Path) -> None:
    require_free([str(tmp_path / "a"), str(tmp_path / "no/b")])
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(StateError, match="/a exists already; nothing was changed") as refused:
        require_free([str(tmp_path / "b"), str(tmp_path / "a")])
    assert "older than the disks" in refused.value.hint


async def test_where_an_overlay_stood_and_something_else_stands_it_is_not_removed(
    context: BenchContext, tool: ImageTool, tmp_path: Path
) -> None:
    left = await broken(context, tool, step="planned", made=("vdb",))
    (tmp_path / "precious").write_text("content")
    left.files[0].symlink_to(tmp_path / "precious")
    with pytest.raises(OperationPending):
        await end_open(MachineSession(context, WEB, None))
    assert left.files[0].is_symlink()


async def test_an_overlay_to_adopt_that_is_gone_leaves_the_operation_open(
    context: BenchContext, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction", made=("vda",))
    with pytest.raises(OperationPending, match=r"vdb-3\.qcow2"):
        await end_open(MachineSession(context, WEB, None))
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
    await end_open(MachineSession(context, WEB, qemu))
    once = (context.store.operations("web"), left.active, context.store.snapshots("web"), qemu and len(qemu.said))
    assert await end_open(MachineSession(context, WEB, qemu)) == []
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
    journalled(context.store, plan, serials=2)
    await tool.create_base(layers[0].path, format="qcow2", virtual_size=MIB)
    Records(context.home.machines).write(Record(machine=new))
    assert context.store.records.remembered("new")
    await end_open(MachineSession(context, new, None))
    assert context.store.operations("new")[-1].state == "failed"
    assert not context.store.records.remembered("new")
    assert not folder.exists()


@pytest.mark.parametrize("whose", ["planned", "another's"])
async def test_a_definition_that_died_takes_no_variable_store_but_its_own(context: BenchContext, whose: str) -> None:
    variables = context.home.variables("new")
    variables.parent.mkdir()
    variables.write_text("what some guest has set")
    new = machine(DiskSpec(name="vda", size=MIB), name="new")
    plan = DefinePlan(
        machine="new",
        images=(),
        overlays=(),
        change=Change(define=new),
        variables=str(variables) if whose == "planned" else None,
    )
    journalled(context.store, plan)
    await end_open(MachineSession(context, new, None))
    assert context.store.operations("new")[-1].state == "failed"
    assert variables.exists() == (whose == "another's")


# --- told by the error ----------------------------------------------------------------------------------------------


async def after(context: BenchContext, qemu: FakeQemu | None) -> StoreMismatch:
    """What an error of the attempt says once it was found out what became of it."""
    (operation,) = context.store.operations("web", only_open=True)
    error = StoreMismatch("something was wrong", hint="the first hint")
    await recovery.after_failure(MachineSession(context, WEB, qemu), operation, error)
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
    assert (error.effect, as_typed(error.hint)) == ("unknown", "qmpsnap recover web completes or undoes it")
    assert left.state == "unknown"


async def test_when_the_store_fails_as_well_the_effect_is_unknown_and_the_operation_stays_open(
    context: BenchContext, store: SqliteStore, tool: ImageTool
) -> None:
    left = await broken(context, tool, step="transaction")
    store._database.connection.execute("PRAGMA query_only=ON")
    error = await after(context, FakeQemu(NEW))
    assert (error.effect, as_typed(error.hint)) == ("unknown", "qmpsnap recover web completes or undoes it")
    assert left.state == "running"
    store._database.connection.execute("PRAGMA query_only=OFF")
    await end_open(MachineSession(context, WEB, FakeQemu(NEW)))
    left.check_settled()


def test_a_file_tells_whether_a_job_has_written_to_it(tmp_path: Path) -> None:
    file = tmp_path / "layer"
    file.write_bytes(b"x")
    os.utime(file, (100.0, 100.0))
    before = job.state_of(str(file))
    assert job.state_of(str(file)) == before
    assert (before[0], before[2]) == (100 * 10**9, 1)
    file.write_bytes(b"y")
    os.utime(file, (100.0, 100.0))
    assert job.state_of(str(file)) != before, "a time that was put back is a change, too"
    assert job.state_of(str(tmp_path / "none")) == ()
    assert job.state_of("/dev/null") == ()
