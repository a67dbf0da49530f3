"""A PostgreSQL at work beside pgBackRest: base backups while it runs, and back to an instant, ready for connections.

pgBackRest archives every segment; backupd records the log through `serve`. Both see the same server, in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from backupd.codec import DEFAULT_LEVEL
from benchmarks.agent import Agent
from benchmarks.containers import docker
from benchmarks.corpus import tree_size
from benchmarks.goals import Goal, Verdict
from benchmarks.measure import Taken, ToolFailed, run
from benchmarks.objectstore import free_ports
from benchmarks.pgdata import Cluster, as_owner
from benchmarks.report import layout, tell_verdicts
from benchmarks.scenario import Say
from benchmarks.tools import backupd_argv, clean_env

_CLIENTS = 4
_MARKS = "CREATE TABLE marks (at timestamptz NOT NULL DEFAULT clock_timestamp())"
_STEPS = ("full", "second", "restore")
_SETTINGS = """
driver = "postgres"
url = "postgresql://postgres@127.0.0.1:{port}/postgres"
log_interval = "1s"
max_rate = "unlimited"
"""
_TOUCHED = 8 << 30  # bytes: a restored cluster with its log fills the page cache
_WARNED = 3  # the first base comes before anything records its log


@dataclass(slots=True)
class _Rival:
    """One tool's place for one round."""

    base: Path
    cluster: Cluster
    taken: dict[str, Taken] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def repository(self) -> Path:
        return self.base / "repository"

    def measure(self, step: str, argv: list[str], env: dict[str, str], *allowed: int) -> None:
        before = tree_size(self.repository)
        self.taken[step] = run(
            argv, cwd=self.base, env=env, log=self.base / "log", allowed=(0, *allowed), touched=_TOUCHED
        )
        self.sizes[step] = tree_size(self.repository) - before


