"""libvirt beside the system's own: a daemon of the measurement's, with its folders, sockets and log in one folder.

It runs in mount and PID namespaces of its own, in which that folder stands where libvirt has its files. So it finds no
machine of the host's, the host's daemon does not meet it, and everything it has started ends with it, at the latest
when the measurement's process dies.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from tests.bench.guests import APPEND, home
from tests.bench.program import QEMU, ProgramFailed, Sample, printed, run, say

NEEDS = {
    "libvirtd": "libvirt-daemon",
    "virsh": "libvirt-clients",
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so": "libvirt-daemon-driver-qemu",
}
"""What must be there, and the package of Debian's that has it."""
DRIVER = list(NEEDS)[-1]

DAEMON = """\
unix_sock_dir = "{folder}/sockets"
auth_unix_rw = "none"
auth_unix_ro = "none"
log_level = 3
log_outputs = "3:file:{folder}/libvirtd.log"
host_uuid = "00000000-0000-4000-8000-000000000001"
"""
DRIVERS = """\
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""

PLACES = {"etc": "/etc/libvirt", "lib": "/var/lib/libvirt", "run": "/run/libvirt", "log": "/var/log/libvirt"}
PLACES |= {"cache": "/var/cache/libvirt"}
SCRIPT = """\
cd "$1"
while read -r from to; do mount --bind "$from" "$to" || exit; done <mounts
LIBVIRT_DRIVER_DIR=$1/drivers libvirtd --config "$1/libvirtd.conf" --pid-file "$1/libvirtd.pid" &
wait
"""
WAIT = 30.0

DOMAIN = """\
<domain type='{accel}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{kernel}</os>
  <features><acpi/></features>
  <cpu mode='{cpu}'/>
  <devices>
    <emulator>{qemu}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{folder}/{name}.console'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>{extra}</qemu:commandline>
</domain>
"""


class Libvirt:
    """A running daemon; see :func:`libvirt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._virsh = ("virsh", "-q", "-c", f"qemu+unix:///system?socket={folder}/sockets/libvirt-sock")

    def virsh(self, *words: str) -> str:
        """What a command of virsh prints."""
        return printed(*self._virsh, *words)

    def timed(self, *words: str) -> Sample:
        """Time a command of virsh."""
        return run(*self._virsh, *words)

    def versions(self) -> str:
        """The version of libvirt."""
        return self.virsh("version", "--daemon").split("Running against daemon: ")[1].strip()

    def define(self, name: str, disk: Path, *, memory: int, accel: str, boots: bool = False, qemu: str = QEMU) -> None:
        """Define a domain like one of qmpsnap's machines; its second monitor and its agent have sockets of ours.

        Args:
            name: of the domain.
            disk: its image.
            memory: in MiB.
            accel: ``tcg`` or ``kvm``.
            boots: whether the guest of the tests boots in it.
            qemu: the program; libvirt fails to ask QEMUs that are much newer than itself what they can do.
        """
        guest = home().guest
        kernel = f"<kernel>{guest}/vmlinux</kernel><initrd>{guest}/initrd</initrd><cmdline>{APPEND}</cmdline>"
        sockets = [
            *("-chardev", f"socket,id=user,path={self.monitor_of(name)},server=on,wait=off"),
            *("-mon", "chardev=user,mode=control"),
            *("-chardev", f"socket,id=agent,path={self.agent_of(name)},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=serial,addr=0x1e"),  # where libvirt puts nothing
            *("-device", "virtserialport,bus=serial.0,chardev=agent,name=org.qemu.guest_agent.0"),
        ]
        text = DOMAIN.format(
            accel={"tcg": "qemu", "kvm": "kvm"}[accel],
            name=name,
            memory=memory,
            kernel=kernel if boots else "",
            cpu="maximum" if accel == "tcg" else "host-passthrough",
            qemu=shutil.which(qemu),
            disk=escape(str(disk)),
            folder=escape(str(self.folder)),
            extra="".join(f"<qemu:arg value='{word}'/>" for word in sockets),
        )
        file = self.folder / f"{name}.xml"
        file.write_text(text)
        self.virsh("define", str(file))

    def disk_of(self, name: str) -> Path:
        """The image that a domain writes to now."""
        for line in self.virsh("domblklist", name).splitlines():
            target, _, path = line.strip().partition(" ")
            if target == "vda":
                return Path(path.strip())
        raise ProgramFailed(f"domain {name} has no vda")

    def monitor_of(self, name: str) -> str:
        """The socket of a domain's second monitor."""
        return str(self.folder / f"{name}.monitor")

    def agent_of(self, name: str) -> str:
        """The socket of its guest agent."""
        return str(self.folder / f"{name}.agent")


@contextmanager
def libvirt(folder: Path) -> Iterator[Libvirt]:
    """A daemon for the block; its domains end with it.

    Args:
        folder: an empty one of its own.
    """
    install()
    _lay_out(folder)
    # Whoever kills the measurement ends the first process of the namespace, and with that all of them.
    apart = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    with (folder / "output").open("wb") as output:
        daemon = subprocess.Popen(
            [*apart, "bash", "-c", SCRIPT, "bash", str(folder)], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + WAIT
        while not (folder / "sockets" / "libvirt-sock").exists():
            if daemon.poll() is not None or time.monotonic() > end:
                raise ProgramFailed("libvirtd did not start:\n" + (folder / "output").read_text())
            time.sleep(0.05)
        found = Libvirt(folder)
        found.virsh("list")  # QEMU's capabilities are found out once
        yield found
    finally:
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()


def install() -> None:
    """Have the packages of :data:`NEEDS`; raises ``ProgramFailed``."""
    packages = [package for thing, package in NEEDS.items() if not (Path(thing).exists() or shutil.which(thing))]
    if os.geteuid() != 0:
        raise ProgramFailed("libvirtd needs root")
    if packages:
        say(f"installing {' '.join(packages)}")
        install = ("apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends", *packages)
        try:
            printed(*install)
        except ProgramFailed:  # the package lists are too old
            printed("apt-get", "update")
            printed(*install)


def _lay_out(folder: Path) -> None:
    """Everything that the daemon finds: its configuration, QEMU's driver alone, and Debian's user for guests."""
    for name in ("sockets", "drivers", *PLACES):
        (folder / name).mkdir()
    (folder / "libvirtd.conf").write_text(DAEMON.format(folder=folder))
    (folder / "etc" / "qemu.conf").write_text(DRIVERS)
    (folder / "drivers" / Path(DRIVER).name).symlink_to(DRIVER)
    mounts = dict(PLACES)
    for name, line in (
        ("passwd", "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n"),
        ("group", "libvirt-qemu:x:64055:\n"),
    ):
        (folder / name).write_text(Path("/etc", name).read_text() + line)
        mounts[name] = f"/etc/{name}"
    for place in PLACES.values():
        Path(place).mkdir(parents=True, exist_ok=True)
    (folder / "mounts").write_text("".join(f"{name} {place}\n" for name, place in mounts.items()))
