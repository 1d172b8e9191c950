"""A QEMU that systemd has not moved is started all the same, and everybody says where it is."""

import json
import os
from pathlib import Path

import pytest

from qmpsnap.cli.main import main
from qmpsnap.machine.starting import process as processes
from qmpsnap.machine.starting import scope

SPEC = {"name": "still", "memory": "64 MiB", "agent": False, "disks": [{"name": "vda", "size": "1 MiB"}]}


def test_a_systemd_that_refuses_costs_a_note(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "still.json").write_text(json.dumps(SPEC))
    (tmp_path / "busctl").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\nexit 1\n')
    (tmp_path / "busctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(scope, "SYSTEMD", tmp_path)
    monkeypatch.setattr(scope, "manager", lambda _: "system")
    assert main(["define", str(tmp_path / "still.json")]) == 0
    assert main(["start", "still"]) == 0
    assert "QEMU of machine still has no scope of its own" in capsys.readouterr().err
    assert "StartTransientUnit" in (tmp_path / "asked").read_text()
    assert main(["show", "still", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    process = processes.existing(shown["pid"])
    assert process
    assert shown["cgroup"] == scope.group(process)
    assert shown["logs"] == str(home / "logs" / "still")
    main(["doctor", "-o", "json"])
    abilities = {one["name"]: one for one in json.loads(capsys.readouterr().out)["abilities"]}
    assert abilities["scope"] == {"name": "scope", "ok": "yes", "detail": abilities["scope"]["detail"], "remedy": ""}
    assert abilities["logs"]["ok"] == "yes"
    (home / "logs" / "still" / "console.log").write_bytes(b"x" * (3 << 20))
    main(["doctor", "-o", "json"])
    abilities = {one["name"]: one for one in json.loads(capsys.readouterr().out)["abilities"]}
    assert abilities["logs"]["ok"] == "limited"
    assert "console.log (3 MiB)" in abilities["logs"]["detail"]
    assert main(["show", "still"]) == 0
    capsys.readouterr()
    assert (home / "logs" / "still" / "console.log").stat().st_size < 1 << 20
    monkeypatch.setattr(scope, "SYSTEMD", tmp_path / "none")
    main(["doctor", "-o", "json"])
    abilities = {one["name"]: one for one in json.loads(capsys.readouterr().out)["abilities"]}
    assert "systemd is not running" in abilities["scope"]["detail"]
    assert main(["stop", "still", "--force"]) == 0
