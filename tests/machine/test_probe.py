"""What a QEMU can do is asked once, and again when the answer may be another."""

from pathlib import Path

import pytest

from qmpsnap.machine.starting import probe
from qmpsnap.machine.starting.probe import Abilities


async def test_the_answer_is_kept_until_rights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    answers = ["not supported by host kernel", ""]

    async def interrogate(_: str, *, user: object) -> Abilities:
        assert user is None
        return Abilities(
            version="7.2.22",
            background_snapshot=answers.pop(0),
            machine_types={},
            tcg_cpu="",
            vmgenid=True,
            cpu_models=(),
        )

    monkeypatch.setattr(probe, "interrogate", interrogate)
    monkeypatch.setattr(probe, "_userfaultfd", lambda _: "-u0")
    for _ in range(2):
        assert (await probe.ask(str(qemu), tmp_path)).background_snapshot == "not supported by host kernel"
    monkeypatch.setattr(probe, "_userfaultfd", lambda _: "-u1")  # sysctl vm.unprivileged_userfaultfd=1
    assert (await probe.ask(str(qemu), tmp_path)).background_snapshot == ""
