"""Where everything lies: store, images, run folders and caches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from msgspec import Struct

from qmpsnap.model import places
from qmpsnap.model.names import OperationId

RECORD = places.RECORD
ACTIVE = places.ACTIVE
VARIABLES = "vars.fd"
"""A machine's own UEFI variable store."""
TPM = "tpm"
"""Beside it: the folder of the machine's TPM."""
WITH_TPM = "+tpm"
"""How the name of a copy of it ends, without its suffix, where the state of the machine's TPM is beside it."""


class Home(Struct, frozen=True, kw_only=True):
    """The four places. ``QMPSNAP_HOME`` puts them under one folder.

    ``data`` (store, locks, logs, machines' images) survives everything; ``run`` (sockets, pid files) may be empty after
    a boot; ``cache`` (the small guest, probes) can be made again. ``images``: further folders whose images a spec may
    name. ``templates``: where the user wants the templates of forks; None lets qmpsnap choose.
    """

    data: Path
    run: Path
    cache: Path
    images: tuple[Path, ...] = ()
    templates: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, uid: int) -> Self:
        """The places for a user: ``QMPSNAP_HOME``, or the XDG folders, or root's under ``/var`` and ``/run``."""
        found = places.from_environment(environment, uid=uid)
        images = tuple(map(Path, found.images))
        templates = environment.get("QMPSNAP_TEMPLATES")
        return cls(
            data=Path(found.data),
            run=Path(found.run),
            cache=Path(found.cache),
            images=images,
            templates=Path(templates).absolute() if templates else None,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What another process has to be told to find the same places, where its environment is ours otherwise."""
        return {"QMPSNAP_HOME": str(self.data)} if self.beneath else {}

    @property
    def beneath(self) -> bool:
        """Whether all lies under one folder, as ``QMPSNAP_HOME`` has it."""
        return self.run == self.data / "run" and self.cache == self.data / "cache"

    @property
    def store(self) -> Path:
        """The store's file."""
        return self.data / "qmpsnap.db"

    @property
    def machines(self) -> Path:
        """The folder with one folder of images per machine."""
        return self.data / "machines"

    @property
    def quarantines(self) -> tuple[Path, Path]:
        """The folders that ``check --repair`` moves files to; the second where images lie on a disk of their own."""
        return self.data / "quarantine", self.machines / ".quarantine"  # no machine has such a name

    @property
    def guest(self) -> Path:
        """Kernel and initrd of the small guest (``launch/guest/build``); ``@guest/`` in a spec."""
        return self.cache / "guest"

    def machine_dir(self, machine: str) -> Path:
        """The folder of one machine's images."""
        return self.machines / machine

    def unpacked(self, machine: str) -> Path:
        """Where a machine's files are unpacked to, until all of them are proven; no machine has such a name."""
        return self.machines / f".{machine}.unpacked"

    def record(self, machine: str) -> Path:
        """The machine's record beside its images."""
        return self.machine_dir(machine) / RECORD

    def active(self, machine: str) -> tuple[Path, ...]:
        """Of an adopted machine: which images its owner has to start, for a shell and as JSON."""
        return tuple(self.machine_dir(machine) / name for name in ACTIVE)

    def lock(self, machine: str) -> Path:
        """The machine's lock: beside the store, so that all who share that share the lock, wherever sockets are."""
        return self.data / "locks" / machine

    def variables(self, machine: str) -> Path:
        """The machine's own UEFI variable store, where it has one."""
        return self.machine_dir(machine) / VARIABLES

    def tpm(self, machine: str) -> Path:
        """The folder in which the emulator of the machine's TPM works."""
        return self.machine_dir(machine) / TPM

    def variables_copy(self, machine: str, operation: OperationId, *, tpm: bool) -> Path:
        """Where that operation copies the UEFI variable store to; with the state of a TPM beside it."""
        return self.machine_dir(machine) / f"vars-{operation}{WITH_TPM if tpm else ''}.fd"

    def variables_taken(self, machine: str, operation: OperationId, *, tpm: bool) -> Path:
        """Where that ``snapshot create`` copies it to: not what was active before a revert, but what it has taken."""
        return self.machine_dir(machine) / f"vars-at-{operation}{WITH_TPM if tpm else ''}.fd"

    def run_dir(self, machine: str) -> Path:
        """The folder of one machine's sockets; QEMU's working directory."""
        return self.run / machine

    def log_dir(self, machine: str) -> Path:
        """The folder of what one machine's QEMU and guest say: the run folder's file system is often memory."""
        return self.data / "logs" / machine
