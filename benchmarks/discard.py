"""`python -m benchmarks.discard HOST PORT`: a replica of a Redis server that keeps nothing, the least that any reader
of its replication stream costs. Standard library; runs until it is ended."""

from __future__ import annotations

import socket
import sys
import time

_ACKNOWLEDGE = b"*3\r\n$8\r\nREPLCONF\r\n$3\r\nACK\r\n$1\r\n0\r\n"


def discard(host: str, port: int) -> None:
    """Until the server closes the connection. The dump goes where all the rest does: nothing is looked at."""
    room = bytearray(1 << 18)
    with socket.create_connection((host, port)) as server:
        server.sendall(b"*3\r\n$5\r\nPSYNC\r\n$1\r\n?\r\n$2\r\n-1\r\n")
        acknowledged = time.monotonic()
        while server.recv_into(room):
            if time.monotonic() - acknowledged > 1:  # a server gives up a replica that is silent
                server.sendall(_ACKNOWLEDGE)
                acknowledged = time.monotonic()


if __name__ == "__main__":
    discard(sys.argv[1], int(sys.argv[2]))
