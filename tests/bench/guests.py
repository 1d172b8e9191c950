"""The machines that are measured, and what is asked of their QEMU from outside."""

import json
import os
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import qmpsnap
from qmpsnap.model.home import Home
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from tests.bench import bare

MIB = 1 << 20
ANSWER = 60.0
"""Seconds that an agent may take."""


def home() -> Home:
    """Where qmpsnap keeps what is measured."""
    return Home.from_environment(os.environ, uid=os.geteuid())


def booting(name: str) -> MachineSpec:
    """A machine that boots the small guest."""
    guest = home().guest
    return MachineSpec(
        name=name,
        kernel=str(guest / "vmlinux"),
        initrd=str(guest / "initrd"),
        append=APPEND,
        memory=256 * MIB,
        disks=(DiskSpec(name="vda", size=64 * MIB),),
    )


APPEND = "console=ttyS0 quiet panic=-1"


def still(name: str, *, size: int = 16 * MIB, memory: int = 64 * MIB) -> MachineSpec:
    """A machine that is only ever started with -S."""
    return MachineSpec(name=name, memory=memory, agent=False, disks=(DiskSpec(name="vda", size=size),))


def monitor_of(name: str) -> str:
    """The socket of the users' monitor of one of qmpsnap's machines."""
    return str(home().run_dir(name) / "user.sock")


def agent_of(name: str) -> str:
    """The socket of its guest agent."""
    return str(home().run_dir(name) / "agent.sock")


async def active(vm: qmpsnap.MachineHandle) -> tuple[str, str]:
    """The node and the file that the machine's only disk writes to."""
    layer = (await vm.chains())[0].active
    return str(layer.id), layer.path


@asynccontextmanager
async def booted(q: qmpsnap.Controller, name: str) -> AsyncIterator[qmpsnap.MachineHandle]:
    """A machine whose guest has booted, for the block."""
    vm = await q.define(booting(name))
    await vm.start()
    try:
        answers(agent_of(name))
        yield vm
    finally:
        if await vm.is_running():
            await vm.stop(force=True)


@asynccontextmanager
async def started(q: qmpsnap.Controller, spec: MachineSpec) -> AsyncIterator[qmpsnap.MachineHandle]:
    """A machine under -S, for the block."""
    vm = await q.define(spec)
    await vm.start(paused=True)
    try:
        yield vm
    finally:
        if await vm.is_running():
            await vm.stop(force=True)


def answers(path: str) -> None:
    """Return once the guest agent behind the socket has answered."""
    end = time.monotonic() + ANSWER
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as agent:
                agent.settimeout(ANSWER)
                agent.connect(path)
                number = time.monotonic_ns()
                agent.sendall(json.dumps({"execute": "guest-sync", "arguments": {"id": number}}).encode() + b"\n")
                if str(number).encode() in agent.recv(4096):
                    return
        except (FileNotFoundError, ConnectionError):
            time.sleep(0.002)
        assert time.monotonic() < end, f"no agent answers at {path}"


async def write_little(path: str) -> None:
    """Write 64 KiB to the first disk of a QEMU, through its monitor."""
    async with bare.monitor(path) as qemu:
        backends: Any = await qemu.execute("query-block")
        qdev = next(backend["qdev"] for backend in backends if backend.get("inserted"))
        line = f'qemu-io -d {qdev} "write -P 7 1M 64k"'
        said = await qemu.execute("human-monitor-command", {"command-line": line})
        assert not said, said


@asynccontextmanager
async def held(path: str) -> AsyncIterator[Mapping[str, float]]:
    """How long the guest was paused in the block, by QEMU's STOP and RESUME: ``pause`` in milliseconds, at its end."""
    found: dict[str, float] = {}
    async with bare.monitor(path) as qemu:
        with qemu.listener(("STOP", "RESUME")) as events:
            yield found
            at: dict[str, float] = {}
            while "RESUME" not in at:
                event: Any = await events.get()
                stamp = event["timestamp"]
                at[event["event"]] = stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3
    found["pause"] = at["RESUME"] - at["STOP"]
