"""Forks of a booted guest: machines that go on from its memory, which they share until they write to it."""

import json

import pytest
from anyio import to_thread

import qmpsnap
from qmpsnap.cli.main import main
from qmpsnap.machine import templates
from qmpsnap.model.machines.spec import MachineSpec
from tests.live.booted import start_booted
from tests.live.machine import context_of, hold_invariants

pytestmark = pytest.mark.version

FILL = """
dd if=/dev/urandom of=/dev/shm/noise bs=1M count=24 2>/dev/null
mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo parent >/mnt/who && sync
sha256sum /dev/shm/noise
"""


async def said(vm: qmpsnap.MachineHandle, command: str) -> str:
    done = await vm.run(command, deadline=60)
    assert done.status == 0, done
    return done.stdout.decode()


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
