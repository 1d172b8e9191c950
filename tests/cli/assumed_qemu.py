"""A QEMU that is known without being run."""

from pathlib import Path

import pytest

from qmpsnap.machine.starting import probe
from qmpsnap.machine.starting.probe import Abilities


def assume(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if QEMU 7.2 had been asked: what is refused must be refused without running one."""

    async def ask(qemu: str, cache: Path, *, user: object = None) -> Abilities:
        types: dict[str, str | None] = {"pc-q35-7.2": "q35"}
        return Abilities(
            version="7.2.22",
            background_snapshot="",
            machine_types=types,
            tcg_cpu="",
            vmgenid=True,
            cpu_models=(),
        )

    monkeypatch.setattr(probe, "ask", ask)