def bench_cluster(
    work: Path, server: Path, *, scale: int, few: int, rounds: int, say: Say
) -> dict[str, object]:
    """Medians by tool and step."""
    work.mkdir(parents=True)
    cluster = Cluster(server, work / "server", free_ports(1)[0])
    say(f"pgbench of scale {scale}")
    cluster.create()
    with cluster.running():
        cluster.pgbench("-i", "-q", "-s", str(scale))
        cluster.sql(_MARKS)
    taken: dict[str, list[_Rival]] = {"backupd": [], "pgbackrest": []}
    for number in range(1, rounds + 1):
        ours, theirs = (_Rival(work / f"{name}-{number}", cluster) for name in taken)
        _round(ours, theirs, few=max(1, few // _CLIENTS), first=number % 2 == 0)
        for name, rival in (("backupd", ours), ("pgbackrest", theirs)):
            taken[name].append(rival)
            told = ", ".join(f"{step} {rival.taken[step].seconds:.2f} s" for step in _STEPS)
            say(f"  {name:10} {told}")
    return _tell(taken, f"PostgreSQL, pgbench of scale {scale}")


def _round(ours: _Rival, theirs: _Rival, *, few: int, first: bool) -> None:
    cluster = ours.cluster
    for rival in (ours, theirs):
        rival.base.mkdir()
    as_owner(theirs.base)
    rest = _pgbackrest(theirs.base, cluster)
    archive = " ".join([*rest, "archive-push", "%p"])
    with ExitStack() as stack:
        stack.enter_context(cluster.listening("-c archive_mode=on", f"-c archive_command='{archive}'"))
        agent = Agent(ours.base, "cluster", _SETTINGS.format(port=cluster.port))
        env = agent.env
        theirs.repository.mkdir()
        as_owner(theirs.repository)
        their_env = clean_env(theirs.base)
        run(cluster.owner([*rest, "stanza-create"]), cwd=theirs.base, env=their_env, log=theirs.base / "log")

        def back_up(step: str, kind: str) -> None:
            full = [*rest, "backup", f"--type={kind}"]
            work: list[Callable[[], None]] = [
                lambda: ours.measure(step, [*backupd_argv(), "-q", "backup", "cluster"], env, _WARNED),
                lambda: theirs.measure(step, cluster.owner(full), their_env),
            ]
            for one in reversed(work) if first else work:
                cluster.sql("CHECKPOINT")
                one()

        back_up("full", "full")
        stack.enter_context(agent.serving())  # it makes a base of its own when its recording begins
        cluster.pgbench("-n", "-c", str(_CLIENTS), "-j", "2", "-t", str(few))
        back_up("second", "incr")
        cluster.pgbench("-n", "-c", str(_CLIENTS), "-j", "2", "-t", str(few))
        cluster.sql("INSERT INTO marks DEFAULT VALUES")
        at = datetime.now(UTC)
        time.sleep(0.01)
        cluster.sql("INSERT INTO marks DEFAULT VALUES; SELECT pg_switch_wal()")
        expected = cluster.sql(f"SELECT count(*) FROM marks WHERE at <= '{at.isoformat()}'")
        time.sleep(3)  # until both have what was written
    _restore(ours, theirs, at, env, expected)


def _restore(ours: _Rival, theirs: _Rival, at: datetime, env: dict[str, str], expected: str) -> None:
    name = f"bench-{os.getpid()}-{ours.base.name}"
    argv = [
        *backupd_argv(), "-q", "restore", "--at", at.isoformat(), "--name", name, "cluster",
    ]  # fmt: skip
    try:
        ours.measure("restore", argv, env)
        found = docker("ps", "-q", "--filter", f"label=backupd.sandbox={name}").decode().split()
        asked = ["psql", "-qXAt", "-U", "postgres", "-c", "SELECT count(*) FROM marks"]
        _same(docker("exec", found[0], *asked).decode().strip(), expected, "backupd")
    finally:
        run([*backupd_argv(), "-q", "sandbox", "remove", name], cwd=ours.base, env=env, log=ours.base / "log",
            allowed=(0, 1, 2))  # fmt: skip
    restored = Cluster(
        theirs.cluster.server, theirs.base / "pg", free_ports(1)[0]
    )  # a socket has 107 bytes for its path
    restored.place.mkdir()
    as_owner(restored.place)
    rest = _pgbackrest(theirs.base, restored)
    back = [
        *rest,
        "restore",
        "--process-max=2",
        "--type=time",
        f"--target={at.isoformat(sep=' ')}",
        "--target-action=promote",
    ]
    theirs.measure("restore", restored.recovered(back), clean_env(theirs.base))
    try:
        _same(restored.sql("SELECT count(*) FROM marks"), expected, "pgbackrest")
    finally:
        restored.stop()


def _same(found: str, expected: str, tool: str) -> None:
    if found != expected:
        raise ToolFailed(f"{tool} restored {found} marks instead of {expected}")


def _pgbackrest(base: Path, cluster: Cluster) -> list[str]:
    """Its command for this server; what a command does not take is ignored in a file only."""
    settings = base / f"{cluster.place.name}.conf"
    settings.write_text(
        f"[global]\nrepo1-path={base / 'repository'}\nrepo1-retention-full=9\nlog-path={base}\n"
        f"lock-path={base / 'lock'}\nlog-level-file=off\nlog-level-console=warn\ncompress-type=zst\n"
        f"compress-level={DEFAULT_LEVEL}\nprocess-max=2\nstart-fast=y\n"
        f"[main]\npg1-path={cluster.data}\npg1-socket-path={cluster.place}\npg1-port={cluster.port}\n"
    )
    return ["pgbackrest", f"--config={settings}", "--stanza=main"]


def _tell(taken: dict[str, list[_Rival]], what: str) -> dict[str, object]:
    middle = {
        name: {
            **{f"{step}, s": median(r.taken[step].seconds for r in rivals) for step in _STEPS},
            **{f"{step}, processor s": median(r.taken[step].processor for r in rivals) for step in _STEPS},
            **{f"{step}, memory MB": median(r.taken[step].memory / 1e6 for r in rivals) for step in _STEPS},
            **{f"{step}, stored MB": median(r.sizes[step] / 1e6 for r in rivals) for step in _STEPS[:2]},
        }
        for name, rivals in taken.items()
    }
    print(f"\ncluster: {what}\n")
    rows = [["", *middle], *([key, *(f"{middle[n][key]:.2f}" for n in middle)] for key in middle["backupd"])]
    print(layout(rows) + "\n")
    ours, theirs = middle["backupd"], middle["pgbackrest"]
    seconds = [f"{step}, s" for step in _STEPS]
    verdicts = [Verdict(Goal(key, "pgbackrest", 1.0), ours[key] / theirs[key]) for key in seconds]
    tell_verdicts(verdicts)
    return {"what": what, "medians": middle, "goals": [verdict.row() for verdict in verdicts]}
