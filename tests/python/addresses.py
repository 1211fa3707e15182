"""Prints the sockaddr that CPython passes to bind(2) for an address, one `CASE = HEX` a line; needs a C compiler.

`addresses.py > addresses.txt` records them (made with CPython 3.11 on x86_64). The fd is a UDP socket's: CPython trusts the family
it is given with `fileno=`, so that the kernel needs none of these families; a bind() put before the C library's catches the bytes.
`__` is a byte of padding: CPython sends what was on its stack.
"""

import os
import socket as S
import subprocess
import sys
import tempfile

HOOK = r"""
#include <stdio.h>
#include <sys/socket.h>
int bind(int fd, const struct sockaddr *address, socklen_t len) {
    for (socklen_t i = 0; i < len; i++) printf("%02x", ((const unsigned char *)address)[i]);
    printf("\n");
    return 0;
}
"""

CASES = [
    ("netlink", S.AF_NETLINK, S.NETLINK_ROUTE, (0x01020304, 0x0A0B0C0D)),
    ("packet", S.AF_PACKET, 0, ("lo", 0x0806)),
    ("packet_full", S.AF_PACKET, 0, ("lo", 0x1234, S.PACKET_OTHERHOST, 772, b"\x02\x03\x04\x05\x06\x07")),
    ("packet_eight", S.AF_PACKET, 0, ("lo", 3, S.PACKET_BROADCAST, 1, bytes(range(1, 9)))),
    ("vsock", S.AF_VSOCK, 0, (0x01020304, 0x0A0B0C0D)),
    ("vsock_any", S.AF_VSOCK, 0, (S.VMADDR_CID_ANY, S.VMADDR_PORT_ANY)),
    ("tipc_nameseq", S.AF_TIPC, 0, (S.TIPC_ADDR_NAMESEQ, 0x01020304, 5, 6, S.TIPC_ZONE_SCOPE)),
    ("tipc_name", S.AF_TIPC, 0, (S.TIPC_ADDR_NAME, 0x01020304, 5, 0)),
    ("tipc_id", S.AF_TIPC, 0, (S.TIPC_ADDR_ID, 0x01020304, 5, 0, S.TIPC_NODE_SCOPE)),
    ("can_all", S.AF_CAN, S.CAN_RAW, ("",)),
    ("can_raw", S.AF_CAN, S.CAN_RAW, ("lo",)),
    ("can_isotp", S.AF_CAN, S.CAN_ISOTP, ("lo", 0x01020304, 0x0A0B0C0D)),
    ("can_j1939", S.AF_CAN, S.CAN_J1939, ("lo", 0x0102030405060708, 0x0A0B0C0D, 0x7F)),
    ("alg", S.AF_ALG, 0, ("hash", "sha256")),
    ("alg_longest", S.AF_ALG, 0, ("t" * 13, "n" * 63, 0x0102, 0x0A0B)),
]


def padding(case):
    """Where the bytes are that nobody reads."""
    name, family, proto, address = case
    if family == S.AF_NETLINK:
        return range(2, 4)
    if family == S.AF_PACKET:
        return range(12 + len(address[4] if len(address) > 4 else b""), 20)
    if family == S.AF_CAN:
        used = {S.CAN_RAW: 8, S.CAN_ISOTP: 16, S.CAN_J1939: 21}[proto]
        return [2, 3, *range(used, 24)]
    return ()


if len(sys.argv) == 2:
    _, family, proto, address = CASES[int(sys.argv[1])]
    fd = S.socket(S.AF_INET, S.SOCK_DGRAM).detach()
    S.socket(family, S.SOCK_DGRAM, proto, fd).bind(address)
else:
    with tempfile.TemporaryDirectory() as directory:
        hook = os.path.join(directory, "hook.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", hook], input=HOOK, text=True, check=True)
        for index, case in enumerate(CASES):
            command = [sys.executable, __file__, str(index)]
            hooked = subprocess.run(command, env=os.environ | {"LD_PRELOAD": hook}, capture_output=True, text=True, check=True)
            sent = bytes.fromhex(hooked.stdout)
            print(case[0], "=", "".join("__" if at in padding(case) else f"{byte:02x}" for at, byte in enumerate(sent)))
