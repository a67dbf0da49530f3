"""What continuous recording costs a Redis server: redis-benchmark with and without the agent, in turns."""

from __future__ import annotations

import csv
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from benchmarks.containers import docker, redis, wait_for
from benchmarks.measure import ToolFailed
from benchmarks.recording import processor_seconds
from benchmarks.report import layout
from benchmarks.tools import backupd_argv, clean_env

_LISTEN = "127.0.0.1:18723"
_COMMANDS = "set,incr,lpush,sadd,hset,zadd"
GOAL = 0.95

CONFIG = """
[repository]
location = "{repository}"
[sources.sessions]
driver = "redis"
container = "{name}"
mode = "pitr"
[serve]
listen = "{listen}"
prune_schedule = "never"
verify_schedule = "never"
"""


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
    with _serving(home, name) as pid:
        begun, before = time.monotonic(), processor_seconds(pid)
        turn = _run(name, requests)
        spent = (processor_seconds(pid) - before) / (time.monotonic() - begun)
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024
    return _Turn(turn.per_second, spent, memory)


@contextmanager
def _serving(home: Path, name: str) -> Iterator[int]:
    """An agent that records, and has made its base."""
    home.mkdir()
    config = home / "backupd.toml"
    config.write_text(CONFIG.format(repository=home / "repository", name=name, listen=_LISTEN))
    env = clean_env(home, BACKUPD_CONFIG=str(config), XDG_STATE_HOME=str(home))
    subprocess.run([*backupd_argv(), "-q", "init"], cwd=home, env=env, check=True)
    with (home / "serve.log").open("wb") as log:
        agent = subprocess.Popen([*backupd_argv(), "serve"], cwd=home, env=env, stdout=log, stderr=log)
    try:
        wait_for(lambda: _recording(agent, home / "serve.log"), "the agent")
        yield agent.pid
    finally:
        agent.terminate()
        agent.wait()


def _recording(agent: subprocess.Popen[bytes], log: Path) -> bool:
    if agent.poll() is not None:
        raise ToolFailed(log.read_text()[-2000:])
    try:
        with urllib.request.urlopen(f"http://{_LISTEN}/status", timeout=5) as answer:
            told = json.load(answer)
    except OSError:
        return False
    made = any(job["job"] == "backup" and job["last_ok"] and not job["doing"] for job in told["jobs"])
    return made and told["recorders"]["sessions"]["state"] == "recording"


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
