"""Prints the constants of Python's socket module, one `NAME = VALUE` a line, sorted.

`constants.py > constants.txt` records them; made with CPython 3.11 on Linux. BLUETOOTH stands for what only a CPython built with
the Bluetooth headers exports, so that the record covers both.
"""

import socket

BLUETOOTH = {
    "AF_BLUETOOTH": 31,
    "BTPROTO_HCI": 1,
    "BTPROTO_L2CAP": 0,
    "BTPROTO_RFCOMM": 3,
    "BTPROTO_SCO": 2,
    "HCI_DATA_DIR": 1,
    "HCI_FILTER": 2,
    "HCI_TIME_STAMP": 3,
    "SOL_HCI": 0,
}

exported = {name: int(getattr(socket, name)) for name in socket.__all__ if isinstance(getattr(socket, name), int)}
for name, value in sorted((BLUETOOTH | exported).items()):
    print(f"{name} = {value}")
