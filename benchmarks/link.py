"""A TCP proxy that is as slow as a line: `python -m benchmarks.link HOST:PORT MILLISECONDS MB_PER_SECOND`.

Prints the port it listens on. All connections share the line's width, each direction its own; what is on its way
arrives half the delay later, so that an answer is back after the whole of it.
"""

from __future__ import annotations

import asyncio
import sys

_PIECE = 128 << 10
_AHEAD = 0.005
"""Seconds of sending that may wait in front of the line, as in a socket's buffer: else the line stands idle
whenever this process wakes late."""

_ON_THE_WAY = 64
"""Pieces of one connection: more than fit into the delay; a receiver that stands still stops the sender."""


class Way:
    """One direction of the line: pieces one after the other, at its width."""

    def __init__(self, delay: float, rate: float) -> None:
        self._delay = delay
        self._rate = rate
        self._free_at = 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the sender is done; then the receiver is told so."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_ON_THE_WAY)
        arriving = asyncio.create_task(_arrive(queue, writer))
        try:
            while piece := await reader.read(_PIECE):
                self._free_at = max(loop.time(), self._free_at) + len(piece) / self._rate
                await queue.put((self._free_at + self._delay, piece))
                await asyncio.sleep(self._free_at - loop.time() - _AHEAD)
        except OSError:
            pass
        await queue.put((loop.time() + self._delay, b""))
        await arriving


async def _arrive(queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            moment, piece = await queue.get()
            await asyncio.sleep(moment - loop.time())
            if not piece:
                break
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def serve(host: str, port: int, delay: float, rate: float) -> None:
    """Until it is ended."""
    there, back = Way(delay / 2, rate), Way(delay / 2, rate)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay)  # the handshake
        try:
            to_reader, to_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(there.carry(reader, to_writer), back.carry(to_reader, writer))
        writer.close()
        to_writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    target, milliseconds, megabytes = sys.argv[1:]
    name, _, number = target.rpartition(":")
    asyncio.run(serve(name, int(number), float(milliseconds) / 1000, float(megabytes) * 1e6))
