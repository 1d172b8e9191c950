"""The QMP commands: what each says, word for word, and that an answer against QEMU's schema is an error of ours."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.errors import QmpError
from qmpsnap.model.names import NodeName
from qmpsnap.qmp import commands, migration, session, transactions
from qmpsnap.qmp.commands import BlockGraph, GraphEdge, GraphNode, JobInfo, MachineType, RunStatus
from qmpsnap.qmp.session import Monitor
from qmpsnap.testing import HELLO, Expect, Reply, scripted

Call = Callable[[Monitor], Awaitable[Any]]

NODE = {
    "node-name": "vda-2",
    "ro": False,
    "drv": "qcow2",
    "file": "/m/vda-2.qcow2",
    "backing_file": "/m/vda-1.qcow2",
    "image": {"filename": "/m/vda-2.qcow2", "format": "qcow2", "virtual-size": 1 << 20, "actual-size": 4096, "new": 1},
    "cache": {"writeback": True},
}


async def ask(tmp_path: Path, call: Call, said: Expect, answer: Any) -> Any:
    path = tmp_path / "qmp"
    async with scripted(path, *HELLO, said, Reply(answer)), session.connect(path, machine="web") as monitor:
        return await call(monitor)


@pytest.mark.parametrize(
    ("call", "said", "answer", "result"),
    [
        (
            commands.query_status,
            Expect("query-status"),
            {"status": "paused", "running": False, "singlestep": False},
            RunStatus("paused", running=False),
        ),
        (commands.query_uuid, Expect("query-uuid"), {"UUID": "u"}, "u"),
        (
            commands.query_machines,
            Expect("query-machines"),
            [{"name": "pc-q35-7.2", "alias": "q35", "cpu-max": 288}, {"name": "none"}],
            (MachineType("pc-q35-7.2", "q35"), MachineType("none")),
        ),
        (
            lambda monitor: commands.has_device(monitor, "vmgenid"),
            Expect("device-list-properties", {"typename": "vmgenid"}),
            [{"name": "guid", "type": "str"}],
            True,
        ),
        (
            commands.query_jobs,
            Expect("query-jobs"),
            [{"id": "qs.1.vda", "type": "commit", "status": "ready", "current-progress": 1}],
            (JobInfo("qs.1.vda", "commit", "ready", current_progress=1),),
        ),
        (
            commands.query_block_graph,
            Expect("x-debug-query-block-graph"),
            {
                "nodes": [{"id": 1, "type": "block-driver", "name": "a"}],
                "edges": [{"parent": 1, "child": 2, "name": "file", "perm": ["write"], "shared-perm": []}],
            },
            BlockGraph((GraphNode(1, "block-driver", "a"),), (GraphEdge(1, 2, "file", ("write",)),)),
        ),
        (
            lambda monitor: commands.blockdev_add(monitor, {"driver": "raw"}),
            Expect("blockdev-add", {"driver": "raw"}),
            {},
            None,
        ),
        (
            lambda monitor: commands.blockdev_del(monitor, NodeName("vda-2")),
            Expect("blockdev-del", {"node-name": "vda-2"}),
            {},
            None,
        ),
        (
            lambda monitor: migration.set_capabilities(monitor, {"background-snapshot": True}),
            Expect(
                "migrate-set-capabilities", {"capabilities": [{"capability": "background-snapshot", "state": True}]}
            ),
            {},
            None,
        ),
        (
            lambda monitor: commands.transaction(
                monitor,
                transactions.snapshot_transaction([(NodeName("a"), NodeName("b")), (NodeName("c"), NodeName("d"))]),
            ),
            Expect(
                "transaction",
                {
                    "actions": [
                        {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "b"}},
                        {"type": "blockdev-snapshot", "data": {"node": "c", "overlay": "d"}},
                    ]
                },
            ),
            {},
            None,
        ),
        (lambda monitor: commands.control(monitor, "system_powerdown"), Expect("system_powerdown"), {}, None),
    ],
)
async def test_each_command_is_said_in_qemus_words_and_its_answer_read(
    tmp_path: Path, call: Call, said: Expect, answer: Any, result: Any
) -> None:
    assert await ask(tmp_path, call, said, answer) == result


async def test_the_version_is_that_of_the_greeting(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    async with scripted(path, *HELLO), session.connect(path, machine="web") as monitor:
        assert await commands.query_version(monitor) == "7.2.22"


async def test_nodes_are_always_asked_for_flat(tmp_path: Path) -> None:
    flat = Expect("query-named-block-nodes", {"flat": True})
    (node,) = await ask(tmp_path, commands.query_nodes, flat, [NODE])
    assert (node.node_name, node.ro, node.drv, node.backing_file) == ("vda-2", False, "qcow2", "/m/vda-1.qcow2")
    assert (node.image.virtual_size, node.image.actual_size) == (1 << 20, 4096)


@pytest.mark.parametrize(
    ("call", "command", "answer"),
    [
        (commands.query_status, "query-status", {}),
        (commands.query_status, "query-status", {"status": "running", "running": "yes"}),
        (commands.query_uuid, "query-uuid", {"UUID": 7}),
        (commands.query_uuid, "query-uuid", None),
        (commands.query_machines, "query-machines", {"name": "q35"}),
        (commands.query_jobs, "query-jobs", [{"id": "j"}]),
        (commands.query_block_graph, "x-debug-query-block-graph", {"nodes": [{"id": "1"}], "edges": []}),
        (commands.query_block_graph, "x-debug-query-block-graph", []),
    ],
)
async def test_an_answer_against_qemus_schema_is_a_qmp_error_that_names_the_command(
    tmp_path: Path, call: Call, command: str, answer: Any
) -> None:
    with pytest.raises(QmpError, match=f"QEMU's answer to {command} does not match its schema") as caught:
        await ask(tmp_path, call, Expect(command), answer)
    assert caught.value.effect == "none"


async def test_a_node_without_its_image_is_against_the_schema(tmp_path: Path) -> None:
    bare = {name: value for name, value in NODE.items() if name != "image"}
    with pytest.raises(QmpError, match="query-named-block-nodes"):
        await ask(tmp_path, commands.query_nodes, Expect("query-named-block-nodes", {"flat": True}), [bare])
