"""What a command line tells of how QEMU was to open a disk."""

from typing import Any

import pytest

from qmpsnap.machine.blockline import Told, is_temporary, options_of

SEPARATE = [
    *("-blockdev", "driver=file,node-name=f,filename=/a,,b.qcow2,aio=native,locking=off,cache.direct=on"),
    *("-blockdev", '{"driver":"qcow2","node-name":"n","file":"f","discard":"unmap","l2-cache-size":1048576}'),
]
INLINE = ["--blockdev", "driver=qcow2,node-name=n,discard=on,lazy-refcounts=on,file.driver=file,file.filename=/i"]
DRIVE = "file=/i,if=none,id=d,discard=unmap,detect-zeroes=on,aio=io_uring,file.locking=off,l2-cache-size=2M"


@pytest.mark.parametrize(
    ("arguments", "image", "file"),
    [
        (
            SEPARATE,
            {"discard": "unmap", "l2-cache-size": 1 << 20},
            {"discard": "ignore", "aio": "native", "locking": "off"},
        ),
        (INLINE, {"discard": "unmap", "lazy-refcounts": True}, {"discard": "unmap"}),
        (
            ["-drive", DRIVE],
            {"discard": "unmap", "l2-cache-size": 2 << 20},
            {"discard": "unmap", "aio": "io_uring", "locking": "off"},
        ),
        (["-drive", "file=/i,if=virtio,discard=off"], {"discard": "ignore"}, {"discard": "unmap"}),
        (["-drive", "file.locking=off,file=/i,id=d"], {"discard": "ignore"}, {"discard": "unmap", "locking": "off"}),
        (["-drive", "driver=qcow2,file.driver=file,file.filename=/i"], {"discard": "ignore"}, {"discard": "unmap"}),
        (["-hda", "/i"], {"discard": "ignore"}, {"discard": "unmap"}),
    ],
)
def test_each_way_to_say_it(arguments: list[str], image: dict[str, Any], file: dict[str, Any]) -> None:
    found = options_of(["qemu", *arguments, "-S"], node="n", file="f", drive="d", path="/i")
    assert found == Told(image, file)


def test_what_was_attached_later_is_not_told() -> None:
    assert options_of(["qemu", "-drive", "file=/other,id=o"], node="n", file="f", drive="d", path="/i") is None
    assert options_of(["qemu", "-blockdev", "{broken", "-drive"], node="n", file="f", drive="d", path="/i") is None


def test_guests_that_write_to_temporary_files() -> None:
    assert is_temporary(["qemu", "-drive", "file=/i,snapshot=on"])
    assert is_temporary(["qemu", "-snapshot", "-hda", "/i"])
    assert not is_temporary(["qemu", "-drive", "file=/snapshot=on,,x,snapshot=off"])
