"""Root's QEMU as a user of its own, through everything that opens a file; and as root, with few capabilities."""

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image.create import ImageTool
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, UsageError
from qmpsnap.host import acl
from qmpsnap.machine.starting import privileges
from qmpsnap.model.machines.spec import DiskSpec, Encryption, NicSpec
from tests.live.machine import MIB, ONE_DISK, context_of, fill, grown, hold_invariants, snapshot_hashes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run QEMU as another user")

USER = "nobody"
QEMU = shutil.which(os.environ.get("QMPSNAP_QEMU") or "qemu-system-x86_64") or ""
UID = 65534


@pytest.fixture
def as_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    user = privileges.RunAs.named(USER)
    assert user
    if privileges.obstacle(user, QEMU, write=False):
        pytest.skip(f"{USER} cannot run {QEMU}")
    monkeypatch.setenv(privileges.VARIABLE, USER)
    return home


@pytest.fixture
async def q(as_nobody: Path) -> AsyncIterator[qmpsnap.Controller]:
    assert as_nobody.is_dir()
    async with qmpsnap.open() as controller:
        yield controller


def status_of(vm: qmpsnap.MachineHandle) -> dict[str, list[str]]:
    context = context_of(vm)
    process = context.process(context.store.machine(vm.name))
    assert process
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {line.split(":")[0]: line.split()[1:] for line in lines}


def numbers(mask: str) -> frozenset[int]:
    return frozenset(number for number in range(64) if int(mask, 16) >> number & 1)


def capabilities(vm: qmpsnap.MachineHandle, kind: str) -> frozenset[int]:
    return numbers(status_of(vm)[kind][0])


