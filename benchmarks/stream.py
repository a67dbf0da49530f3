"""What continuous recording costs a Redis server: redis-benchmark with and without the agent, in turns."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from benchmarks.agent import Agent, processor_seconds
from benchmarks.containers import docker, redis
from benchmarks.report import layout

_COMMANDS = "set,incr,lpush,sadd,hset,zadd"
GOAL = 0.95


@dataclass(frozen=True, slots=True)
class _Turn:
    per_second: dict[str, float]
    """By command."""
    agent: float = 0.0
    """Processor seconds of the agent meanwhile, a second."""
    memory: int = 0
    """Bytes: the most that the agent had resident."""


def bench_stream(work: Path, *, requests: int, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """Medians of both by command, and their ratio."""
    work.mkdir(parents=True)
    turns: dict[str, list[_Turn]] = {"without": [], "with": []}
    with redis() as name:
        docker("exec", name, "redis-cli", "CONFIG", "SET", "repl-backlog-size", "64mb")
        for number in range(rounds):
            for kind in ("without", "with") if number % 2 == 0 else ("with", "without"):
                docker("exec", name, "redis-cli", "FLUSHALL")
                turn = (
                    _run(name, requests)
                    if kind == "without"
                    else _recorded(work / f"{number}", name, requests)
                )
                turns[kind].append(turn)
                say(f"  {kind:8} {geometric_mean(turn.per_second.values()):10,.0f} a second")
    return _tell(turns, requests)


def _run(name: str, requests: int) -> _Turn:
    """Sixteen commands on their way at once, a million keys: what a busy server is asked."""
    argv = ["redis-benchmark", "-t", _COMMANDS, "-n", str(requests), "-P", "16", "-r", "1000000", "--csv"]
    lines = csv.DictReader(docker("exec", name, *argv).decode().splitlines())
    return _Turn({line["test"]: float(line["rps"]) for line in lines})


def _recorded(home: Path, name: str, requests: int) -> _Turn:
    home.mkdir()
    with Agent(home, "sessions", f'driver = "redis"\ncontainer = "{name}"').serving() as pid:
        begun, before = time.monotonic(), processor_seconds(pid)
        turn = _run(name, requests)
        spent = (processor_seconds(pid) - before) / (time.monotonic() - begun)
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024
    return _Turn(turn.per_second, spent, memory)


def _tell(turns: dict[str, list[_Turn]], requests: int) -> dict[str, object]:
    names = list(turns["with"][0].per_second)
    middle = {
        kind: {n: median(t.per_second[n] for t in found) for n in names} for kind, found in turns.items()
    }
    ratio = {name: middle["with"][name] / middle["without"][name] for name in names}
    every = geometric_mean(ratio.values())
    rows = [["stream, a second", "without", "with", "ratio"]]
    rows += [
        [n, f"{middle['without'][n]:,.0f}", f"{middle['with'][n]:,.0f}", f"{ratio[n]:.3f}"] for n in names
    ]
    agent = median(turn.agent for turn in turns["with"])
    memory = max(turn.memory for turn in turns["with"])
    print(f"\n{layout(rows)}\n")
    print(f"medians of {len(turns['with'])} turns of {requests:,} requests a command; the agent took {agent:.3f} "
          f"processors and {memory / 1e6:.0f} MB")  # fmt: skip
    print(
        f"all commands, with / without: {every:.3f}  goal {GOAL:g}: {'met' if every >= GOAL else 'MISSED'}\n"
    )
    return {"medians": middle, "ratio": ratio, "all": every, "agent": agent, "memory": memory}
