"""``qmpsnap.testing``: what a test of somebody's QMP code sees of the scripted monitor."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from qmpsnap.testing import HELLO, Close, Event, Expect, Refuse, Reply, Turn, scripted, scripted_sync


class Client:
    """A program that talks to QEMU."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw")
        self.hear()
        self.say("qmp_capabilities", {})

    def hear(self) -> Any:
        return json.loads(self._file.readline())

    def say(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        message = {"execute": command} if arguments is None else {"execute": command, "arguments": arguments}
        self._file.write(json.dumps(message))
        self._file.flush()
        return self.hear()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_a_program_that_follows_the_transcript(tmp_path: Path) -> None:
    turns: list[Turn] = [
        Expect("query-status"),
        Reply({"status": "paused"}),
        Expect("blockdev-add", ...),
        Refuse("GenericError", "no"),
        Event("STOP", {"reason": "none"}),
        Close(),
        *HELLO,
    ]
    with scripted_sync(tmp_path / "qmp", *HELLO, *turns) as monitor:
        client = Client(tmp_path / "qmp")
        assert client.say("query-status") == {"return": {"status": "paused"}}
        assert client.say("blockdev-add", {"driver": "null-co"})["error"] == {"class": "GenericError", "desc": "no"}
        assert client.hear()["data"] == {"reason": "none"}
        assert client._file.readline() == ""
        client.close()
        Client(tmp_path / "qmp").close()
    assert [said["execute"] for said in monitor.said] == [
        "qmp_capabilities", "query-status", "blockdev-add", "qmp_capabilities",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "wrong"),
    [
        ((Expect("stop"), Reply()), "expected stop with arguments None, but the client said cont with arguments None"),
        ((Expect("cont", {"x": 1}), Reply()), "expected cont with arguments {'x': 1}, but the client said cont"),
        ((), 'the client said more than the transcript has: {"execute": "cont"}'),
        ((Expect("cont"), Reply(), Expect("stop")), "expected stop(,| with arguments None, but the client hung up)"),
    ],
)
def test_one_that_does_not_is_told_what_was_expected(tmp_path: Path, turns: tuple[Turn, ...], wrong: str) -> None:
    def run() -> None:
        with scripted_sync(tmp_path / "qmp", *HELLO, *turns):
            client = Client(tmp_path / "qmp")
            try:
                client.say("cont")
            finally:
                client.close()

    with pytest.raises(AssertionError, match=wrong):
        run()


async def test_one_that_does_not_connect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nobody has connected to"):
        async with scripted(tmp_path / "qmp", *HELLO):
            pass


async def test_the_example_of_the_page(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "pytest.md").read_text()
    example = re.search(r"<!-- run by tests/qmp/test_kit.py -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    assert example
    names: dict[str, Any] = {}
    exec(example[1], names)  # noqa: S102
    await names["test_a_job_that_is_refused"](tmp_path)
