"""Connecting to a unix socket: however long its path, however full its backlog."""

import socket
from pathlib import Path

import anyio
import pytest

from qmpsnap.errors import QemuGone
from qmpsnap.qmp import session
from qmpsnap.qmp.dial import dial
from qmpsnap.qmp.unixsocket import SOCKET_PATH_LIMIT
from qmpsnap.testing import HELLO, Expect, Reply, scripted


def deep(tmp_path: Path, name: str = "qmp") -> Path:
    """A socket's path that no socket address has room for."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    assert len(str(folder / name)) > SOCKET_PATH_LIMIT
    return folder / name


async def test_a_path_longer_than_a_socket_address_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = deep(tmp_path)
    monkeypatch.chdir(path.parent)
    turns = (*HELLO, Expect("stop"), Reply("there"))
    async with scripted(Path(path.name), *turns), session.connect(path, machine="web") as monitor:
        assert await monitor.execute("stop") == "there"


@pytest.mark.parametrize("name", ["qmp", "x" * 107], ids=["short-name", "name-too-long-by-itself"])
async def test_behind_a_long_path_nobody_is_nobody(tmp_path: Path, name: str) -> None:
    with pytest.raises(QemuGone):
        async with session.connect(deep(tmp_path, name), machine="web"):
            pytest.fail("nobody is there")


async def test_the_longest_path_that_fits_is_used_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    path = folder / ("n" * (SOCKET_PATH_LIMIT - len(str(folder)) - 1))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with await dial(path) as endpoint:
            assert endpoint.getpeername() == str(path)


async def test_who_finds_the_backlog_full_gets_in_when_a_place_is_free(tmp_path: Path) -> None:
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(path))
        server.listen(0)
        first.connect(str(path))
        connected = anyio.Event()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:

                async def knock() -> None:
                    (await dial(path)).close()
                    connected.set()

                group.start_soon(knock)
                await anyio.wait_all_tasks_blocked()
                assert not connected.is_set()
                server.accept()[0].close()
                await connected.wait()


async def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await dial(tmp_path / "nowhere" / "qmp")
