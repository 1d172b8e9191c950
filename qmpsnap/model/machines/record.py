"""What the store records of a machine, and of the QEMU that runs it."""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from qmpsnap.errors import NotFoundError
from qmpsnap.model.machines.adoption import Adoption, Names
from qmpsnap.model.machines.spec import DiskSpec, MachineSpec
from qmpsnap.model.names import OperationId
from qmpsnap.model.text import nearest


class Process(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A QEMU that was started for a machine: enough to tell it from any later process with the same pid.

    Attributes:
        start_ticks: field 22 of ``/proc/PID/stat``: clock ticks since boot.
        boot_id: ``/proc/sys/kernel/random/boot_id`` at the start.
        started: seconds since the epoch, UTC.
        nodes: names that QEMU itself has given to nodes of our layers, as ``vda-3.file`` to ``#block123``.
    """

    pid: int
    start_ticks: int
    boot_id: str
    started: float
    accel: str
    qemu_version: str
    nodes: Mapping[str, str] = {}


class Consent(Struct, frozen=True, kw_only=True):
    """Which further QEMU arguments (``extra``) somebody has agreed to; without that they are given to no QEMU.

    ``user``: the id of the user who did; None where an earlier release has not recorded it.
    """

    extra: tuple[str, ...]
    user: int | None = None

    def covers(self, extra: tuple[str, ...], *, user: int) -> bool:
        """Whether that user may give a QEMU these: nobody is bound by what another user has agreed to, but root."""
        return self.extra == extra and self.user in (None, 0, user)


Identity = Literal["twin", "fresh"]
"""``twin``: the guest still has its parent's MAC addresses, hostname, machine-id, SSH host keys and random pool.
``fresh``: all of them were replaced, one after the other, by its agent."""


class Origin(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a fork went on from.

    Attributes:
        machine: its parent's name then.
        snapshot: the parent's full snapshot.
        uuid: the parent's, which the guest takes for its own until it boots again.
        identity: whose identity the guest has.
        lacks: what of its identity could not be replaced, a sentence each.
        ephemeral: all of the fork is removed once its QEMU has ended.
        owner: an ephemeral fork ends with this process, too.
    """

    machine: str
    snapshot: str
    uuid: str
    identity: Identity = "twin"
    lacks: tuple[str, ...] = ()
    ephemeral: bool = False
    owner: Process | None = None

    @property
    def name(self) -> str:
        """As a user names it."""
        return f"{self.machine}@{self.snapshot}"


class Vmgenid(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The generation ID that QEMU's ``vmgenid`` device shows the guest.

    Attributes:
        guid: another one after each revert, and in each fork: what a guest must not repeat, it makes anew.
        resting: the operation that saved the machine, as long as no QEMU was started since; 0 otherwise.
    """

    guid: str
    resting: OperationId = OperationId(0)


class Past(Struct, frozen=True, kw_only=True):
    """A spec that a machine had; ``until``: the first operation that it had another one for."""

    until: OperationId
    spec: MachineSpec


class Machine(Struct, frozen=True, kw_only=True):
    """A named machine as the store knows it.

    Attributes:
        host: node name of the host it lives on; other hosts may look but not touch.
        current: name of the snapshot the active layers grew from, or None.
        adopted: somebody else launches its QEMU; how to speak to that. None for a machine of our own.
        consent: to the spec's ``extra`` arguments; None where nobody has agreed to any.
        origin: of a fork; None of any other machine.
        past: the specs it had before, oldest first, as far as snapshots were taken with them.
        vmgenid: None of a machine that an earlier release has defined, and of an adopted one.
    """

    name: str
    uuid: str
    host: str
    spec: MachineSpec
    created: float
    current: str | None = None
    process: Process | None = None
    adopted: Adoption | None = None
    consent: Consent | None = None
    origin: Origin | None = None
    past: tuple[Past, ...] = ()
    vmgenid: Vmgenid | None = None

    @property
    def guid(self) -> str:
        """What its ``vmgenid`` device has; empty where it has no such device."""
        return self.vmgenid.guid if self.vmgenid and self.spec.takes_vmgenid else ""

    @property
    def own(self) -> "Machine":
        """As it is once its QEMU has ended: one that was taken from its owner is no longer adopted then."""
        taken = self.adopted.taken if self.adopted else None
        return replace(self, adopted=None, process=None, spec=taken.spec) if taken else self

    def spec_at(self, operation: OperationId) -> MachineSpec:
        """The spec that it had for that operation."""
        return next((past.spec for past in self.past if operation < past.until), self.spec)

    @property
    def names(self) -> Names | None:
        """The names that its QEMU has for our layers, where they are not ours."""
        given = self.process.nodes if self.process else {}
        if self.adopted:
            found = self.adopted.names
            return Names({**found.nodes, **given}, found.disks)
        return Names(given) if given else None

    def sent(self, arguments: Any) -> Any:
        """Arguments of a QMP command with the names that the machine's QEMU has for our layers."""
        return names.sent(arguments) if (names := self.names) else arguments

    def disk_of_layers(self, name: str) -> DiskSpec | None:
        """The disk of that name that it has, or had when a snapshot was taken: its layers are opened so."""
        specs = (self.spec, *(past.spec for past in reversed(self.past)))
        return next((disk for spec in specs if (disk := spec.disk(name))), None)

    def require_layers_of(self, name: str) -> DiskSpec:
        """As :meth:`disk_of_layers`, of a disk that the machine has or had."""
        return self.disk_of_layers(name) or self.require_disk(name)

    def require_disk(self, name: str) -> DiskSpec:
        """The disk of that name."""
        if disk := self.spec.disk(name):
            return disk
        known = ", ".join(disk.name for disk in self.spec.disks)
        raise NotFoundError(
            f"machine {self.name} has no disk {name!r}{nearest(name, [disk.name for disk in self.spec.disks])}",
            hint=f"its disks: {known}" if known else "it has none",
            machine=self.name,
        )
