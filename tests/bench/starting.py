"""A machine's start under -S: by the library, and of the same QEMU until its monitor greets."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import qmpsnap
from tests.bench import guests
from tests.bench.measure import Way, clock
from tests.bench.program import Sample
from tests.bench.setting import Setting

MEASURES = ("start",)


async def measure(at: Setting) -> None:
    """Time them."""
    async with qmpsnap.open() as q:
        vm = await q.define(guests.still("starts"))
        process = await vm.start(paused=True)
        argv = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[:-1]
        await vm.stop(force=True)
        await at.results.compare(
            "start",
            {"library": _library(vm), "bare": _bare(at, argv), "answer": _bare(at, argv, answers=True)},
            share=2,
        )


def _library(vm: qmpsnap.MachineHandle) -> Way:
    async def way() -> Sample:
        with clock() as sample:
            await vm.start(paused=True)
        await vm.stop(force=True)
        return sample

    return way


def _bare(at: Setting, argv: list[str], *, answers: bool = False) -> Way:
    """The same arguments in another working directory, where its sockets are; until it greets, or answers a command."""

    async def way() -> Sample:
        folder = at.folder_for("bare-start")
        with clock() as sample:
            qemu = subprocess.Popen(
                argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                _greeted(folder / "qmp.sock", answers=answers)
            except BaseException:
                qemu.kill()
                raise
        qemu.kill()
        qemu.wait()
        shutil.rmtree(folder)
        return sample

    return way


def _greeted(path: Path, *, answers: bool) -> None:
    end = time.monotonic() + guests.ANSWER
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.settimeout(guests.ANSWER)
                monitor.connect(str(path))
                assert b'"QMP"' in monitor.recv(4096)
                if answers:
                    monitor.sendall(b'{"execute": "qmp_capabilities"}')
                    assert b'"return"' in monitor.recv(4096)
                return
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < end
            time.sleep(0.001)
