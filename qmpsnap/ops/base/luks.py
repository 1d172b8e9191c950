"""Keys of encrypted disks, from the spec's file or the program, passed by descriptor to the program that opens them.

QEMU gets the read end of a pipe, which is empty once it has read it; qemu-img a file in memory that ends with it. A key
is never an argument, nor in the environment, the store, the journal, a log or a file of qmpsnap's.
"""

import os
import stat
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

from qmpsnap.block.image import encrypted
from qmpsnap.block.image.header import printable
from qmpsnap.errors import HostCannot, QemuGone, StateError, UsageError
from qmpsnap.host.files import opened
from qmpsnap.host.threads import to_end
from qmpsnap.machine import worker
from qmpsnap.model.layers.chain import Chain, Layer
from qmpsnap.model.machines.record import Machine
from qmpsnap.model.machines.secret import MOST, Secret
from qmpsnap.model.machines.spec import DiskSpec
from qmpsnap.ops.base import admission
from qmpsnap.ops.base.context import Context
from qmpsnap.qmp.session import Session

WRONG = "Invalid password"
"""What QEMU says of a key that opens none of an image's key slots."""


@asynccontextmanager
async def for_images(context: Context, machine: str, disk: DiskSpec) -> AsyncIterator[int | None]:
    """A descriptor that qemu-img can read a disk's key from, as often as it likes; None for a disk that has none."""
    if disk.encryption is None:
        yield None
        return
    with _in_memory(await to_end(_secret, context, machine, disk)) as descriptor:
        yield descriptor


@asynccontextmanager
async def for_layer(context: Context, machine: Machine, layer: Layer) -> AsyncIterator[int | None]:
    """As :func:`for_images`, for a layer whose disk its name tells, wherever it is in the disk's tree.

    ``UsageError``: it is not to be had; also for a key in a file that cannot be read.
    """
    disk = machine.disk_of_layers(layer.id.rsplit("-", 1)[0])
    if disk is None or disk.encryption is None:
        yield None
        return
    try:
        secret = await to_end(_secret, context, machine.name, disk)
    except HostCannot as error:  # which to the caller would be a fault of the image
        raise UsageError(error.message, hint=error.hint, machine=machine.name) from error
    with _in_memory(secret) as descriptor:
        yield descriptor


async def require(context: Context, machine: Machine, chains: Iterable[Chain]) -> None:
    """Make sure that the keys at hand open the machine's disks, before a QEMU ends that has them open."""
    for chain in chains:
        async with for_images(context, machine.name, machine.require_layers_of(chain.disk)) as key:
            if key is not None:
                await encrypted.require_key(chain.active.path, key, qemu_img=context.image.binary)


@asynccontextmanager
async def for_qemu(context: Context, machine: Machine, disks: Iterable[DiskSpec]) -> AsyncIterator[dict[str, int]]:
    """The descriptors from which one QEMU that is started in the block reads the disks' keys, by the disks' names."""
    with ExitStack() as stack:
        pipes = {}
        for disk in disks:
            if disk.encryption:
                secret = await to_end(_secret, context, machine.name, disk)
                pipes[disk.name] = stack.enter_context(_pipe(secret))
                if context.run_as:  # it opens it anew, by /proc
                    os.fchown(pipes[disk.name], context.run_as.uid, -1)
        try:
            yield pipes
        except QemuGone as error:
            if not pipes or WRONG not in error.message:
                raise
            raise StateError(
                f"the secret of disk {', '.join(pipes)} of machine {machine.name} does not open its images",
                hint="use the secret that the machine was defined with",
                machine=machine.name,
            ) from error


@asynccontextmanager
async def worker_on(context: Context, machine: Machine, chain: Chain) -> AsyncIterator[Session]:
    """A worker that has a chain open, see :func:`qmpsnap.machine.worker.working_on`, with the key of its disk."""
    run_dir = context.home.run_dir(machine.name)
    await admission.all_files(context, machine, [chain], None)
    async with (
        for_qemu(context, machine, [machine.require_layers_of(chain.disk)]) as secrets,
        worker.working_on(
            chain, machine, qemu=context.qemu, run_dir=run_dir, secrets=secrets, user=context.run_as
        ) as session,
    ):
        yield session


def require_plain(machine: Machine, what: str, hint: str) -> None:
    """Refuse what would leave a trace of an encrypted disk in the clear."""
    if sealed := [disk.name for disk in machine.spec.disks if disk.encryption]:
        raise StateError(
            f"disk {', '.join(sealed)} of machine {machine.name} is encrypted: {what}",
            hint=hint,
            machine=machine.name,
        )


@contextmanager
def _in_memory(secret: Secret) -> Iterator[int]:
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, secret.reveal())
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _pipe(secret: Secret) -> Iterator[int]:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(write, secret.reveal())  # far less than a pipe holds
        os.close(write)
        yield read
    finally:
        os.close(read)


def _secret(context: Context, machine: str, disk: DiskSpec) -> Secret:
    assert disk.encryption
    place = f"{machine}/{disk.name}"
    if place in context.secrets:
        return context.secrets[place]
    path = disk.encryption.secret_file
    if path is None:
        raise UsageError(
            f"disk {disk.name} of machine {machine} is encrypted, but no secret was given and its spec names no"
            " secret file",
            hint=f"set 'secret-file' in the spec, or use qmpsnap.open(secrets={{{place!r}: ...}})",
            machine=machine,
        )
    return Secret(_content(path), what=f"the secret in {printable(path)}")


def _content(path: str) -> bytes:
    try:
        with opened(path) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o077:
                raise HostCannot(
                    f"the secret in {printable(path)} is accessible to other users",
                    hint=f"make it private: chmod 0600 {printable(path)}",
                )
            return os.read(descriptor, MOST + 1)
    except OSError as error:
        raise HostCannot(f"the secret in {printable(path)} cannot be read: {error.strerror}") from error
