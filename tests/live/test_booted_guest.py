"""A booted Linux guest: what it wrote before a snapshot is in the snapshot, what it writes after is not."""

import hashlib
from pathlib import Path

import anyio
import pytest

import qmpsnap
from qmpsnap.block.image import content
from qmpsnap.cli.main import main
from qmpsnap.errors import QmpError
from qmpsnap.machine import console
from qmpsnap.machine.starting.run_files import CONSOLE_SOCKET
from qmpsnap.model.machines.spec import MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.qmp.dial import dial
from tests.live.booted import start_booted
from tests.live.machine import MIB, context_of, hold_invariants

WRITE = "test -b /dev/{0} && dd if=/dev/urandom of=/dev/{0} bs=1M count=2 conv=fsync 2>/dev/null && dd if=/dev/{0} bs=1M count=2 2>/dev/null | sha256sum | cut -c1-64"  # noqa: E501


async def first_hash(vm: qmpsnap.MachineHandle, layer: LayerId, folder: Path) -> str:
    """What the guest would hash of a frozen layer: its first 2 MiB."""
    copy = folder / "copy"
    await content.copy_out(
        context_of(vm).store.layer(layer), copy, length=2 * MIB, qemu_img=context_of(vm).image.binary
    )
    return hashlib.sha256(copy.read_bytes()).hexdigest()


async def test_every_snapshot_holds_what_the_guest_said(
    q: qmpsnap.Controller, guest_spec: MachineSpec, tmp_path: Path
) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    said: dict[str, dict[str, str]] = {}
    for name in ("one", "two", "three"):
        said[name] = {disk: (await vm.run(WRITE.format(disk))).stdout.strip() for disk in ("vda", "vdb")}
        snapshot = await vm.snapshot(name, description=f"after {name}")
        assert snapshot.mode == "live"
        assert snapshot.pause_ms is not None
        await hold_invariants(vm)
    # The guest goes on as if nothing had happened: same boot, same content, disks still writable.
    again = (await vm.run("dd if=/dev/vda bs=1M count=2 2>/dev/null | sha256sum | cut -c1-64")).stdout.strip()
    assert again == said["three"]["vda"]
    await vm.run(WRITE.format("vda"))

    await vm.stop()
    assert await vm.state() == "stopped"
    for snapshot in await vm.snapshots():
        for point in snapshot.points:
            found = await first_hash(vm, point.layer, tmp_path)
            assert found == said[snapshot.name][point.disk], f"{snapshot.name} of {point.disk}"
    assert [s.parent for s in await vm.snapshots()] == [None, "one", "two"]
    await hold_invariants(vm)


async def test_what_the_guest_flushed_is_there_after_a_restart(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    await vm.run("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt && echo kept > /mnt/file && sync")
    await vm.snapshot("with-file")
    await vm.run("echo more > /mnt/later && sync")
    await vm.stop(force=True)
    await vm.start()
    await vm.run("e2fsck -fp /dev/vda || test $? -le 1")
    done = await vm.run("mkdir -p /mnt && mount /dev/vda /mnt && cat /mnt/file /mnt/later")
    assert done.stdout == "kept\nmore\n"
    await vm.stop()
    await hold_invariants(vm)


async def test_a_command_that_fails_in_the_guest_says_so(q: qmpsnap.Controller, guest_spec: MachineSpec) -> None:
    vm = await q.define(guest_spec)
    await start_booted(vm)
    with pytest.raises(QmpError, match="status 3"):
        await vm.run("echo no >&2; exit 3")
    done = await vm.run(["/bin/sh", "-c", "echo out; echo err >&2; exit 4"], check=False)
    assert (done.exit_status, done.stdout, done.stderr) == (4, "out\n", "err\n")


async def test_what_a_command_says_is_passed_on_whole_or_is_an_error(
    q: qmpsnap.Controller, guest_spec: MachineSpec, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    every = "".join(f"\\{byte:03o}" for byte in range(256))
    words = ["exec", "guest", "--", "printf", every]
    assert await anyio.to_thread.run_sync(main, words) == 0
    assert capfdbinary.readouterr().out == bytes(range(256))
    much = ["sh", "-c", "head -c 16777217 /dev/zero; exit 3"]
    assert await anyio.to_thread.run_sync(main, ["exec", "guest", "--", *much]) == 1
    out, err = capfdbinary.readouterr()
    assert (len(out), b"status 3 in the guest of guest, but its stdout is truncated" in err) == (16 << 20, True)


async def test_the_console_speaks_both_ways(q: qmpsnap.Controller, guest_spec: MachineSpec, tmp_path: Path) -> None:
    vm = await q.define(guest_spec)
    await vm.start()
    await vm.run("true")  # once the agent answers, the console's shell is up, too
    endpoint = await dial(context_of(vm).home.run_dir(vm.name) / CONSOLE_SOCKET)
    typed, heard = tmp_path / "typed", tmp_path / "heard"
    typed.write_bytes(b"echo $((40 + 2))-answer\n")
    with endpoint, typed.open("rb") as reading, heard.open("wb") as writing:
        await anyio.to_thread.run_sync(
            lambda: console.attach(endpoint, terminal_in=reading.fileno(), terminal_out=writing.fileno())
        )
    assert b"42-answer" in heard.read_bytes()
