"""New images by the real qemu-img: exact, durable, ours alone; and nothing left behind when anything goes wrong."""

import asyncio
import gc
import hashlib
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from anyio import lowlevel
from msgspec.structs import replace

from qmpsnap.block.image import create, encrypted, header
from qmpsnap.block.image.create import ImageTool
from qmpsnap.errors import DeadlinePassed, HostCannot, ImageRefused, QmpsnapError, StateError, StoreMismatch
from qmpsnap.model.layers.chain import Layer
from qmpsnap.model.machines.spec import Format
from qmpsnap.model.names import LayerId

MIB = 1 << 20
Fake = Callable[[str], ImageTool]


@pytest.fixture
def qemu_img() -> str:
    found = shutil.which(os.environ.get("QMPSNAP_QEMU_IMG", "qemu-img"))
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-img is missing; in CI these tests must run")
        pytest.skip("qemu-img is not installed")
    return found


@pytest.fixture
def tool(qemu_img: str) -> ImageTool:
    return ImageTool(qemu_img)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """The folder images are made in."""
    folder = tmp_path / "pool"
    folder.mkdir()
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Layer:
    """A raw base outside the pool."""
    path = tmp_path / "base.raw"
    path.write_bytes(os.urandom(MIB))
    return layer(path, "raw")


@pytest.fixture
def fake(tmp_path: Path, qemu_img: str) -> Fake:
    """``fake(script)``: a qemu-img that does what the shell script says; ``$REAL`` is the real one."""

    def write(script: str) -> ImageTool:
        path = tmp_path / "fake-qemu-img"
        path.write_text(f'#!/bin/sh\nREAL="{qemu_img}"\nfor word; do target=$size; size=$word; done\n{script}\n')
        path.chmod(0o755)
        return ImageTool(str(path), timeout=20)

    return write


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 KiB: too small for what an empty overlay has besides its holes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(place)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this container may not mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def layer(path: Path, image_format: Format) -> Layer:
    size = header.read(path).virtual_size
    return Layer(id=LayerId("vda-1"), path=str(path), format=image_format, backing=None, virtual_size=size)


def opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- what is made ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.qcow2", "with space, comma=1:x%d.qcow2", "-leading", "ünïcode", "json:{}", "x" * 255]
)
async def test_an_overlay_is_exactly_what_was_asked_for(tool: ImageTool, pool: Path, base: Layer, name: str) -> None:
    before = digest(base.path)
    made = await tool.create_overlay(pool / name, backing=base, virtual_size=MIB)
    assert (made.format, made.version, made.virtual_size) == ("qcow2", 3, MIB)
    assert (made.backing, made.backing_format) == (base.path, "raw")
    assert header.read(pool / name) == made
    assert [entry.name for entry in pool.iterdir()] == [name]
    assert digest(base.path) == before


@pytest.mark.parametrize("size", [512, MIB, (512 << 20) - 512, (512 << 20) + 512, 3 << 40, 64 << 40, 1 << 51])
async def test_an_overlay_is_what_qemu_img_makes(
    tool: ImageTool, qemu_img: str, pool: Path, base: Layer, size: int
) -> None:
    """To the byte, but for the names of features that it puts into the header, and so where the backing's name is."""
    below = replace(base, virtual_size=512)
    os.truncate(base.path, 512)
    await tool.create_overlay(pool / "ours", backing=below, virtual_size=size)
    argv = [qemu_img, "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", base.path, "-o", "compat=1.1"]
    await anyio.run_process([*argv, str(pool / "theirs"), str(size)])
    ours, theirs = (pool / "ours").read_bytes(), (pool / "theirs").read_bytes()
    assert ours[64 << 10 :] == theirs[64 << 10 :]
    # What the header says, but for the place of the name, and the extension with the backing's format.
    assert ours[:8] + ours[16:128] == theirs[:8] + theirs[16:128]
    assert header.read(pool / "ours").backing == header.read(pool / "theirs").backing
    if size <= 64 << 40:
        await anyio.run_process([qemu_img, "check", "-q", str(pool / "ours")])