def ours() -> frozenset[int]:
    """What we have ourselves, which in a container is not all."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return numbers(next(line.split()[1] for line in lines if line.startswith("CapBnd:")))


def require_nobody(vm: qmpsnap.MachineHandle) -> None:
    status = status_of(vm)
    assert status["Uid"] == [str(UID)] * 4
    assert "0" not in (*status["Gid"], *status.get("Groups", []))
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert capabilities(vm, kind) == frozenset(), kind
    assert status["Seccomp"] == ["2"]


async def running(vm: qmpsnap.MachineHandle) -> None:
    if not await vm.is_running():
        await vm.start(paused=True)
    require_nobody(vm)


async def test_the_whole_life_of_a_machine_as_another_user(q: qmpsnap.Controller, place: Path) -> None:
    vm = await grown(q, "s1", "s2")
    require_nobody(vm)
    await vm.resume()  # whose memory is saved while it stands still, as userfaultfd needs root
    full = await vm.snapshot("full", kind="full")
    assert full.vmstate
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "0":
        assert full.vmstate.mode == "stopped"
    await fill(vm, "vda", 7, offset=9 * MIB)
    before = await snapshot_hashes(vm)
    await vm.snapshot("inside", kind="internal")
    await fill(vm, "vda", 8, offset=9 * MIB)
    for name in ("s1", "full", "inside"):
        await vm.revert(name)
        await running(vm)
        await hold_invariants(vm, before)
    await vm.delete_snapshots("inside")
    await vm.snapshot("s3")
    before = await snapshot_hashes(vm)
    await vm.stream("vda")
    require_nobody(vm)
    await hold_invariants(vm, before)
    await vm.delete_snapshots("s2")
    await vm.mirror("vda", place / "copy.qcow2", mode="pivot")
    require_nobody(vm)
    await vm.snapshot("s4")
    await vm.commit("vda", base="s4", consume=True)
    require_nobody(vm)
    done = await vm.check(repair=True)
    assert (done.findings, done.repaired) == ((), ())
    await vm.stop(force=True)
    await vm.delete_snapshots("s3")  # by a worker
    await hold_invariants(vm)


async def test_encrypted_disks_reach_it_and_so_do_its_variables(q: qmpsnap.Controller, place: Path) -> None:
    (place / "key").write_bytes(b"k" * 32)
    (place / "key").chmod(0o600)
    disk = DiskSpec(name="vda", size=4 * MIB, encryption=Encryption(secret_file=str(place / "key")))
    vm = await q.define(replace(ONE_DISK, disks=(disk,), firmware="uefi"))
    await vm.start(paused=True)
    require_nobody(vm)
    await fill(vm, "vda", 5)
    await vm.snapshot("s1")
    await fill(vm, "vda", 6)
    await vm.revert("s1", state="paused")
    require_nobody(vm)
    await vm.stop(force=True)
    await hold_invariants(vm)


async def test_a_clone_reads_its_original_and_cannot_write_to_it(q: qmpsnap.Controller) -> None:
    original = await grown(q, "s1")
    await original.stop(force=True)
    layer = next(point.layer for point in (await original.snapshots())[0].points)
    base = context_of(original).store.layer(layer)
    vm = await q.define(replace(ONE_DISK, name="clone", disks=(DiskSpec(name="vda", base=base.path),)))
    with_both = acl.rights(base.path, Path(base.path).stat().st_mode).users
    assert with_both == {UID: acl.READ | acl.WRITE}
    descriptor = os.open(base.path, os.O_RDONLY)
    acl.revoke(descriptor)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)
    await vm.start(paused=True)
    require_nobody(vm)
    assert acl.rights(base.path, Path(base.path).stat().st_mode).users == {UID: acl.READ}


async def test_what_is_not_ours_it_has_to_reach_by_itself(q: qmpsnap.Controller, place: Path) -> None:
    image = place / "theirs" / "base.qcow2"
    image.parent.mkdir(mode=0o700)
    await ImageTool(context_of(await q.define(replace(ONE_DISK, name="other"))).image.binary).create_base(
        str(image), format="qcow2", virtual_size=4 * MIB
    )
    outside = DiskSpec(name="vda", base=str(image))
    vm = await q.define(replace(ONE_DISK, disks=(outside,)))
    mode = image.stat().st_mode
    with pytest.raises(HostCannot, match=f"user {USER} .* has no permission to read {image}") as refused:
        await vm.start(paused=True)
    assert refused.value.hint == f"setfacl -m u:{USER}:r {image}"
    assert (image.stat().st_mode, await vm.is_running()) == (mode, False)
    descriptor = os.open(image, os.O_RDONLY)
    acl.grant(descriptor, UID, acl.READ)
    os.close(descriptor)
    await vm.start(paused=True)
    require_nobody(vm)


@pytest.mark.usefixtures("as_nobody")
async def test_a_running_one_is_served_by_commands_that_do_not_know_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with qmpsnap.open() as q:
        await grown(q, "s1")
    monkeypatch.delenv(privileges.VARIABLE)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.snapshot("s2")
        require_nobody(vm)
        await hold_invariants(vm)
        await vm.delete_snapshots("s1")
        await hold_invariants(vm)
        await vm.stop(force=True)
        found = {finding.code for finding in (await vm.check()).findings}
        assert found == {"mode-open"}  # another user is named in its files, whom no QEMU needs any more
        done = await vm.check(repair=True)
        assert done.findings == ()
        assert Path(context_of(vm).home.run_dir("still")).stat().st_mode & 0o777 == 0o700
        await vm.start(paused=True)
        assert status_of(vm)["Uid"] == ["0"] * 4
        await vm.stop(force=True)
    monkeypatch.setenv(privileges.VARIABLE, USER)
    async with qmpsnap.open() as q:
        vm = await q.machine("still")
        await vm.start(paused=True)  # with what root's has left in the run folder
        require_nobody(vm)
        await hold_invariants(vm)


async def test_it_cannot_replace_what_is_roots_in_its_run_folder(q: qmpsnap.Controller) -> None:
    vm = await grown(q, "s1")
    home = context_of(vm).home
    folder, logs = home.run_dir("still"), home.log_dir("still")
    user = privileges.RunAs.named(USER)
    assert user

    def act() -> None:
        (folder / "mine").touch()
        (folder / "mine").unlink()
        for ours in (folder / "worker", logs / "qemu.log", logs / "console.log"):
            with pytest.raises(PermissionError):
                ours.rename(ours.with_name("gone"))
        with pytest.raises(PermissionError):
            (folder.parent.parent / "qmpsnap.db").open("rb")

    (folder / "worker").mkdir(exist_ok=True)
    privileges._apart(lambda: privileges._become(user), act)


@pytest.mark.usefixtures("home")
async def test_as_root_it_has_only_what_its_devices_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not privileges._is_machine_code(QEMU):
        pytest.skip(f"{QEMU} is a wrapper")
    user_nic = NicSpec(kind="user")
    async with qmpsnap.open() as q:
        vm = await grown(q, "s1")
        assert capabilities(vm, "CapEff") == capabilities(vm, "CapBnd") == ours() & {1, 2, 14, 19, 24}
        assert capabilities(vm, "CapInh") == frozenset()
        await vm.resume()
        full = await vm.snapshot("full", kind="full")
        assert full.vmstate
        assert full.vmstate.mode == "background"
        await hold_invariants(vm)
        other = await q.define(replace(ONE_DISK, name="net", nics=(user_nic,)))
        await other.start(paused=True)
        assert capabilities(other, "CapEff") == ours() & {1, 2, 10, 13, 14, 19, 24}
        extra = await q.define(replace(ONE_DISK, name="extra", extra=("-L", "/nowhere")), allow_extra=True)
        await extra.start(paused=True)
        assert ours() & {0, 21} <= capabilities(extra, "CapEff")
        assert not {16, 22, 25} & capabilities(extra, "CapEff")
    wrapper = tmp_path / "qemu"
    wrapper.write_text('#!/bin/sh\nexec qemu-system-x86_64 "$@"\n')
    wrapper.chmod(0o700)
    before = Path("/proc/self/status").read_text()
    monkeypatch.setenv("QMPSNAP_QEMU", str(wrapper))
    async with qmpsnap.open() as q:
        vm = await q.define(replace(ONE_DISK, name="wrapped"))
        await vm.start(paused=True)
        assert capabilities(vm, "CapEff") == ours()
    assert [line for line in before.splitlines() if line.startswith("Cap")] == [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Cap")
    ]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("wanted", "said"), [("no such user", "does not exist"), ("0", "names root"), ("", "")])
async def test_who_is_named_must_be_there_and_not_root(monkeypatch: pytest.MonkeyPatch, wanted: str, said: str) -> None:
    monkeypatch.setenv(privileges.VARIABLE, wanted)
    if not said:
        async with qmpsnap.open() as q:
            assert q.context.run_as is None
        return
    with pytest.raises(UsageError, match=said):
        async with qmpsnap.open():
            pass


async def test_show_and_doctor_name_the_user_and_what_is_lost(
    q: qmpsnap.Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    import anyio

    await grown(q, "s1")
    capsys.readouterr()
    for words in (["show", "still"], ["doctor"]):
        await anyio.to_thread.run_sync(main, words)
        said = capsys.readouterr().out
        assert USER in said
        if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "0":
            assert "background snapshots, as userfaultfd needs root" in said


async def test_forks_map_their_memory_as_that_user(q: qmpsnap.Controller) -> None:
    vm = await q.define(ONE_DISK)
    await vm.start()
    await vm.snapshot("warm", kind="full")
    for fork in await vm.fork("warm", count=2):
        child = await q.machine(fork.machine.name)
        assert status_of(child)["Uid"][0] == str(UID)
        assert await child.state() == "running"
        await hold_invariants(child)
