"""Which accelerator to start QEMU with: ``auto`` must not trust ``/dev/kvm``.

There are hosts whose ``/dev/kvm`` opens, creates virtual machines, runs the firmware and still never gets a stock
kernel to run: they lack the CPU's virtualisation flag. So KVM needs the flag, the device *and* a probe that saw a
virtual CPU execute code within a bounded time; the probe's answer is kept until the next boot or another QEMU.
"""

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Literal

import anyio
from msgspec import Struct

from qmpsnap.errors import HostCannot
from qmpsnap.hint import call
from qmpsnap.host import files
from qmpsnap.host.programs import running
from qmpsnap.machine.starting.argv import TSC_KHZ
from qmpsnap.machine.starting.privileges import Privileges, RunAs, obstacle
from qmpsnap.model.machines.spec import Accel

PROBE_DEADLINE = 5.0
"""Seconds the firmware has to print its first line; it takes a twentieth of one."""

KVM = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")


class Choice(Struct, frozen=True):
    """An accelerator and the reason it was chosen, for ``doctor`` and ``show``."""

    accel: Literal["kvm", "tcg"]
    reason: str


async def choose(accel: Accel, *, qemu: str, cache: Path, user: RunAs | None = None) -> Choice:
    """The accelerator for a spec's ``accel``: ``kvm`` and ``tcg`` are taken at their word.

    ``cache`` is where the probe's answer is kept, ``user`` whom QEMU runs as, None for this user.
    """
    if accel != "auto":
        return Choice(accel, "the spec requests it")
    if reason := kvm_obstacle(user=user):
        return Choice("tcg", reason)
    if await _kvm_runs(qemu, cache, user):
        return Choice("kvm", "the CPU has the flag and a test virtual CPU ran")
    return Choice("tcg", f"no virtual CPU ran under KVM within {PROBE_DEADLINE:g} s")


def kvm_obstacle(*, device: Path = KVM, cpuinfo: Path = CPUINFO, user: RunAs | None = None) -> str:
    """Why KVM cannot be had on this host without even trying; empty when nothing speaks against it."""
    if found := device_obstacle(device, user=user):
        return found
    flags = {word for line in cpuinfo.read_text().splitlines() if line.startswith("flags") for word in line.split()}
    if not flags & {"vmx", "svm"}:
        return f"{device} exists, but the CPU has neither vmx nor svm"
    return ""


def device_obstacle(device: Path = KVM, *, user: RunAs | None = None) -> str:
    """Why QEMU could not open KVM's device; empty when it could."""
    if not device.exists():
        return f"{device} is missing"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} cannot be opened by this user"
    if user and (remedy := obstacle(user, str(device), write=True)):
        return f"{device} cannot be opened by QEMU's user {user.name}: {remedy}"
    return ""


def tsc_khz(*, cpuinfo: Path = CPUINFO) -> int:
    """The rate of the host's time stamp counter in kHz, as far as ``/proc/cpuinfo`` tells it."""
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "cpu MHz":
            return round(float(value) * 1000)
    return TSC_KHZ


async def _kvm_runs(qemu: str, cache: Path, user: RunAs | None) -> bool:
    answer = cache / (f"kvm-probe-{user.uid}.json" if user else "kvm-probe.json")
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        kept = json.loads(answer.read_text())
        if kept["boot"] == boot_id and kept["qemu"] == qemu:
            return bool(kept["runs"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    runs = await vcpu_runs("kvm", qemu=qemu, user=user)
    files.make_folder(cache)
    said = json.dumps({"boot": boot_id, "qemu": qemu, "runs": runs})
    files.replace_durably(answer, said.encode(), ending=f"{os.getpid()}.part")
    return runs


async def vcpu_runs(accel: str, *, qemu: str, deadline: float = PROBE_DEADLINE, user: RunAs | None = None) -> bool:
    """Whether a virtual CPU executes code under ``accel``: the firmware's debug port says so by its first byte."""
    argv = [
        qemu, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-accel", accel, "-m", "32",
        "-chardev", "stdio,id=debug,signal=off", "-device", "isa-debugcon,iobase=0x402,chardev=debug",
    ]  # fmt: skip
    try:
        rights = Privileges.bare(user)
        async with running(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, **rights.popen) as process:
            with anyio.move_on_after(deadline), contextlib.suppress(anyio.EndOfStream):
                return process.stdout is not None and bool(await process.stdout.receive(1))
    except OSError as error:
        raise HostCannot(f"{qemu} cannot be run: {error}", hint=call("doctor") + " shows what is missing") from error
    return False
