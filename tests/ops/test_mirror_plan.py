"""The rules of ``mirror``: what becomes of the layers, and which images to reuse fit."""

import msgspec
import pytest
from msgspec.structs import replace

from qmpsnap.block.image.qcow2 import Header
from qmpsnap.errors import ImageRefused, UsageError
from qmpsnap.host.files import FileId
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines import nbd
from qmpsnap.model.names import LayerId, NodeName, OperationId, job_id
from qmpsnap.model.operations.operation import MirrorPlan, Plan
from qmpsnap.model.planning.inputs import Basis
from qmpsnap.model.planning.layer_graph import Forest, Reference, Writer
from qmpsnap.model.planning.state import Situation
from qmpsnap.ops.mirror import job
from qmpsnap.ops.mirror.job import Phase
from qmpsnap.ops.mirror.mirror import Found, MirrorRequest, plan
from tests.ops.bench import MIB, chain, machine, with_base

CHAIN = chain("vda", 1, 2, 3)


def situation(found: Chain = CHAIN, *points: str) -> Situation:
    """A stopped machine whose snapshots ``s0``, ``s1`` ... have their points in these layers."""
    forest = Forest(
        {layer.id: layer for layer in found.layers},
        (Writer("web", "vda", found.active.id),),
        tuple(Reference("web", f"s{at}", "vda", LayerId(point)) for at, point in enumerate(points)),
    )
    sizes = {layer.id: at * 4096 for at, layer in enumerate(found.layers, start=1)}
    return Situation(Basis(name="web", chains=(found,), forest=forest), running=False, bytes=sizes)


def made(request: MirrorRequest, *points: str, found: Found | None = None, of: Chain = CHAIN) -> MirrorPlan:
    return plan(situation(of, *points), of, request, serial=OperationId(9), found=found)


PIVOT = MirrorRequest(disk="vda", target="/t/copy", mode="pivot")
FINISH = replace(PIVOT, mode="finish")


def test_a_full_pivot_stands_alone_and_keeps_what_snapshots_need() -> None:
    done = made(PIVOT, "vda-2")
    assert [layer.id for layer in job.expected(done)] == ["vda-9"]
    assert (done.target.backing, done.target.owned, done.moves) == (None, True, (1 + 2 + 3) * 4096)
    assert [layer.id for layer in done.removed] == ["vda-3"]
    assert done.change.active == {"vda": "vda-9"}
    assert done.change.removed_layers == ("vda-3",)
    assert [layer.id for layer in job.gone(done)] == ["vda-3", "vda-2", "vda-1"]


def test_without_snapshots_the_whole_old_chain_goes() -> None:
    assert [layer.id for layer in made(PIVOT).removed] == ["vda-3", "vda-2", "vda-1"]


def test_an_image_of_the_users_leaves_the_record_and_not_the_disk() -> None:
    done = made(PIVOT, of=with_base(CHAIN, owned=False))
    assert [layer.owned for layer in done.removed] == [True, True, False]


def test_a_shallow_pivot_keeps_the_layers_below() -> None:
    done = made(replace(PIVOT, shallow=True))
    assert [layer.id for layer in job.expected(done)] == ["vda-1", "vda-2", "vda-9"]
    assert (done.target.backing, done.moves) == ("vda-2", 3 * 4096)
    assert [layer.id for layer in done.removed] == ["vda-3"]


def test_a_shallow_copy_of_a_disk_without_backing_is_a_full_one() -> None:
    done = made(replace(PIVOT, shallow=True), of=chain("vda", 1))
    assert (done.shallow, done.target.backing) == (False, None)


def test_finish_changes_no_record() -> None:
    done = made(FINISH)
    assert (done.removed, done.change.layers, done.change.active) == ((), (), {})
    assert [layer.id for layer in job.gone(done)] == ["vda-9"]


def test_the_commands() -> None:
    (add, options), (start, arguments) = job.qmp_commands(
        made(replace(PIVOT, shallow=True, write_blocking=True)), machine(), job_id(OperationId(9), "vda")
    )
    assert (add, options["node-name"], options["backing"], options["read-only"]) == (
        "blockdev-add",
        "vda-9",
        "vda-2",
        False,
    )
    assert (start, arguments) == (
        "blockdev-mirror",
        {
            "job-id": "qs.9.vda",
            "device": "vda-3",
            "target": "vda-9",
            "sync": "top",
            "copy-mode": "write-blocking",
            "auto-finalize": False,
            "auto-dismiss": False,
            "on-source-error": "stop",
            "on-target-error": "stop",
        },
    )


