"""Which accelerator is chosen, on hosts that are made of files here, with QEMUs that are scripts."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpsnap.errors import HostCannot
from qmpsnap.machine.starting import accel
from qmpsnap.machine.starting.accel import choose, kvm_obstacle, tsc_khz, vcpu_runs
from qmpsnap.machine.starting.argv import TSC_KHZ
from qmpsnap.model.machines.spec import Accel

INTEL = "processor\t: 0\nflags\t\t: fpu vmx sse2\ncpu MHz\t\t: 2399.998\n"
PLAIN = "processor\t: 0\nflags\t\t: fpu sse2 xsvmx\nbugs\t\t: vmx\n"

Fake = Callable[[str], str]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """``fake(script)``: a QEMU that does what the shell script says and counts how often it was run."""

    def write(script: str) -> str:
        path = tmp_path / "fake-qemu"
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/runs\n{script}\n')
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host against whose KVM nothing speaks, in files of this folder."""
    (tmp_path / "kvm").touch()
    (tmp_path / "cpuinfo").write_text(INTEL)
    monkeypatch.setattr(
        accel.kvm_obstacle,
        "__kwdefaults__",
        {"device": tmp_path / "kvm", "cpuinfo": tmp_path / "cpuinfo", "user": None},
    )
    return tmp_path


def runs(folder: Path) -> int:
    record = folder / "runs"
    return len(record.read_text().splitlines()) if record.exists() else 0


# --- what can be told without trying --------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_with_the_device_and_the_flag_nothing_speaks_against_kvm(host: Path, flag: str) -> None:
    (host / "cpuinfo").write_text(INTEL.replace("vmx", flag))
    assert kvm_obstacle() == ""


def test_without_the_device_kvm_is_missing(host: Path) -> None:
    (host / "kvm").unlink()
    assert kvm_obstacle() == f"{host}/kvm is missing"


def test_with_a_device_but_without_the_cpus_flag_the_device_is_not_trusted(host: Path) -> None:
    (host / "cpuinfo").write_text(PLAIN)
    assert "neither vmx nor svm" in kvm_obstacle()


def test_a_device_that_may_not_be_opened_is_an_obstacle(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may open everything
    assert "cannot be opened by this user" in kvm_obstacle()


@pytest.mark.parametrize(("text", "khz"), [(INTEL, 2_399_998), (PLAIN, TSC_KHZ), ("", TSC_KHZ)])
def test_the_counters_rate_is_the_cpus_or_an_assumed_one(host: Path, text: str, khz: int) -> None:
    (host / "cpuinfo").write_text(text)
    assert tsc_khz(cpuinfo=host / "cpuinfo") == khz


# --- trying ---------------------------------------------------------------------------------------------------------


async def test_under_tcg_the_real_qemu_runs_a_virtual_cpu() -> None:
    qemu = shutil.which(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64")
    if qemu is None:
        if os.environ.get("CI"):
            pytest.fail("QEMU is missing; in CI this test must run")
        pytest.skip("QEMU is not installed")
    assert await vcpu_runs("tcg", qemu=qemu, deadline=30)


async def test_a_first_byte_is_enough(fake: Fake, tmp_path: Path) -> None:
    assert await vcpu_runs("kvm", qemu=fake("echo x; exec sleep 60"), deadline=30)
    assert "-accel kvm" in (tmp_path / "runs").read_text()


async def test_a_qemu_that_prints_nothing_does_not_run_and_is_ended(fake: Fake, tmp_path: Path) -> None:
    before = time.monotonic()
    assert not await vcpu_runs("kvm", qemu=fake(f"echo $$ > {tmp_path}/pid; exec sleep 60"), deadline=0.3)
    assert time.monotonic() - before < 30
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


async def test_a_qemu_that_ends_at_once_without_a_word_does_not_run(fake: Fake) -> None:
    for _ in range(5):
        assert not await vcpu_runs("kvm", qemu=fake("echo no kvm >&2; exit 1"), deadline=30)


async def test_a_qemu_that_is_not_there_is_the_hosts_trouble() -> None:
    with pytest.raises(HostCannot, match="/no/such/qemu cannot be run") as caught:
        await vcpu_runs("kvm", qemu="/no/such/qemu")
    assert caught.value.exit_code == 9


# --- choosing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["kvm", "tcg"])
async def test_what_the_spec_asks_for_is_taken_at_its_word(tmp_path: Path, asked: Accel) -> None:
    assert (await choose(asked, qemu="/no/such/qemu", cache=tmp_path)).accel == asked


async def test_where_something_speaks_against_kvm_it_is_tcg_without_trying(host: Path, fake: Fake) -> None:
    (host / "kvm").unlink()
    choice = await choose("auto", qemu=fake("echo x"), cache=host / "cache")
    assert (choice.accel, choice.reason) == ("tcg", f"{host}/kvm is missing")
    assert runs(host) == 0


@pytest.mark.parametrize(("script", "chosen"), [("echo x; exec sleep 60", "kvm"), ("exit 1", "tcg")])
async def test_else_the_probe_decides_and_its_answer_is_kept(host: Path, fake: Fake, script: str, chosen: str) -> None:
    for _ in range(3):
        assert (await choose("auto", qemu=fake(script), cache=host / "cache")).accel == chosen
    assert runs(host) == 1
    assert [kept.name for kept in (host / "cache").iterdir()] == ["kvm-probe.json"]


@pytest.mark.parametrize(
    "changed",
    [{"boot": "another boot"}, {"qemu": "/another/qemu"}, {"runs": None, "boot": None}],
    ids=["boot", "binary", "nonsense"],
)
async def test_an_answer_of_another_boot_or_another_qemu_is_dropped(
    host: Path, fake: Fake, changed: dict[str, str | None]
) -> None:
    qemu = fake("echo x; exec sleep 60")
    cache = host / "cache"
    await choose("auto", qemu=qemu, cache=cache)
    kept = json.loads((cache / "kvm-probe.json").read_text())
    (cache / "kvm-probe.json").write_text(json.dumps(kept | {"runs": False} | changed))
    assert (await choose("auto", qemu=qemu, cache=cache)).accel == "kvm"
    assert runs(host) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "{}"])
async def test_an_answer_that_cannot_be_read_is_asked_for_again(host: Path, fake: Fake, content: str) -> None:
    (host / "cache").mkdir()
    (host / "cache" / "kvm-probe.json").write_text(content)
    assert (await choose("auto", qemu=fake("echo x; exec sleep 60"), cache=host / "cache")).accel == "kvm"
