"""Forks of a booted guest: machines that go on from its memory, which they share until they write to it."""

import json

import pytest
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.errors import StateError
from qmpsnap.machine import templates
from qmpsnap.machine.starting import argv, host_fit
from qmpsnap.model.machines.spec import MachineSpec, NicSpec
from tests.live import test_full
from tests.live.booted import BOOT, start_booted
from tests.live.machine import context_of, hold_invariants

pytestmark = pytest.mark.version

FILL = """
dd if=/dev/urandom of=/dev/shm/noise bs=1M count=24 2>/dev/null
mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo parent >/mnt/who && sync
sha256sum /dev/shm/noise
"""

WHO = """
cat /sys/class/net/eth0/address
hostname
head -c 32 /dev/urandom | sha256sum
cat /proc/sys/kernel/random/uuid
"""
"""What twins say alike, a line each."""


async def said(vm: qmpsnap.MachineHandle, command: str) -> str:
    return (await vm.run(command)).stdout


async def who(vm: qmpsnap.MachineHandle) -> list[str]:
    """What no two machines may have alike: hostname, random numbers, and the generation."""
    names = await said(vm, "hostname; head -c 32 /dev/urandom | sha256sum")
    return [*names.splitlines(), (await vm.record()).guid]


async def warm(q: qmpsnap.Controller, spec: MachineSpec) -> tuple[qmpsnap.MachineHandle, str]:
    """A running guest with noise in its memory, its full snapshot `warm`, and the digest of the noise."""
    vm = await q.define(spec)
    await start_booted(vm)
    digest = await said(vm, FILL)
    await vm.snapshot("warm", kind="full")
    return vm, digest


