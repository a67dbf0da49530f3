"""What continuous recording costs a PostgreSQL server, and how far what is stored lies behind: pgbench alone, beside
PostgreSQL's own receiver of a log, and beside the agent, in turns."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from backupd.logs.read import read_header
from backupd.repository import Repository, log_key
from backupd.stores import LocalStore
from benchmarks.agent import Agent, processor_seconds
from benchmarks.containers import POSTGRES_IMAGE, address, container, docker, postgres, sql, wait_for
from benchmarks.measure import ToolFailed
from benchmarks.report import layout

KINDS = ("alone", "receiver", "agent")
_COMPACTED = 17  # minute of the hour at which serve puts the log together: its small objects are gone then
_LET_IN = "echo 'host replication all all trust' >> $PGDATA/pg_hba.conf"


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of pgbench."""

    per_second: float
    """Transactions."""
    latency: float
    """Milliseconds, mean."""
    latency_p99: float
    agent: float = 0.0
    """Processor seconds of the agent meanwhile, a second."""
    lags: tuple[float, ...] = ()
    """Seconds from each anchor until it was durable, in the order of the anchors."""


def bench_recording(
    work: Path, *, scale: int, clients: int, seconds: int, rounds: int, say: Callable[[str], None]
) -> dict[str, object]:
    """Medians of both, their ratio, and the lag."""
    work.mkdir(parents=True)
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    with postgres("max_wal_size=4GB") as name:
        docker("exec", name, "sh", "-c", _LET_IN)
        sql(name, "SELECT pg_reload_conf();")
        say(f"filling pgbench's tables at scale {scale}")
        docker("exec", name, "pgbench", "-U", "postgres", "-i", "-q", "-s", str(scale), "postgres")
        home = _Home(work, name)
        with home.serving():
            pass  # the first base is not measured
        for number in range(rounds):
            for kind in KINDS if number % 2 == 0 else reversed(KINDS):
                _keep_clear(seconds)
                if kind == "agent":
                    turn = home.turn(clients, seconds)
                else:
                    with _receiver(name) if kind == "receiver" else nullcontext():
                        turn = _pgbench(name, clients, seconds)
                turns[kind].append(turn)
                say(f"  {kind:8} {turn.per_second:8.0f} a second, p99 {turn.latency_p99:.1f} ms")
    return _tell(turns, seconds)


# --- a turn --------------------------------------------------------------------------------------------------


