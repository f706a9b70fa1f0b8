# SPDX-License-Identifier: Apache-2.0
"""A program of 200 bytes that reseeds the random generator of a Linux on x86-64.

For guests without Perl and Python. It reads what RNDADDENTROPY takes from its standard
input, makes the two calls, and ends with 0 or with the error's number. Below stands
each instruction beside its bytes; a test has an assembler make them of the text, and
another runs them in a guest. So neither a compiler nor a binary file of somebody's
making is needed to build or trust this package.
"""

import struct

SOURCE = (
    # Read 72 bytes to the stack; fewer are an I/O error.
    ("sub $0x100, %rsp", "4881ec00010000"),
    ("xor %edi, %edi", "31ff"),
    ("mov %rsp, %rsi", "4889e6"),
    ("mov $0x48, %edx", "ba48000000"),
    ("xor %eax, %eax", "31c0"),
    ("syscall", "0f05"),
    ("cmp $0x48, %eax", "83f848"),
    ("mov $-5, %ecx", "b9fbffffff"),
    ("cmovne %ecx, %eax", "0f45c1"),
    ("jne end", "753b"),
    # Open /dev/urandom to read: what counts is the privilege of the caller.
    ("lea path(%rip), %rdi", "488d3d3f000000"),
    ("xor %esi, %esi", "31f6"),
    ("mov $2, %eax", "b802000000"),
    ("syscall", "0f05"),
    ("test %eax, %eax", "85c0"),
    ("js end", "7827"),
    ("mov %eax, %ebx", "89c3"),
    # RNDADDENTROPY
    ("mov %ebx, %edi", "89df"),
    ("mov $0x40085203, %esi", "be03520840"),
    ("mov %rsp, %rdx", "4889e2"),
    ("mov $16, %eax", "b810000000"),
    ("syscall", "0f05"),
    ("test %eax, %eax", "85c0"),
    ("jnz end", "7510"),
    # RNDRESEEDCRNG
    ("mov %ebx, %edi", "89df"),
    ("mov $0x5207, %esi", "be07520000"),
    ("xor %edx, %edx", "31d2"),
    ("mov $16, %eax", "b810000000"),
    ("syscall", "0f05"),
    ("end:", ""),
    ("neg %eax", "f7d8"),
    ("mov %eax, %edi", "89c7"),
    ("mov $60, %eax", "b83c000000"),
    ("syscall", "0f05"),
    ("path:", ""),
    ('.asciz "/dev/urandom"', "2f6465762f7572616e646f6d00"),
)
"""Instructions and their bytes."""

_LOAD = 0x400000
_HEADERS = 64 + 56  # bytes of an ELF file's header, and of one program header


def _elf(code: bytes) -> bytes:
    """Return a file that the kernel loads as it is: one segment, read and run."""
    size = _HEADERS + len(code)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, _LOAD + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD, _LOAD, size, size, 0x1000)
    return ident + header + segment + code


PROGRAM = _elf(bytes.fromhex("".join(code for _, code in SOURCE)))
"""A static executable."""
