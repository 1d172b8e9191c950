"""What a snapshot is asked for: no wish is left unsaid, none is taken for a weaker one."""

from pathlib import Path
from typing import Any

import pytest

from qmpsnap.errors import UsageError
from qmpsnap.ops.base import requests
from qmpsnap.ops.internal.create import InternalRequest
from qmpsnap.ops.memory.strategy import MemoryRequest
from qmpsnap.ops.mirror.mirror import MirrorRequest
from qmpsnap.ops.revert.plan import RevertRequest
from qmpsnap.ops.session.quiesce import QuiesceRequest
from qmpsnap.ops.snapshot.delete import DeleteRequest
from qmpsnap.ops.snapshot.plan import CreateRequest
from qmpsnap.ops.snapshot.request import requested


def test_nothing_said_is_a_snapshot_of_the_disks() -> None:
    assert requested("disk", None, {}) == CreateRequest()


def test_everything_said_is_asked_for() -> None:
    assert requested(
        "full",
        "s",
        {
            "description": "d",
            "disks": ["vda"],
            "files": {"vda": "a"},
            "max_pause_ms": 5,
            "compression": "zstd",
            "degrade": True,
            "quiesce": "require",
            "freeze_window": 2,
        },
    ) == CreateRequest(
        name="s",
        description="d",
        disks=("vda",),
        files={"vda": str(Path.cwd() / "a")},
        memory=MemoryRequest(max_pause_ms=5, compression="zstd", degrade=True),
        quiesce=QuiesceRequest(wish="require", window=2),
    )
    inside = requested("internal", "s", {"memory": False, "quiesce": "prefer", "disks": ("vda",)})
    assert inside == InternalRequest(
        name="s", memory=False, disks=("vda",), quiesce=QuiesceRequest(wish="prefer", window=5)
    )


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("memory", {}, "no kind of snapshot 'memory'"),
        ("disk", {"max_pause_ms": 5}, "need a full snapshot"),
        ("disk", {"compression": "zstd"}, "need a full snapshot"),
        ("internal", {"degrade": True}, "need a full snapshot"),
        ("disk", {"memory": True}, "only internal snapshots"),
        ("full", {"memory": False}, "only internal snapshots"),
        ("internal", {"files": {"vda": "/a"}}, "creates no layers"),
        ("disk", {"quiesce": "required"}, "Invalid enum value 'required'"),
        ("full", {"compression": "gzip"}, "Invalid enum value 'gzip'"),
        ("full", {"max_pause_ms": "5"}, "Expected `float"),
        ("disk", {"disks": "vda"}, "a list of names, not 'vda'"),
        ("disk", {"disks": [1]}, "Expected `str`"),
        ("disk", {"description": b"\xff"}, "description"),
        ("disk", {"description": object()}, "objects of type object"),
        ("internal", {"memory": "no"}, "Expected `bool"),
    ],
)
def test_a_wish_that_would_not_be_heeded_is_refused(kind: Any, options: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        requested(kind, None, options)
    assert refused.value.effect == "none"


@pytest.mark.parametrize(
    "request_",
    [
        RevertRequest(name="s", run="stopped"),  # type: ignore[arg-type]
        MirrorRequest(disk="vda", target="/a", mode="copy"),  # type: ignore[arg-type]
        MirrorRequest(disk="vda", target="/a", mode="pivot", format="vmdk"),  # type: ignore[arg-type]
        DeleteRequest(names=("s", None)),  # type: ignore[arg-type]
    ],
)
def test_a_mistyped_word_is_refused(request_: Any) -> None:
    with pytest.raises(UsageError):
        requests.well_typed(request_)


def test_a_request_is_what_it_was() -> None:
    request = MirrorRequest(disk="vda", target="/a", mode="pivot", format="raw")
    assert requests.well_typed(request) == request
