"""Encrypted disks: every layer is, whatever verb makes it, and the key is nowhere but in QEMU."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from msgspec.structs import replace

import qmpsnap
from qmpsnap.block.image import header
from qmpsnap.block.image.backing import set_backing
from qmpsnap.cli.main import main
from qmpsnap.errors import HostCannot, ImageRefused, StateError, UsageError
from qmpsnap.machine.starting import process
from qmpsnap.model.layers.blockdev import chain_options
from qmpsnap.model.layers.chain import Chain
from qmpsnap.model.machines.spec import DiskSpec, Encryption, MachineSpec
from qmpsnap.model.names import LayerId
from qmpsnap.ops.base import luks
from qmpsnap.qmp import session
from tests.live.machine import MIB, context_of, fill, hold_invariants, user_monitor

pytestmark = pytest.mark.timeout(300)  # QEMU measures the host for seconds of processor time for every image it makes

KEY = b"a-key-that-nobody-may-ever-see-0123456789"
OTHER = b"another-key-that-is-just-as-long-9876543210"
SECRET = "key"


@pytest.fixture
def spec(home: Path) -> MachineSpec:
    """A machine with an encrypted disk, whose key is in a file of its own."""
    keep(home / SECRET, KEY)
    disk = DiskSpec(name="vda", size=16 * MIB, encryption=Encryption(secret_file=str(home / SECRET)))
    return MachineSpec(name="vault", memory=64 * MIB, disks=(disk,))


def keep(file: Path, key: bytes) -> None:
    file.write_bytes(key)
    file.chmod(0o600)


async def clear(vm: qmpsnap.MachineHandle, layer: str, *, key: bytes = KEY) -> str:
    """SHA-256 of what a layer holds for the guest, opened with the key."""
    context, record = context_of(vm), await vm.record()
    chain = Chain("vda", context.store.forest().chain("vda", LayerId(layer)).layers)
    *_, top = nodes = chain_options(chain, record.spec.disks[0])
    for below, above in itertools.pairwise(nodes):
        above["backing"] = below
    for node in nodes:
        node["read-only"] = True
    assert all(node["encrypt"]["key-secret"] == "qs-secret-vda" for node in nodes)
    out = context.home.data / "clear"
    secret = context.home.data / "clear-key"
    keep(secret, key)
    argv = [context.image.binary, "convert", "-U", "--object", f"secret,id=qs-secret-vda,file={secret}", "-O", "raw"]
    await anyio.run_process([*argv, "json:" + json.dumps(top), str(out)])
    try:
        return hashlib.sha256(out.read_bytes()).hexdigest()
    finally:
        out.unlink()
        secret.unlink()


async def flush(vm: qmpsnap.MachineHandle) -> None:
    """Let an active layer's file hold what the guest has written."""
    async with user_monitor(vm) as qemu:
        drives: Any = await qemu.execute("query-block")
        line = f"qemu-io -d {drives[0]['qdev']} flush"
        assert not await qemu.execute("human-monitor-command", {"command-line": line})


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[list[bytes]]:
    """Everything that is ever told to a process or to a monitor: arguments, environments, QMP."""
    told: list[bytes] = []
    popen, execute, launched = subprocess.Popen.__init__, session.Session.execute, process.spawn

    def starting(self: Any, args: Any, *rest: Any, **named: Any) -> None:
        told.append(f"{args} {named.get('env')} {dict(os.environ)}".encode())
        popen(self, args, *rest, **named)

    async def saying(self: Any, command: str, arguments: Any = None, **rest: Any) -> Any:
        answer = await execute(self, command, arguments, **rest)
        told.append(f"{command} {arguments} {answer}".encode())
        return answer

    def spawning(argv: Any, run_dir: Path, **named: Any) -> Any:
        found = launched(argv, run_dir, **named)
        told.extend(Path(f"/proc/{found.pid}/{what}").read_bytes() for what in ("cmdline", "environ"))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "__init__", starting)
        patched.setattr(session.Session, "execute", saying)
        patched.setattr(process, "spawn", spawning)
        yield told
    assert any(b"qs-secret-vda" in one for one in told)
    # The store, its log, run folder, images, journal rows: every byte there is, but for the key's own file.
    told += [file.read_bytes() for file in home.rglob("*") if file.is_file() and file.name != SECRET]
    for part in (KEY, KEY[:12]):
        assert [one[:200] for one in told if part in one] == []