def test_onto_an_export() -> None:
    done = made(replace(FINISH, target="nbd://h/x"))
    assert (done.made, done.target.format, done.target.owned) == (False, "raw", False)
    (_, options), _ = job.qmp_commands(done, machine(), job_id(OperationId(9), "vda"))
    assert options == {
        "node-name": "vda-9",
        "driver": "nbd",
        "server": {"type": "inet", "host": "h", "port": "10809"},
        "export": "x",
        "read-only": False,
    }


@pytest.mark.parametrize(
    "request_",
    [
        replace(PIVOT, target="nbd://h/x"),
        replace(FINISH, target="nbd://h/x", shallow=True),
        replace(FINISH, target="nbd://h/x", format="qcow2"),
        replace(PIVOT, shallow=True, format="raw"),
    ],
)
def test_what_cannot_be(request_: MirrorRequest) -> None:
    with pytest.raises(UsageError) as refused:
        made(request_)
    assert refused.value.effect == "none"


EMPTY = Found(Header(format="qcow2", virtual_size=MIB, file_size=4096, device=1, inode=2), empty=True)
ONTO = Found(replace(EMPTY.header, backing="/m/vda-2.qcow2", backing_format="qcow2"), empty=True)
REUSE = replace(PIVOT, reuse=True)


def test_an_image_that_fits() -> None:
    full, shallow = made(REUSE, found=EMPTY), made(replace(REUSE, shallow=True), found=ONTO)
    for done in (full, shallow):
        assert (done.made, done.target.owned, done.target.device, done.target.inode) == (False, False, 1, 2)


@pytest.mark.parametrize(
    ("found", "shallow", "why"),
    [
        (replace(EMPTY, header=replace(EMPTY.header, virtual_size=MIB // 2)), False, "524288 bytes"),
        (replace(EMPTY, header=replace(EMPTY.header, virtual_size=2 * MIB)), False, "2097152 bytes"),
        (replace(EMPTY, header=replace(EMPTY.header, dirty=True)), False, "not closed cleanly"),
        (ONTO, False, "instead of nothing"),
        (EMPTY, True, "names nothing"),
        (replace(ONTO, header=replace(ONTO.header, backing="/m/./vda-2.qcow2")), True, "as its backing"),
        (replace(ONTO, header=replace(ONTO.header, backing_format="raw")), True, "as its backing"),
        (replace(ONTO, empty=False), True, "holds data"),
    ],
)
def test_an_image_that_does_not_fit(found: Found, shallow: bool, why: str) -> None:  # noqa: FBT001
    with pytest.raises(ImageRefused, match=why):
        made(replace(REUSE, shallow=shallow), found=found)


def test_a_plan_survives_the_journal() -> None:
    done = made(replace(FINISH, target="nbd+unix:///x?socket=/s"))
    assert msgspec.json.decode(msgspec.json.encode(done), type=Plan) == done


@pytest.mark.parametrize(
    "phase",
    [
        Phase("planned"),
        Phase("started", FileId(1, 2)),
        Phase("finalizing", FileId(1, 2), running=True),
        Phase("made", FileId(1, 2, 3)),
        Phase("settled", FileId(1, 2, 3), running=True),
    ],
)
def test_a_phase_survives_the_journal(phase: Phase) -> None:
    assert Phase.read(phase.words) == phase


@pytest.mark.parametrize(
    ("uri", "server", "name"),
    [
        ("nbd://h", {"type": "inet", "host": "h", "port": "10809"}, ""),
        ("nbd://[::1]:99/a%20b", {"type": "inet", "host": "::1", "port": "99"}, "a b"),
        ("nbd+unix:///a/b?socket=/run/s", {"type": "unix", "path": "/run/s"}, "a/b"),
        ("nbd+unix:///?socket=/run/s", {"type": "unix", "path": "/run/s"}, ""),
    ],
)
def test_exports(uri: str, server: dict[str, str], name: str) -> None:
    options = nbd.parse(uri).options(NodeName("n"))
    assert (options["server"], options["export"]) == (server, name)


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://",
        "nbd://h:x/e",
        "nbd://u@h/e",
        "nbd://h/e?a=b",
        "nbd+unix:///e",
        "nbd+unix:///e?socket=s",
        "nbd+unix://h/e?socket=/s",
    ],
)
def test_no_exports(uri: str) -> None:
    with pytest.raises(UsageError, match="is not the URI of an NBD export"):
        nbd.parse(uri)
