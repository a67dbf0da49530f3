"""What the agent holds in memory while it captures the first base of a Redis server: the same for a large one as for
one of a tenth."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.agent import Agent, most_resident
from benchmarks.containers import redis
from benchmarks.measure import ToolFailed
from benchmarks.report import layout

_VALUE = 1000
"""Bytes of a value."""
GOAL = 1.1
"""Memory for all of it over memory for a tenth: flat, but for what the allocator keeps."""


def bench_initial(work: Path, *, size: int, say: Callable[[str], None]) -> dict[str, object]:
    """`size`: bytes of values. Memory and seconds for all of them and for a tenth."""
    work.mkdir(parents=True)
    taken: dict[int, dict[str, float]] = {}
    keys = 0
    # Uncompressed: so many bytes come over the wire. No delay: it is the server's wish, and no work.
    with redis("--rdbcompression", "no", "--repl-diskless-sync-delay", "0") as name:
        for wanted in (size // 10, size):
            say(f"filling a server with {wanted / 1e9:g} GB")
            _fill(name, range(keys, wanted // _VALUE))
            keys = wanted // _VALUE
            taken[wanted] = _capture(work / f"{wanted}", name)
            say(f"  {taken[wanted]['memory'] / 1e6:.0f} MB of memory, {taken[wanted]['seconds']:.1f} s")
    return _tell(taken)


def _capture(home: Path, name: str) -> dict[str, float]:
    home.mkdir()
    agent = Agent(home, "sessions", f'driver = "redis"\ncontainer = "{name}"')
    begun = time.monotonic()
    with agent.serving() as pid:
        return {"seconds": time.monotonic() - begun, "memory": float(most_resident(pid))}


def _fill(name: str, keys: range) -> None:
    """Values that compress to half."""
    argv = ["docker", "exec", "-i", name, "redis-cli", "--pipe"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None and client.stdout is not None
        for batch in _commands(keys):
            client.stdin.write(batch)
        client.stdin.close()
        said = client.stdout.read().decode(errors="replace")
    if client.returncode or "errors: 0" not in said:
        raise ToolFailed(f"the server could not be filled: {said}")


def _commands(keys: range) -> Iterator[bytes]:
    """Some MB at a time."""
    rng = random.Random(keys.start)
    text = rng.randbytes(4 << 20).hex().encode()
    batch: list[bytes] = []
    for number in keys:
        at = rng.randrange(len(text) - _VALUE)
        batch.append(b"*3\r\n$3\r\nSET\r\n$16\r\nkey:%012d\r\n$%d\r\n" % (number, _VALUE))
        batch.append(text[at : at + _VALUE] + b"\r\n")
        if len(batch) > 10_000:
            yield b"".join(batch)
            batch.clear()
    yield b"".join(batch)


def _tell(taken: dict[int, dict[str, float]]) -> dict[str, object]:
    rows = [["initial", "memory, MB", "s"]]
    rows += [
        [f"{size / 1e9:g} GB", f"{found['memory'] / 1e6:.0f}", f"{found['seconds']:.1f}"]
        for size, found in taken.items()
    ]
    tenth, whole = (found["memory"] for found in taken.values())
    ratio = whole / tenth
    print(f"\n{layout(rows)}\n")
    print(f"all / a tenth: {ratio:.3f}  goal {GOAL:g}: {'met' if ratio <= GOAL else 'MISSED'}\n", flush=True)
    return {"taken": {str(size): found for size, found in taken.items()}, "ratio": ratio}