def _pgbench(name: str, clients: int, seconds: int) -> Turn:
    argv = ["pgbench", "-U", "postgres", "-n", "-c", str(clients), "-j", "2", "-T", str(seconds)]
    script = f"cd /tmp && rm -f turn.* && {' '.join(argv)} -l --log-prefix=turn postgres && cat turn.* >&2"
    done = subprocess.run(
        ["docker", "exec", name, "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ToolFailed(f"pgbench ended with {done.returncode}: {done.stderr[-2000:]}")
    told = dict(line.split(" = ", 1) for line in done.stdout.splitlines() if " = " in line)
    # client, transaction, microseconds, script, epoch, microseconds of it
    lines = (line.split() for line in done.stderr.splitlines())
    latencies = [int(fields[2]) / 1000 for fields in lines if len(fields) == 6 and fields[2].isdigit()]
    return Turn(
        float(told["tps"].split()[0]), float(told["latency average"].split()[0]), _share(latencies, 99)
    )


@contextmanager
def _receiver(name: str) -> Iterator[None]:
    """It writes what comes into files, and flushes and compresses nothing; but it takes it at each commit."""
    argv = ["pg_receivewal", "-h", address(name), "-U", "postgres", "-D", "/tmp", "--no-sync"]
    with container(POSTGRES_IMAGE, *argv):
        ask = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'pg_receivewal'"
        wait_for(lambda: docker("exec", name, "psql", "-qXAtU", "postgres", "-c", ask).strip() == b"1", "it")
        yield


def _keep_clear(seconds: int) -> None:
    """Wait where a turn would meet the moment at which the log is put together."""
    now = datetime.now(UTC)
    meets = [(now + timedelta(seconds=s)).minute == _COMPACTED for s in range(0, seconds + 30, 10)]
    if any(meets):
        time.sleep(seconds + 90)


class _Home:
    """An agent, and the server that it records."""

    def __init__(self, work: Path, name: str) -> None:
        self._name = name
        self._agent = Agent(work, "orders", f'driver = "postgres"\ncontainer = "{name}"')

    def serving(self) -> AbstractContextManager[int]:
        """Its process; it has all of the log there was."""
        return self._agent.serving(self._caught_up)

    def _caught_up(self, recorder: Mapping[str, Any]) -> bool:
        sql(self._name, "SELECT pg_current_xact_id();")  # so that there is something to be stored
        lost = recorder["rpo_seconds"]
        return lost is not None and lost < 2

    def turn(self, clients: int, seconds: int) -> Turn:
        """One of pgbench, recorded meanwhile."""
        with self.serving() as pid:
            begun, before = time.time(), processor_seconds(pid)
            turn = _pgbench(self._name, clients, seconds)
            taken, spent = time.time() - begun, processor_seconds(pid) - before
            time.sleep(2)  # the last anchors become durable
        lags = tuple(self._lags(begun, begun + taken))
        return Turn(turn.per_second, turn.latency, turn.latency_p99, spent / taken, lags)

    def _lags(self, begun: float, ended: float) -> Iterator[float]:
        """An object is durable the moment its file has its name; its own time is that of its last byte."""
        repository = Repository.open(LocalStore(self._agent.repository))
        found: list[tuple[float, float]] = []
        for span in repository.logs("orders")[0]:
            stored = (self._agent.repository / log_key(span)).stat().st_mtime
            if stored >= begun:
                anchors = (anchor.at.timestamp() for anchor in read_header(repository, span).anchors)
                found += [(at, stored - at) for at in anchors if begun <= at <= ended]
        return (lag for _, lag in sorted(found))


# --- telling -----------------------------------------------------------------------------------------------------


def _tell(turns: dict[str, list[Turn]], seconds: int) -> dict[str, object]:
    middle = {
        kind: {
            "transactions a second": median(turn.per_second for turn in found),
            "latency, ms": median(turn.latency for turn in found),
            "latency p99, ms": median(turn.latency_p99 for turn in found),
        }
        for kind, found in turns.items()
    }
    alone = middle["alone"]
    ratio = {kind: {what: value / alone[what] for what, value in middle[kind].items()} for kind in KINDS[1:]}
    rows = [["recording", *KINDS, *(f"{kind} / alone" for kind in ratio)]]
    rows += [
        [
            what,
            *(f"{middle[kind][what]:.2f}" for kind in KINDS),
            *(f"{each[what]:.3f}" for each in ratio.values()),
        ]
        for what in alone
    ]
    lag = _lag([turn.lags for turn in turns["agent"]])
    agent = median(turn.agent for turn in turns["agent"])
    print(f"\n{layout(rows)}\n")
    print(
        f"medians of {len(turns['agent'])} turns of {seconds} s each; the agent took {agent:.3f} processors"
    )
    print("anchor to durable, s: " + ", ".join(f"{what} {value:.3f}" for what, value in lag.items()) + "\n")
    return {
        "medians": middle,
        "ratio": ratio,
        "lag": lag,
        "agent": agent,
        "all": {k: [asdict(turn) for turn in found] for k, found in turns.items()},
    }


def _lag(turns: Sequence[Sequence[float]]) -> dict[str, float]:
    """`growth`: the median of the last third of a turn over that of its first; 1 where it keeps up."""
    every = [lag for lags in turns for lag in lags]
    if not every:
        raise ToolFailed("no anchor was stored")
    thirds = [(lags[: len(lags) // 3], lags[-(len(lags) // 3) :]) for lags in turns if len(lags) >= 3]
    growth = [median(last) / median(first) for first, last in thirds]
    found = {"median": median(every), "p95": _share(every, 95), "max": max(every)}
    return {**found, "growth": median(growth)} if growth else found


def _share(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else sum(values)