async def test_an_overlay_that_qemu_could_not_open_is_refused(tool: ImageTool, pool: Path, base: Layer) -> None:
    with pytest.raises(ImageRefused, match="larger than QEMU can open"):
        await tool.create_overlay(pool / "a", backing=base, virtual_size=(1 << 51) + 512)
    assert not list(pool.iterdir())


async def test_an_overlay_needs_no_qemu_img(pool: Path, base: Layer) -> None:
    await ImageTool("/nonexistent/qemu-img").create_overlay(pool / "a", backing=base, virtual_size=MIB)


async def test_overlays_stack_and_read_as_their_base(tool: ImageTool, qemu_img: str, pool: Path, base: Layer) -> None:
    below = base
    for number in range(3):
        path = pool / f"b,{number}=a: x"
        await tool.create_overlay(path, backing=below, virtual_size=MIB)
        below = layer(path, "qcow2")
    chain = header.read_chain(below.path, "qcow2", allowed=[pool, pool.parent])
    assert [found.path for found in chain] == [base.path, *(str(pool / f"b,{number}=a: x") for number in range(3))]
    await anyio.run_process([qemu_img, "compare", "-f", "raw", "-F", "qcow2", base.path, below.path])
    await anyio.run_process([qemu_img, "check", "-q", below.path])


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_base_is_empty_and_of_its_size(tool: ImageTool, pool: Path, image_format: Format) -> None:
    made = await tool.create_base(pool / "a", format=image_format, virtual_size=5 << 30)
    assert (made.format, made.virtual_size, made.backing) == (image_format, 5 << 30, None)
    assert header.require(pool / "a", format=image_format, allowed=[pool]) == made
    assert made.allocated < MIB


async def test_raw_needs_no_qemu_img(pool: Path) -> None:
    await ImageTool("/nonexistent").create_base(pool / "a", format="raw", virtual_size=MIB)


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_only_the_owner_may_read_it(tool: ImageTool, pool: Path, umask: int, image_format: Format) -> None:
    old = os.umask(umask)
    try:
        await tool.create_base(pool / "a", format=image_format, virtual_size=MIB)
    finally:
        os.umask(old)
    assert stat.S_IMODE((pool / "a").stat().st_mode) == 0o600


async def test_qemu_img_keeps_the_inode_we_created(fake: Fake, pool: Path, tmp_path: Path) -> None:
    """Our identity check at removal rests on it."""
    tool = fake('stat -Lc %i "$target" > "$0.before"; "$REAL" "$@"; stat -Lc %i "$target" > "$0.after"')
    made = await tool.create_base(pool / "a", format="qcow2", virtual_size=MIB)
    seen = [int((tmp_path / f"fake-qemu-img.{when}").read_text()) for when in ("before", "after")]
    assert seen == [made.inode] * 2
    assert (pool / "a").stat().st_ino == made.inode


