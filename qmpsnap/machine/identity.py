"""What makes a Linux guest another one than its twin: a script that its agent runs.

The kernel's random generator takes a seed at once only through an ioctl that no shell can make, and a guest need have
no other interpreter. So a program of 200 bytes that does nothing else is written into the guest, run and removed.
"""

import os
import struct
import uuid
from collections.abc import Sequence
from typing import Final

SEED: Final = 64
"""Bytes of randomness that a guest is given."""

_AT: Final = 0x10000
"""Where the program is loaded."""
_HEADERS: Final = 64 + 56
_BUFFER: Final = 264
_RNDADDENTROPY: Final = 0x40085203
_RNDRESEEDCRNG: Final = 0x5207


def _program() -> bytes:
    """An ELF for x86-64 that hands ``struct rand_pool_info`` from its input to the kernel and lets it reseed."""
    path, buffer = struct.pack("<I", _AT + _HEADERS), struct.pack("<I", _AT + 0x1000)
    ioctl = b"\xb8\x10\x00\x00\x00\x0f\x05"  # mov eax, SYS_ioctl; syscall
    name = b"/dev/urandom\0"
    code = b"".join(
        (
            b"\x31\xff\xbe" + buffer + b"\xba" + struct.pack("<I", _BUFFER),  # xor edi, edi; mov esi; mov edx
            b"\x31\xc0\x0f\x05",  # read(0, buffer, size)
            b"\xbf" + path + b"\xbe\x01\x00\x00\x00\xb8\x02\x00\x00\x00\x0f\x05",  # open(path, O_WRONLY)
            b"\x89\xc7\xbe" + struct.pack("<I", _RNDADDENTROPY) + b"\xba" + buffer + ioctl,  # mov edi, eax
            b"\x89\xc3\xbe" + struct.pack("<I", _RNDRESEEDCRNG) + b"\x31\xd2" + ioctl,  # mov ebx, eax
            b"\x09\xd8\x31\xff\x85\xc0\x40\x0f\x95\xc7",  # or eax, ebx; xor edi, edi; test eax, eax; setne dil
            b"\xb8\x3c\x00\x00\x00\x0f\x05",  # exit(edi)
        )
    )
    body = name + code
    size = _HEADERS + len(body)
    entry = _AT + _HEADERS + len(name)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, 0, _AT, _AT, size, 0x2000, 0x1000)
    return elf + load + body


_SCRIPT: Final = r"""
name=$1 id=$2 hook=$3; shift 3
try() { what=$1; shift; said=$("$@" 2>&1) || { echo "$what: ${said:-it failed}" | tr '\n' ' '; echo; }; }
seed() {
    for folder in /run /dev/shm /tmp /var/tmp /root; do
        file=$folder/.qmpsnap-seed.$$
        (umask 077; printf '@PROGRAM@' >$file) 2>/dev/null && chmod 700 $file && $file <&3 && { rm -f $file; return; }
        rm -f $file
    done
    echo "the kernel's generator was not reseeded"; return 1
}
exec 3<&0
try 'random pool' seed
rename() {
    hostname "$name" 2>/dev/null || echo "$name" >/proc/sys/kernel/hostname || return 1
    [ ! -e /etc/hostname ] || echo "$name" >/etc/hostname
}
try hostname rename
machine_id() {
    [ ! -s /etc/machine-id ] || echo "$id" >/etc/machine-id || return 1
    [ ! -f /var/lib/dbus/machine-id ] || [ -L /var/lib/dbus/machine-id ] || echo "$id" >/var/lib/dbus/machine-id
}
try machine-id machine_id
address() {
    for card in /sys/class/net/*; do
        [ "$(cat $card/address)" = "$1" ] || continue
        card=${card##*/}
        ip link set dev $card address $2 2>/dev/null && return
        ip link set dev $card down && ip link set dev $card address $2 && ip link set dev $card up
        return
    done
    echo "no network card has the address $1"; return 1
}
for pair; do try 'MAC address' address ${pair%=*} ${pair#*=}; done
if [ -n "$hook" ]; then try hook sh -c "$hook"
elif ls /etc/ssh/ssh_host_*_key >/dev/null 2>&1; then
    echo 'SSH host keys: the spec has no identity-hook that makes others'
fi
"""


def command(name: str, *, hook: str, addresses: Sequence[tuple[str, str]]) -> list[str]:
    """What the agent has to run, with :func:`seed` as its input; what it prints is what failed, a line each."""
    program = "".join(f"\\{byte:03o}" for byte in _program())
    pairs = [f"{old}={new}" for old, new in addresses]
    return ["sh", "-c", _SCRIPT.replace("@PROGRAM@", program), "qmpsnap", name, uuid.uuid4().hex, hook, *pairs]


def seed() -> bytes:
    """Randomness of this host's, as ``struct rand_pool_info``."""
    return struct.pack("<ii", SEED * 8, SEED) + os.urandom(SEED)
