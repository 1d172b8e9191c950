"""A guest of 512 bytes: it counts on both disks without end, by the BIOS, and goes on from where its disk is.

Step k fills sector ``RING + k % SLOTS`` of the first disk with k, then that of the second, then ``HEAD`` of the first.
Each write has ended before the next begins, so that every moment is a prefix of what it has written.
"""

from pathlib import Path

HEAD = 64
RING = 128
SLOTS = 256

# As GNU as makes it (.code16, at 0x7c00):
#
#     ljmp $0, $go
# go: xorw %ax, %ax; movw %ax, %ds; movw %ax, %es; movw %ax, %ss; movw $0x7c00, %sp; cld; movw $HEAD, dap+8
# 1:  movb $0x42, %ah; movb $0x80, %dl; movw $dap, %si; int $0x13; jc 1b     # read the head: where to go on
#     movl 0x8000, %eax; movl %eax, 0x600
# 2:  incl 0x600; movl 0x600, %eax; movw $0x8000, %di; movw $128, %cx; rep stosl
#     movzbw 0x600, %bx; addw $RING, %bx; movw %bx, dap+8
#     movb $0x80, %dl; call 3f; movb $0x81, %dl; call 3f; movw $HEAD, dap+8; movb $0x80, %dl; call 3f
#     sti; hlt; jmp 2b                                                       # until the timer's next tick
# 3:  movw $0x4300, %ax; movw $dap, %si; int $0x13; jc 3b; ret
# dap: .byte 16, 0; .word 1, 0x8000, 0; .quad 0
CODE = bytes.fromhex(
    "ea057c000031c08ed88ec08ed0bc007cfcc706757c4000b442b280be6d7c"
    "cd1372f566a1008066a3000666ff06000666a10006bf0080b9800066f3ab"
    "0fb61e000681c38000891e757cb280e81400b281e80f00c706757c4000b2"
    "80e80400fbf4ebc8b80043be6d7ccd1372f6c31000010000800000000000"
    "0000000000"
)


def install(path: Path, size: int) -> None:
    """Make a raw image that boots it."""
    path.write_bytes(CODE.ljust(510, b"\0") + b"\x55\xaa")
    with path.open("r+b") as image:
        image.truncate(size)