async def test_file_and_folder_are_flushed(tool: ImageTool, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(opened(descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    await tool.create_base(pool / "a", format="qcow2", virtual_size=MIB)
    assert flushed == [pool / "a", pool]


# --- what is refused beforehand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling", "folder"])
async def test_nothing_existing_is_touched(tool: ImageTool, pool: Path, base: Layer, kind: str) -> None:
    path = pool / "a"
    match kind:
        case "file":
            path.write_text("precious")
        case "symlink":
            path.symlink_to(base.path)
        case "dangling":
            path.symlink_to(pool / "b")
        case _:
            path.mkdir()
    before = digest(base.path)
    with pytest.raises(StateError, match="exists already"):
        await tool.create_overlay(path, backing=base, virtual_size=MIB)
    assert [entry.name for entry in pool.iterdir()] == ["a"]
    assert digest(base.path) == before
    assert kind != "file" or path.read_text() == "precious"


@pytest.mark.parametrize("size", [0, -512, 1000, 1 << 63])
async def test_impossible_sizes(tool: ImageTool, pool: Path, size: int) -> None:
    with pytest.raises(ImageRefused, match="cannot have"):
        await tool.create_base(pool / "a", format="raw", virtual_size=size)
    assert not list(pool.iterdir())


@pytest.mark.parametrize("path", ["a", "nbd:a", "/tmp/a\nb", "/tmp/\udcff", "/", "/tmp/..", "/" + "a/" * 600])
async def test_impossible_places(tool: ImageTool, path: str) -> None:
    with pytest.raises(ImageRefused, match="no image can be created at"):
        await tool.create_base(path, format="raw", virtual_size=MIB)


async def test_a_missing_folder(tool: ImageTool, pool: Path) -> None:
    with pytest.raises(HostCannot, match="was not created: No such file"):
        await tool.create_base(pool / "no" / "a", format="raw", virtual_size=MIB)


async def test_an_overlay_smaller_than_its_backing(tool: ImageTool, pool: Path, base: Layer) -> None:
    with pytest.raises(ImageRefused, match="is smaller than"):
        await tool.create_overlay(pool / "a", backing=base, virtual_size=MIB - 512)
    assert not list(pool.iterdir())


async def test_a_backing_that_is_not_of_its_format(tool: ImageTool, pool: Path, base: Layer) -> None:
    wrong = Layer(id=base.id, path=base.path, format="qcow2", backing=None, virtual_size=MIB)
    with pytest.raises(ImageRefused, match="no qcow2 header"):
        await tool.create_overlay(pool / "a", backing=wrong, virtual_size=MIB)
    assert not list(pool.iterdir())


@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB])
async def test_no_overlay_of_a_backing_that_was_resized(tool: ImageTool, pool: Path, base: Layer, size: int) -> None:
    os.truncate(base.path, size)
    with pytest.raises(StoreMismatch, match=f"has a virtual size of {size} bytes, the store has {MIB}") as caught:
        await tool.create_overlay(pool / "a", backing=base, virtual_size=MIB)
    assert caught.value.effect == "none"
    assert not list(pool.iterdir())


async def test_no_plain_overlay_of_an_encrypted_image(
    tool: ImageTool, qemu_img: str, tmp_path: Path, pool: Path
) -> None:
    path = tmp_path / "secret.qcow2"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    argv = [qemu_img, "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o", options, str(path), "1M"]
    for _ in range(20):  # qemu-img measures its key derivation and gives up where a busy host disturbs it
        if (await anyio.run_process(argv, check=False)).returncode == 0:
            break
    with pytest.raises(ImageRefused, match="encrypted"):
        await tool.create_overlay(pool / "a", backing=layer(path, "qcow2"), virtual_size=MIB)
    assert not list(pool.iterdir())


# --- what fails half-way --------------------------------------------------------------------------------------------


async def test_qemu_img_is_missing(pool: Path) -> None:
    with pytest.raises(HostCannot, match="cannot be run") as caught:
        await ImageTool("/nonexistent/qemu-img").create_base(pool / "a", format="qcow2", virtual_size=MIB)
    assert caught.value.exit_code == 9
    assert "qemu-utils" in caught.value.hint
    assert not list(pool.iterdir())


@pytest.mark.parametrize(
    ("script", "error", "reason"),
    [
        ("printf 'qemu-img: %s: bad \\033[2J\\n' $target >&2; exit 1", HostCannot, r"exit 1.*bad \\x1b\[2J"),
        ("kill -SEGV $$", HostCannot, "signal 11"),
        ("echo 'qemu-img: No space left on device' >&2; exit 1", HostCannot, "no space left"),
        ('ulimit -f 100; exec $REAL "$@"', HostCannot, "signal 25|too large"),
        ("exit 0", HostCannot, "as requested: .*no qcow2 header"),
        ('exec $REAL create -f qcow2 "$target" 2M', HostCannot, "as requested: size, backing"),
        ('"$REAL" "$@" && "$REAL" snapshot -c tag "$target"', HostCannot, "no internal snapshots"),
        ('"$REAL" "$@" && "$REAL" bench -w -c 1 -f qcow2 -o 0 "$target"', HostCannot, "should be empty"),
    ],
)
async def test_nothing_is_left_when_qemu_img_fails(
    fake: Fake, pool: Path, script: str, error: type[QmpsnapError], reason: str
) -> None:
    with pytest.raises(error, match=reason) as caught:
        await fake(script).create_base(pool / "a", format="qcow2", virtual_size=1 << 30)
    assert caught.value.effect == "none"
    assert caught.value.message.isprintable()
    assert "deleting" not in caught.value.message
    assert not list(pool.iterdir())


@pytest.mark.parametrize(("failures", "made"), [(40, True), (60, False)])
async def test_qemu_img_that_cannot_time_its_key_is_asked_again(
    fake: Fake, pool: Path, tmp_path: Path, failures: int, *, made: bool
) -> None:
    """QEMU 7.2 of Debian gives up where its clock has not moved in the first milliseconds: one in four times."""
    asked = tmp_path / "asked"
    again = fake(
        f'echo >>"{asked}"; [ $(wc -l <"{asked}") -gt {failures} ] && '
        'exec "$REAL" create -q -f qcow2 "$target" "$size"\n'
        f'echo "qemu-img: {encrypted.NO_CLOCK}" >&2; exit 1'
    )
    with pytest.raises(HostCannot, match="clean and encrypted" if made else encrypted.NO_CLOCK):
        await again.create_base(pool / "a", format="qcow2", virtual_size=MIB, key=0)
    assert not list(pool.iterdir())


async def test_disk_full(tool: ImageTool, small_disk: Path, base: Layer) -> None:
    with pytest.raises(HostCannot, match="no space left") as caught:
        await tool.create_overlay(small_disk / "a", backing=base, virtual_size=MIB)
    assert caught.value.effect == "none"
    assert not list(small_disk.iterdir())


async def test_time_is_over(fake: Fake, pool: Path, tmp_path: Path) -> None:
    slow = fake('echo $$ > "$0.pid"; exec sleep 60')
    begin = time.monotonic()
    with pytest.raises(DeadlinePassed, match=r"within 0\.5 seconds"):
        await ImageTool(slow.binary, timeout=0.5).create_base(pool / "a", format="qcow2", virtual_size=MIB)
    assert time.monotonic() - begin < 30
    assert not list(pool.iterdir())
    assert not Path(f"/proc/{(tmp_path / 'fake-qemu-img.pid').read_text().strip()}").exists(), "qemu-img lives on"


async def test_cancelled_while_qemu_img_runs(fake: Fake, pool: Path, tmp_path: Path) -> None:
    slow = fake('"$REAL" "$@"; echo $$ > "$0.pid"; exec sleep 60')
    pid = tmp_path / "fake-qemu-img.pid"
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: slow.create_base(pool / "a", format="qcow2", virtual_size=MIB))
            while not (pid.exists() and pid.read_text().endswith("\n")):
                await anyio.sleep(0.01)
            assert list(pool.iterdir()), "the file is there while it is made"
            group.cancel_scope.cancel()
    assert not list(pool.iterdir())
    assert not Path(f"/proc/{pid.read_text().strip()}").exists(), "qemu-img lives on"