async def test_every_layer_of_an_encrypted_disk_is_encrypted_and_its_key_is_nowhere(
    q: qmpsnap.Controller, spec: MachineSpec, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with watched(monkeypatch, home):
        vm = await q.define(spec)
        await vm.start(paused=True)
        await fill(vm, "vda", 0x51)
        await vm.snapshot("s1")  # vda-2
        then = await clear(vm, "vda-1")
        await fill(vm, "vda", 0x52, offset=2 * MIB)
        await flush(vm)
        now = await clear(vm, "vda-2")
        await hold_invariants(vm)

        for refused in (vm.snapshot("ram", kind="full"), vm.save(), vm.snapshot("in", kind="internal")):
            with pytest.raises(StateError, match="is encrypted: ") as plain:
                await refused
            assert plain.value.effect == "none"
        for to_disk in (
            vm.mirror("vda", home / "copy", mode="finish", reuse=True),
            vm.mirror("vda", home / "copy", mode="finish", format="raw"),
        ):
            with pytest.raises(StateError, match="can only be copied to a new qcow2 image"):
                await to_disk

        await vm.stream("vda")  # vda-1 stays for s1, beside the live chain
        assert (await vm.chains())[0].ids == ("vda-2",)
        await vm.mirror("vda", home / "machines" / "vault" / "moved.qcow2", mode="pivot")
        await flush(vm)
        assert await clear(vm, (await vm.chains())[0].active.id) == now
        images = [file.read_bytes() for file in (home / "machines" / "vault").glob("*.qcow2")]
        assert len(images) == 2
        assert [held for held in images for pattern in (b"\x51", b"\x52") if pattern * 64 in held] == []
        assert (await vm.revert("s1")).state == "paused"
        assert await clear(vm, "vda-1") == then
        assert await clear(vm, (await vm.chains())[0].active.id) == then
        await hold_invariants(vm)
        keep(home / SECRET, OTHER)
        with pytest.raises(StateError, match="the secret does not open"):
            await vm.revert("s1")
        assert await vm.state() == "prelaunch"  # its QEMU was not ended for it
        keep(home / SECRET, KEY)
        await vm.stop(force=True)
        for words in (["show", "vault"], ["chain", "vault"], ["snapshot", "list", "vault", "-o", "json"]):
            assert await to_thread.run_sync(main, words) == 0
    said = capfd.readouterr()
    assert KEY.decode() not in said.out + said.err


async def test_a_stopped_machine_and_a_key_that_the_program_gives(
    home: Path, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges in a worker, headers rewritten without one; the spec names no file."""
    secret = home / SECRET
    secret.unlink()
    spec = replace(spec, disks=(replace(spec.disks[0], encryption=Encryption()),))
    with watched(monkeypatch, home):
        async with qmpsnap.open(secrets={"vault/vda": KEY}) as q:
            assert KEY.decode() not in f"{context_of(await q.define(spec))}"
            vm = await q.machine("vault")
            await vm.start(paused=True)
            await fill(vm, "vda", 0x51)
            await vm.stop(force=True)
            await vm.snapshot("s1")  # vda-2
            await vm.start(paused=True)
            await fill(vm, "vda", 0x52, offset=2 * MIB)
            await vm.stop(force=True)
            now = await clear(vm, "vda-2")
            base, top = context_of(vm).store.chains("vault")[0].layers
            other = replace(base, path=str(home / "elsewhere.qcow2"))
            shutil.copy(base.path, other.path)
            async with luks.for_images(context_of(vm), "vault", (await vm.record()).spec.disks[0]) as key:
                for below in (other, base):
                    await set_backing(top, below, qemu_img=context_of(vm).image.binary, key=key)
                    assert header.read(top.path).backing == below.path
            await vm.commit("vda", consume=True)
            assert (await vm.chains())[0].ids == ("vda-1",)
            assert await clear(vm, "vda-1") == now
            await vm.delete_snapshots("s1")  # consumed
            await hold_invariants(vm)
    async with qmpsnap.open() as q:
        with pytest.raises(UsageError, match="no secret was given") as missing:
            await (await q.machine("vault")).start()
        assert "secrets={'vault/vda': ...}" in missing.value.hint
    with pytest.raises(UsageError, match="the secret of vault/vda has 5 bytes"):
        async with qmpsnap.open(secrets={"vault/vda": b"short"}):
            pytest.fail("it was taken")


async def test_a_wrong_key_changes_nothing(q: qmpsnap.Controller, spec: MachineSpec, home: Path) -> None:
    secret, folder = home / SECRET, home / "machines" / "vault"
    vm = await q.define(spec)
    await vm.start(paused=True)
    before = sorted(file.name for file in folder.iterdir())
    keep(secret, OTHER)
    with pytest.raises(StateError, match=r"the secret does not open .*/vda-1\.qcow2; nothing was changed"):
        await vm.snapshot("s")
    await vm.stop(force=True)
    with pytest.raises(StateError, match="the secret does not open"):
        await vm.snapshot("s")
    with pytest.raises(StateError, match="the secret of disk vda of machine vault does not open its images"):
        await vm.start()
    assert [found.code for found in (await vm.check(deep=True)).findings] == ["image-unread"], "and not damaged"
    secret.chmod(0o644)
    with pytest.raises(HostCannot, match="is accessible to other users"):
        await vm.start()
    keep(secret, b"\xff" * 40)
    with pytest.raises(UsageError, match="is not UTF-8"):
        await vm.start()
    secret.unlink()
    with pytest.raises(HostCannot, match="No such file"):
        await vm.snapshot("s")
    assert sorted(file.name for file in folder.iterdir()) == before
    assert await vm.snapshots() == ()
    assert await vm.state() == "stopped"
    keep(secret, KEY)
    image = (await vm.chains())[0].active.path
    await vm.undefine(disks="keep")
    plain = replace(spec, disks=(DiskSpec(name="vda", image=image),))
    with pytest.raises(ImageRefused, match="is encrypted"):
        await q.define(plain)
    sealed = replace(spec, disks=(replace(spec.disks[0], size=None, image=image),))
    keep(secret, OTHER)
    with pytest.raises(StateError, match="the secret does not open"):
        await q.define(sealed)
    keep(secret, KEY)
    again = await q.define(sealed)
    await again.start(paused=True)
    await again.stop(force=True)
