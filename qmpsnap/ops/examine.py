"""``doctor``: what this host, its QEMU and its folders can do."""

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Literal

import anyio
import psutil
from anyio import to_thread
from msgspec import Struct

from qmpsnap.errors import HostCannot, QmpsnapError
from qmpsnap.machine import accel, probe
from qmpsnap.machine.firmware import find_firmware
from qmpsnap.ops import space
from qmpsnap.ops.context import Context, blocking


class Ability(Struct, frozen=True):
    """One thing a host can do, can do in part, or cannot; ``remedy`` is empty when there is nothing to do."""

    name: str
    ok: Literal["yes", "limited", "no"]
    detail: str
    remedy: str = ""


async def run(context: Context) -> list[Ability]:
    """Look at everything; never raises for what is missing."""
    return [
        *await _qemu(context),
        await _accelerator(context),
        await _image_tool(context),
        _firmware(),
        _guest(context),
        await _store(context),
        *(_folder(name, path) for name, path in (("data", context.home.data), ("run", context.home.run))),
        await to_thread.run_sync(_memory),
    ]


async def _qemu(context: Context) -> list[Ability]:
    try:
        abilities = await probe.ask(context.qemu, context.home.cache)
    except QmpsnapError as error:
        return [Ability("qemu", "no", error.message, error.hint)]
    where = shutil.which(context.qemu) or context.qemu
    found = [Ability("qemu", "yes", f"{abilities.version} ({where})")]
    if abilities.background_snapshot:
        remedy = "sysctl vm.unprivileged_userfaultfd=1, or give this user access to /dev/userfaultfd"
        found.append(Ability("background-snapshot", "limited", abilities.background_snapshot, remedy))
    else:
        found.append(Ability("background-snapshot", "yes", "QEMU accepts the capability"))
    return found


async def _accelerator(context: Context) -> Ability:
    try:
        choice = await accel.choose("auto", qemu=context.qemu, cache=context.home.cache)
    except HostCannot as error:
        return Ability("accelerator", "no", error.message, error.hint)
    if choice.accel == "kvm":
        return Ability("accelerator", "yes", f"kvm: {choice.reason}")
    remedy = "enable virtualisation (nested, in a virtual machine) and give this user access to /dev/kvm"
    return Ability("accelerator", "limited", f"tcg (slow, works everywhere): {choice.reason}", remedy)


async def _image_tool(context: Context) -> Ability:
    remedy = "apt-get install qemu-utils, or set QMPSNAP_QEMU_IMG to the binary"
    try:
        with anyio.fail_after(10):
            done = await anyio.run_process([context.image.binary, "--version"], stdin=subprocess.DEVNULL, check=False)
    except (OSError, TimeoutError) as error:
        return Ability("qemu-img", "no", f"{context.image.binary}: {str(error) or 'no answer within 10 s'}", remedy)
    first = done.stdout.decode(errors="replace").partition("\n")[0]
    return Ability("qemu-img", "yes", first) if done.returncode == 0 else Ability("qemu-img", "no", first, remedy)


def _firmware() -> Ability:
    try:
        return Ability("uefi", "yes", find_firmware().code)
    except HostCannot as error:
        return Ability("uefi", "limited", "no firmware images: specs with 'firmware: uefi' are refused", error.hint)


def _guest(context: Context) -> Ability:
    """The agent's counterpart lies in the guest; the small guest has one, so its presence is what can be told here."""
    if (context.home.guest / "initrd").is_file():
        return Ability("agent", "yes", "a channel for every machine; the small guest runs qemu-guest-agent")
    return Ability(
        "agent",
        "limited",
        "a channel for every machine; the small guest is not built",
        "scripts/demo, or launch/guest/build",
    )


async def _store(context: Context) -> Ability:
    machines = await blocking(context.store.machines)
    return Ability("store", "yes", f"{context.home.store}, {len(machines)} machine(s)")


def _folder(name: str, path: Path) -> Ability:
    if not path.is_dir():
        return Ability(f"{name} folder", "yes", f"{path}, made when first needed")
    status = path.stat()
    if status.st_uid != os.geteuid():
        return Ability(
            f"{name} folder", "no", f"{path} belongs to user {status.st_uid}", "set QMPSNAP_HOME to your own"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Ability(f"{name} folder", "no", f"{path} can be written to by others", f"chmod go-w {path}")
    free = space.room(path).free
    if name == "data" and free < space.LOW:  # the run folder holds little, and often lies in memory
        remedy = "free some space there: QEMU pauses a guest whose disk finds none"
        return Ability(f"{name} folder", "limited", f"{path}, only {free >> 20} MiB free", remedy)
    return Ability(f"{name} folder", "yes", f"{path}, {free >> 20} MiB free")


def _memory() -> Ability:
    free = psutil.virtual_memory().available
    return Ability("memory", "yes", f"{free >> 20} MiB available to guests")