@pytest.mark.parametrize("step", ["_make_qcow2", "finish_raw", "fsync"])
async def test_cancelled_at_a_step(tool: ImageTool, pool: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A caller that is cancelled never learns of the file, so there must be none."""
    scope = anyio.CancelScope()
    fsync = os.fsync

    def cancelling(descriptor: int) -> None:
        anyio.from_thread.run_sync(scope.cancel)
        fsync(descriptor)

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", cancelling)
    else:
        scope.cancel()
    with scope:
        await tool.create_base(pool / "a", format="raw" if step == "finish_raw" else "qcow2", virtual_size=MIB)
    assert scope.cancelled_caught
    monkeypatch.undo()
    assert not list(pool.iterdir())


async def test_a_task_torn_out_of_its_thread(tool: ImageTool, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C cancels the root task the asyncio way, which no scope shields from: the thread is still at work then."""
    started, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        started.set()
        go_on.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    task = asyncio.ensure_future(tool.create_base(pool / "a", format="raw", virtual_size=MIB))
    while not started.is_set():
        await anyio.sleep(0.01)
    task.cancel()
    await anyio.sleep(0.05)
    assert not task.done(), "it waits for its own clean-up"
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list(pool.iterdir())


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05])
async def test_cancelled_at_any_moment(tool: ImageTool, pool: Path, base: Layer, delay: float) -> None:
    made = None
    with anyio.move_on_after(delay) as scope:
        made = await tool.create_overlay(pool / "a", backing=base, virtual_size=MIB)
    assert (made is None) is scope.cancelled_caught
    assert (made is None) is not (pool / "a").exists()


