"""What a machine needs of the host: told by `define`, refused by `start` before QEMU is launched."""

import socket
from pathlib import Path
from typing import Any

import pytest

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot
from qmpsnap.machine.starting import accel, host_fit
from qmpsnap.model.machines.spec import DiskSpec, Forward, MachineSpec, NicSpec
from tests.live.machine import MIB

pytestmark = pytest.mark.version

MISFITS: dict[str, dict[str, Any]] = {
    r"has no CPU model 'Haswel'; did you mean 'Haswell'": {"cpu": "Haswel,-rtm"},
    "has CPU host, which needs KVM": {"cpu": "host"},
    "has 16777216 MiB of memory, this host ": {"memory": 16 << 40},
    "this host has no bridge br-none": {"nics": (NicSpec(kind="bridge", bridge="br-none"),)},
    "needs KVM, and /nonexistent is missing": {"accel": "kvm"},
}


def spec(**keys: Any) -> MachineSpec:
    given: dict[str, Any] = {"memory": 64 * MIB, "disks": (DiskSpec(name="vda", size=MIB),)} | keys
    return MachineSpec(name="m", **given)


@pytest.mark.parametrize("said", MISFITS)
async def test_what_is_missing(said: str, q: qmpsnap.Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    if "KVM, and" in said:
        monkeypatch.setattr(accel.device_obstacle, "__defaults__", (Path("/nonexistent"),))
    vm = await q.define(spec(**MISFITS[said]))
    told = await vm.misfits()
    assert any(said in sentence for sentence in told) or MISFITS[said] == {"cpu": "host"}, told
    with pytest.raises(HostCannot) as refused:
        await vm.start(paused=True)
    assert said in refused.value.message
    assert not await vm.is_running()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_that_is_in_use(protocol: Any, home: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(type=socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            taken.listen()
        port = taken.getsockname()[1]
        (place / "m.yaml").write_text(
            "name: m\nmemory: 64M\ndisks: [{name: vda, size: 1M}]\n"
            f"nics: [{{kind: user, forwards: ['{port}:22/{protocol}']}}]\n"
        )
        assert main(["define", str(place / "m.yaml")]) == 0
        fact = f"{protocol.upper()} port {port} of 127.0.0.1, which machine m forwards, is in use"
        assert f"warning: a start would be refused: {fact}" in capsys.readouterr().err
        assert main(["start", "m", "--paused"]) == 9
        assert fact in capsys.readouterr().err
    assert main(["start", "m", "--paused"]) == 0
    assert main(["stop", "m", "--force"]) == 0


def test_ports_that_no_host_has() -> None:
    elsewhere = NicSpec(forwards=(Forward(host=2222, guest=22, address="192.0.2.1"),))
    (found,) = host_fit.look(spec(nics=(elsewhere,)), None, runs="tcg", user=None)
    assert "TCP port 2222 of 192.0.2.1, which machine m forwards, is on no interface" in found.fact
    assert list(host_fit.look(spec(), None, runs="tcg", user=None)) == []
