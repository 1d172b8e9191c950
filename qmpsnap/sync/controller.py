"""All machines of one home, for programs without asyncio.

Written by tests/api/sync_api.py from the source of ``qmpsnap.api``, whose docstrings say more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qmpsnap.sync.runner import Opened

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from qmpsnap.api.plans import Plan
    from qmpsnap.model.machines.spec import MachineSpec
    from qmpsnap.model.operations.operation import DefinePlan, Operation
    from qmpsnap.ops.adoption.adopt import Survey
    from qmpsnap.ops.fork.upkeep import Pruned, Shelved
    from qmpsnap.sync.machine import MachineHandle

R = TypeVar("R")


class Controller(Opened):
    """:class:`qmpsnap.Controller` without ``await``."""

    def templates(self) -> tuple[Shelved, ...]:
        """The templates of snapshots' memory that forks share, by folder; the one that is removed first, first."""
        return self._call(self._controller.templates())

    def prune_templates(self, *, all: bool = False) -> Pruned:
        """Remove the templates that no running fork maps."""
        return self._call(self._controller.prune_templates(all=all))

    def plan_prune_templates(self, *, all: bool = False) -> Plan[Pruned, Pruned]:
        """What :meth:`prune_templates` would remove now."""
        return self._call(self._controller.plan_prune_templates(all=all))

    def machines(self) -> tuple[MachineHandle, ...]:
        """Every machine of the store, by name."""
        return self._call(self._controller.machines())

    def machine(self, name: str) -> MachineHandle:
        """The machine of that name."""
        return self._call(self._controller.machine(name))

    def recover(self, name: str) -> list[Operation]:
        """End what is open of a machine, or of a name where define or undefine died; returns it as it was."""
        return self._call(self._controller.recover(name))

    def read_spec(self, path: str | os.PathLike[str]) -> MachineSpec:
        """A spec file as a value."""
        return self._now(self._controller.read_spec(path))

    def define(
        self,
        spec: MachineSpec | str | os.PathLike[str],
        *,
        folders: Sequence[Path] = (),
        allow_extra: bool = False,
        exist_ok: bool = False,
    ) -> MachineHandle:
        """Record a machine and create its disks."""
        return self._call(self._controller.define(spec, folders=folders, allow_extra=allow_extra, exist_ok=exist_ok))

    def plan_define(
        self, spec: MachineSpec | str | os.PathLike[str], *, folders: Sequence[Path] = (), allow_extra: bool = False
    ) -> Plan[DefinePlan, MachineHandle]:
        """What :meth:`define` would do now; refused as that would be."""
        return self._call(self._controller.plan_define(spec, folders=folders, allow_extra=allow_extra))

    def adopt(self, name: str, socket: str | os.PathLike[str], *, own: bool = False) -> MachineHandle:
        """Take over a QEMU that somebody else launched; it does not notice."""
        return self._call(self._controller.adopt(name, socket, own=own))

    def plan_adopt(
        self, name: str, socket: str | os.PathLike[str], *, own: bool = False
    ) -> Plan[tuple[Survey, DefinePlan], MachineHandle]:
        """What :meth:`adopt` would find (``details``) and record now; refused as that would be."""
        return self._call(self._controller.plan_adopt(name, socket, own=own))

    def apply(self, plan: Plan[Any, R]) -> R:
        """Carry a plan out, also one of a machine's: see :meth:`MachineHandle.apply`."""
        return self._call(self._controller.apply(plan))