async def test_a_fork_has_its_parents_memory_and_disks_of_its_own(
    q: qmpsnap.Controller, guest_spec: MachineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    vm, digest = await warm(q, guest_spec)
    await vm.run("echo later >/mnt/who; sync")
    assert await to_thread.run_sync(main, ["fork", "guest@warm", "-n", "2", "-o", "json"]) == 0
    forks = json.loads(capsys.readouterr().out)["forks"]
    assert [fork["machine"] for fork in forks] == ["guest-f1", "guest-f2"]
    for fork in forks:
        child = await q.machine(fork["machine"])
        assert await said(child, "sha256sum /dev/shm/noise") == digest
        assert await said(child, "cat /mnt/who") == "parent\n"
        await said(child, f"echo {child.name} >/mnt/who; sync; dd if=/dev/urandom of=/dev/shm/noise bs=1M count=24")
        await hold_invariants(child)
    assert await said(vm, "cat /mnt/who") == "later\n"
    assert await said(vm, "sha256sum /dev/shm/noise") == digest
    (shelf,) = templates.shelves(context_of(vm).home)
    (template,) = shelf.all()
    with shelf.opened(template.key) as found:
        assert found
        assert templates.digest_of(found[1]) == template.digest  # all that the forks have written is their own
    await hold_invariants(vm)


async def test_a_fork_is_a_machine_that_can_be_snapshotted_reverted_forked_and_saved(
    q: qmpsnap.Controller, guest_spec: MachineSpec
) -> None:
    vm, digest = await warm(q, guest_spec)
    (fork,) = await vm.fork("warm", "child")
    child = await q.machine("child")
    assert fork.background == ""
    await said(child, "echo child >/dev/shm/who; echo child >/mnt/who; sync")
    taken = await child.snapshot("own", kind="full")
    assert taken.vmstate
    assert taken.vmstate.mode == "background"  # its memory is a private mapping of a file on a tmpfs
    await said(child, "echo later >/dev/shm/who")
    await vm.delete_snapshots("warm")  # which the child still reads
    await child.fork("own", "grandchild")
    grandchild = await q.machine("grandchild")
    assert await said(grandchild, "cat /dev/shm/who /mnt/who; sha256sum /dev/shm/noise") == f"child\nchild\n{digest}"
    await child.revert("own")
    assert await said(child, "cat /dev/shm/who /mnt/who; sha256sum /dev/shm/noise") == f"child\nchild\n{digest}"
    await grandchild.save()
    await grandchild.restore()
    assert await said(grandchild, "cat /dev/shm/who; sha256sum /dev/shm/noise") == f"child\n{digest}"
    for one in (vm, child, grandchild):
        await hold_invariants(one)
    for one in (grandchild, child):
        await one.stop(force=True)
        await one.undefine(disks="remove")
    await hold_invariants(vm)


async def test_a_running_machine_is_branched_with_a_snapshot_taken_for_it(
    q: qmpsnap.Controller, guest_spec: MachineSpec
) -> None:
    vm, digest = await warm(q, guest_spec)
    await said(vm, "echo now >/dev/shm/who")
    (fork,) = await vm.fork(description="before the upgrade")
    child = await q.machine(fork.machine.name)
    assert fork.taken
    assert fork.snapshot.description == "before the upgrade"
    assert await said(child, "cat /dev/shm/who; sha256sum /dev/shm/noise") == f"now\n{digest}"
    await child.stop(force=True)
    await child.start(paused=True)  # with memory of its own, and an identity of QEMU's
    await hold_invariants(child)
    await vm.stop(force=True)
    with pytest.raises(StateError, match="is stopped and has no memory to save"):
        await vm.fork()


@pytest.mark.parametrize("branches", [3, pytest.param(20, marks=pytest.mark.grid)])
async def test_a_guest_that_counts_is_branched_and_each_branch_is_consistent(
    q: qmpsnap.Controller, guest_spec: MachineSpec, branches: int
) -> None:
    vm = await test_full.booted(q, guest_spec)
    identities: list[list[str]] = []
    for number in range(branches):
        (fork,) = await vm.fork(name=f"branch-{number}", identity="fresh", ephemeral=True)
        child = await q.machine(fork.machine.name)
        await test_full.counted(child, await test_full.count(child) + 2)  # it goes on where it was
        await test_full.require_a_whole_disk(child)
        identities.append(await who(child))
        await child.stop(force=True)
        await vm.delete_snapshots(fork.snapshot.name)
    identities.append(await who(vm))
    assert [len(set(alike)) for alike in zip(*identities, strict=True)] == [branches + 1] * 3
    await test_full.counted(vm, await test_full.count(vm) + 2)
    await test_full.require_a_whole_disk(vm)
    await hold_invariants(vm)


async def test_a_fresh_identity_has_nothing_of_its_twins(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm, _ = await warm(q, replace(guest_spec, nics=(NicSpec(),), identity_hook="echo new >/dev/shm/keys"))
    twins = [(await q.machine(fork.machine.name)) for fork in await vm.fork("warm", "twin", count=2)]
    fresh = [(await q.machine(fork.machine.name)) for fork in await vm.fork("warm", count=2, identity="fresh")]
    who = {child.name: (await said(child, WHO)).splitlines() for child in (*twins, *fresh)}
    assert who["twin-1"][:2] == who["twin-2"][:2]
    for child in fresh:
        assert await said(child, "cat /dev/shm/keys") == "new\n"
        origin = (await child.record()).origin
        assert origin
        assert (origin.identity, origin.lacks) == ("fresh", ())
        for line, of_twin in zip(who[child.name], who["twin-1"], strict=True):
            assert line != of_twin
    assert not set(who["guest-f1"]).intersection(who["guest-f2"])


async def test_twins_are_kept_off_a_network_that_they_share_until_they_have_an_identity(
    q: qmpsnap.Controller, guest_spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test's host need have no bridge: to QEMU the backend is another, and to qmpsnap it is shared.
    monkeypatch.setattr(argv, "_backend", lambda _: {"type": "user"})
    monkeypatch.setattr(host_fit, "_nic", lambda *_: iter(()))
    vm = await q.define(replace(guest_spec, nics=(NicSpec(kind="bridge", bridge="br0"),)))
    await vm.start()
    await vm.run("true", timeout=BOOT)
    await vm.snapshot("warm", kind="full")
    carrier = "ip link set eth0 up; cat /sys/class/net/eth0/carrier"
    await vm.fork("warm", "twin")
    await vm.fork("warm", "fresh", identity="fresh")
    assert await said(vm, carrier) == "1\n"
    twin, fresh = await q.machine("twin"), await q.machine("fresh")
    assert await said(twin, carrier) == "0\n"
    assert await said(fresh, carrier) == "1\n"
    await twin.snapshot("own", kind="full")
    await twin.revert("own")  # another QEMU, into which the parent's addresses are loaded once more
    assert await said(twin, carrier) == "0\n"


async def test_what_keeps_its_identity_is_a_twin_and_said_to_be_one(
    q: qmpsnap.Controller, guest_spec: MachineSpec
) -> None:
    vm, _ = await warm(q, replace(guest_spec, identity_hook="echo no such key; exit 3"))
    with pytest.raises(StateError, match="fork guest-f1 still has the identity of guest@warm: hook: no such key") as no:
        await vm.fork("warm", identity="fresh")
    assert (no.value.effect, no.value.exit_code) == ("applied", 4)
    origin = (await (await q.machine("guest-f1")).record()).origin
    assert origin
    assert (origin.identity, origin.lacks) == ("twin", ("hook: no such key",))
