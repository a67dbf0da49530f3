"""What continuous recording costs a Redis server: redis-benchmark alone, and beside three that receive its replication
stream, in turns: a reader that keeps nothing, a replica of the server's own kind, the agent."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from benchmarks.agent import Agent, memory_anew, most_resident, processor_seconds
from benchmarks.containers import address, docker, redis, wait_for
from benchmarks.report import layout

_COMMANDS = "set,incr,lpush,sadd,hset,zadd"
GOAL = 0.95
"""Of the requests a second without anything, under the load that redis-benchmark makes by default."""


@dataclass(frozen=True, slots=True)
class Load:
    """One way to ask: fifty clients, a million keys."""

    name: str
    requests: int
    """Of each command."""
    at_once: int
    """Commands that a client sends before it waits for an answer."""


@dataclass(frozen=True, slots=True)
class _Turn:
    per_second: dict[str, float]
    """By command."""
    server: float
    """Processor seconds of the server for a million commands."""
    beside: float
    """The same of who received the stream."""
    memory: int
    """Bytes: the most that one had resident meanwhile, where it is a process of this machine."""


@dataclass(frozen=True, slots=True)
class _Beside:
    """Who receives the stream."""

    processor: Callable[[], float] = lambda: 0.0
    """Seconds used so far."""
    pid: int | None = None


_Kind = Callable[[], AbstractContextManager[_Beside]]


def bench_stream(
    work: Path, *, loads: Sequence[Load], rounds: int, say: Callable[[str], None]
) -> dict[str, object]:
    """Medians by load, contestant and command, and their ratios to the server alone."""
    work.mkdir(parents=True)
    told: dict[str, object] = {}
    # No delay: else each who joins waits five seconds for a dump of nothing.
    with redis("--repl-backlog-size", "64mb", "--repl-diskless-sync-delay", "0") as name:
        kinds: dict[str, _Kind] = {
            "alone": lambda: nullcontext(_Beside()),
            "reader": lambda: _reader(name),
            "replica": lambda: _replica(name),
            "agent": lambda: _agent(work, name),
        }
        for load in loads:
            turns: dict[str, list[_Turn]] = {kind: [] for kind in kinds}
            for number in range(rounds):
                order = list(kinds)
                for kind in order[number % len(order) :] + order[: number % len(order)]:
                    docker("exec", name, "redis-cli", "FLUSHALL")
                    with kinds[kind]() as beside:
                        turn = _turn(name, load, beside)
                    turns[kind].append(turn)
                    say(f"  {load.name}, {kind:8} {geometric_mean(turn.per_second.values()):10,.0f} a second")
            told[load.name] = _tell(load, turns)
    return told


def _turn(name: str, load: Load, beside: _Beside) -> _Turn:
    argv = ["redis-benchmark", "-t", _COMMANDS, "-n", str(load.requests), "-P", str(load.at_once)]
    if beside.pid is not None:
        memory_anew(beside.pid)
    before = _processor_of(name), beside.processor()
    lines = csv.DictReader(docker("exec", name, *argv, "-r", "1000000", "--csv").decode().splitlines())
    per_second = {line["test"]: float(line["rps"]) for line in lines}
    millions = load.requests * len(per_second) / 1e6
    server = (_processor_of(name) - before[0]) / millions
    memory = most_resident(beside.pid) if beside.pid is not None else 0
    return _Turn(per_second, server, (beside.processor() - before[1]) / millions, memory)


# --- who receives the stream -----------------------------------------------------------------------------------


@contextmanager
def _reader(name: str) -> Iterator[_Beside]:
    argv = [sys.executable, "-m", "benchmarks.discard", address(name), "6379"]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: _online(name), "the reader")
        yield _Beside(lambda: processor_seconds(process.pid), process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _replica(name: str) -> Iterator[_Beside]:
    with redis("--replicaof", address(name), "6379") as copy:
        wait_for(lambda: _online(name), "the replica")
        yield _Beside(lambda: _processor_of(copy))


@contextmanager
def _agent(work: Path, name: str) -> Iterator[_Beside]:
    home = work / f"agent-{sum(1 for _ in work.iterdir())}"
    home.mkdir()
    with Agent(home, "sessions", f'driver = "redis"\ncontainer = "{name}"').serving() as pid:
        wait_for(lambda: _online(name), "the agent")
        yield _Beside(lambda: processor_seconds(pid), pid)


def _info(name: str, section: str) -> dict[str, str]:
    lines = docker("exec", name, "redis-cli", "INFO", section).decode().split("\r\n")
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _online(name: str) -> bool:
    return "state=online" in _info(name, "replication").get("slave0", "")


def _processor_of(name: str) -> float:
    """Seconds that the server in a container has used; without those of the children that make dumps."""
    said = _info(name, "cpu")
    return float(said["used_cpu_sys"]) + float(said["used_cpu_user"])


# --- telling -----------------------------------------------------------------------------------------------------


def _tell(load: Load, turns: Mapping[str, Sequence[_Turn]]) -> dict[str, object]:
    commands = list(turns["alone"][0].per_second)
    middle = {
        kind: {command: median(turn.per_second[command] for turn in found) for command in commands}
        for kind, found in turns.items()
    }
    ratio = {
        kind: {command: of[command] / middle["alone"][command] for command in commands}
        for kind, of in middle.items()
        if kind != "alone"
    }
    every = {kind: geometric_mean(of.values()) for kind, of in ratio.items()}
    costs = {
        kind: {
            "server": median(turn.server for turn in found),
            "beside": median(turn.beside for turn in found),
            "memory": max(turn.memory for turn in found),
        }
        for kind, found in turns.items()
    }
    rows = [[f"stream, {load.name}", "alone, a second", *(f"{kind} / alone" for kind in ratio)]]
    rows += [
        [command, f"{middle['alone'][command]:,.0f}", *(f"{of[command]:.3f}" for of in ratio.values())]
        for command in commands
    ]
    rows.append(["all", "", *(f"{of:.3f}" for of in every.values())])
    print(f"\n{layout(rows)}\n")
    rows = [["processor seconds a million", *costs]]
    rows += [[who, *(f"{of[who]:.2f}" for of in costs.values())] for who in ("server", "beside")]
    rows.append(["memory, MB", *(f"{of['memory'] / 1e6:.0f}" for of in costs.values())])
    print(f"{layout(rows)}\n\nmedians of {len(turns['alone'])} turns of {load.requests:,} requests a command")
    if load.at_once == 1:
        good = every["agent"] >= GOAL
        print(f"with the agent / alone: {every['agent']:.3f}  goal {GOAL:g}: {'met' if good else 'MISSED'}")
    print(flush=True)
    return {"medians": middle, "ratio": ratio, "all": every, "costs": costs}