@pytest.mark.parametrize("turns", [*range(12), 15, 20, 30, 50])
async def test_cancelled_at_any_turn_of_the_loop(tool: ImageTool, pool: Path, base: Layer, turns: int) -> None:
    """The first turns are those in which the process is spawned; one not waited for would warn when collected."""
    made = None
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel() -> None:
                while not any(pool.iterdir()):
                    await lowlevel.checkpoint()
                for _ in range(turns):
                    await lowlevel.checkpoint()
                scope.cancel()

            group.start_soon(cancel)
            made = await tool.create_overlay(pool / "a", backing=base, virtual_size=MIB)
    assert (made is None) is not (pool / "a").exists()
    gc.collect()


async def test_a_file_put_in_our_place_is_not_removed(fake: Fake, pool: Path) -> None:
    """Swapped while qemu-img runs: the stranger's file is neither written to nor unlinked."""
    path = pool / "a"
    swap = fake(f'mv {path} {path}.moved; echo precious > {path}; exec "$REAL" "$@"')
    with pytest.raises(StoreMismatch, match="another file appeared"):
        await swap.create_base(path, format="qcow2", virtual_size=MIB)
    assert path.read_text() == "precious\n"


async def test_a_symlink_put_in_our_place_leads_nowhere(fake: Fake, pool: Path, base: Layer) -> None:
    before = digest(base.path)
    path = pool / "a"
    swap = fake(f'rm {path}; ln -s {base.path} {path}; exec "$REAL" "$@"')
    with pytest.raises(StoreMismatch, match="another file appeared"):
        await swap.create_base(path, format="qcow2", virtual_size=MIB)
    assert digest(base.path) == before


async def test_a_removal_that_fails_is_told(fake: Fake, pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(HostCannot, match="may be left there: Input/output error") as caught:
        await fake("exit 1").create_base(pool / "a", format="qcow2", virtual_size=MIB)
    assert caught.value.effect == "unknown"


# --- removal --------------------------------------------------------------------------------------------------------


async def test_removal(pool: Path) -> None:
    path = pool / "a"
    made = await ImageTool().create_base(path, format="raw", virtual_size=MIB)
    assert await create.remove(str(path), device=made.device, inode=made.inode)
    assert not path.exists()
    assert not await create.remove(str(path), device=made.device, inode=made.inode)
    assert not await create.remove(str(pool / "no" / "a"), device=made.device, inode=made.inode)


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
async def test_another_file_is_not_removed(pool: Path, kind: str) -> None:
    path = pool / "a"
    made = await ImageTool().create_base(pool / "b", format="raw", virtual_size=MIB)
    match kind:
        case "file":
            path.write_text("precious")
        case "symlink":
            path.symlink_to("b")
        case _:
            path.mkdir()
    with pytest.raises(StoreMismatch, match="not the recorded image"):
        await create.remove(str(path), device=made.device, inode=made.inode)
    assert sorted(entry.name for entry in pool.iterdir()) == ["a", "b"]


async def test_the_folder_is_flushed_after_removal(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await ImageTool().create_base(pool / "a", format="raw", virtual_size=MIB)
    seen: list[tuple[Path, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append((opened(fd), (pool / "a").exists())))
    await create.remove(str(pool / "a"), device=made.device, inode=made.inode)
    assert seen == [(pool, False)]
