#!/usr/bin/env python3
"""The echo server in CPython, for comparison: a thread for each connection, recv_into and sendall.

    echo.py [--bind HOST:PORT | --unix PATH | --udp HOST:PORT] [--buffer BYTES] [--timeout SECONDS]

Prints "listening on ADDRESS" once it listens, and runs until a signal ends it.
"""

import argparse
import os
import signal
import socket
import threading


def address(text):
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def arguments():
    parser = argparse.ArgumentParser()
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bind", type=address, default=("127.0.0.1", 0))
    where.add_argument("--unix")
    where.add_argument("--udp", type=address)
    parser.add_argument("--buffer", type=int, default=4096)
    parser.add_argument("--timeout", type=float)
    return parser.parse_args()


def listen(args):
    if args.unix:
        if os.path.exists(args.unix):
            os.unlink(args.unix)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(args.unix)
        listener.listen(4096)
    else:
        listener = socket.create_server(args.bind, backlog=4096)
    return listener


def announce(sock):
    name = sock.getsockname()
    print("listening on", name if isinstance(name, str) else "%s:%d" % name[:2], flush=True)


def echo(conn, args):
    """One connection: what breaks it ends it, and is nobody's business."""
    with conn:
        try:
            if conn.family != socket.AF_UNIX:
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn.settimeout(args.timeout)
            buffer = bytearray(args.buffer)
            view = memoryview(buffer)
            while n := conn.recv_into(buffer):
                conn.sendall(view[:n])
        except OSError:
            pass


def streams(args):
    listener = listen(args)
    announce(listener)
    threading.stack_size(256 * 1024)
    while True:
        conn, _ = listener.accept()
        threading.Thread(target=echo, args=(conn, args), daemon=True).start()


def datagrams(args):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # Room for what a load has in flight, as the other servers have it; what is not granted shows as loss.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind(args.udp)
    sock.settimeout(args.timeout)
    announce(sock)
    buffer = bytearray(args.buffer)
    view = memoryview(buffer)
    while True:
        try:
            n, peer = sock.recvfrom_into(buffer)
            sock.sendto(view[:n], peer)
        except OSError:
            pass  # lost, as datagrams may be


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = arguments()
    if args.udp:
        datagrams(args)
    else:
        streams(args)


main()
