"""The files of a PostgreSQL at rest, beside pgBackRest: full, incremental, restore."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backupd.codec import DEFAULT_LEVEL
from benchmarks.corpus import tree_size
from benchmarks.goals import MOST_MEMORY, Goal
from benchmarks.measure import ToolFailed
from benchmarks.scenario import Say, Scenario, Step
from benchmarks.tools import Bench, clean_env, first_line

_MOST = 0.5
_USER = "postgres"
_CLIENTS = 4


@dataclass(slots=True)
class PgBackRest:
    """Without its server: no checkpoint and no WAL to wait for, which is the quickest it can be."""

    name: str = "pgbackrest"
    note: str = f"only for PGDATA: --no-online, zst level {DEFAULT_LEVEL}, process-max 2; keeps SHA-1 digests"

    def version(self) -> str:
        return first_line(["pgbackrest", "version"])

    def env(self, bench: Bench) -> dict[str, str]:
        return clean_env(bench.base)

    def init(self, bench: Bench) -> list[str]:
        bench.repository.mkdir()
        return [*self._argv(bench, bench.tree), "stanza-create", "--no-online"]

    def backup(self, bench: Bench, number: int) -> list[str]:
        kind = "full" if number == 1 else "incr"
        return [
            *self._argv(bench, bench.tree), "backup", "--no-online", f"--type={kind}", "--compress-type=zst",
            f"--compress-level={DEFAULT_LEVEL}", "--process-max=2", "--repo1-retention-full=9",
        ]  # fmt: skip

    def restore(self, bench: Bench) -> list[str]:
        bench.restored.mkdir()
        return [*self._argv(bench, bench.restored), "restore", "--process-max=2"]

    def found(self, bench: Bench) -> Path:
        return bench.restored

    def _argv(self, bench: Bench, data: Path) -> list[str]:
        return [
            "pgbackrest", "--config=/dev/null", "--stanza=main", f"--pg1-path={data}",
            f"--repo1-path={bench.repository}", f"--log-path={bench.base}", f"--lock-path={bench.base / 'lock'}",
            "--log-level-file=off", "--log-level-console=warn",
        ]  # fmt: skip


def programs() -> Path | None:
    """Where Debian keeps the newest server's. Debian's pgBackRest knows Debian's PostgreSQL; it may not know the
    one in the containers."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


def pgdata(work: Path, server: Path, *, scale: int, few: int, many: int, say: Say) -> Scenario:
    """pgbench's tables; few transactions, then many. Each leaves the files at rest."""
    work.mkdir(parents=True)
    say(f"pgbench of scale {scale}")
    cluster = Cluster(server, work / "server")
    cluster.create()
    with cluster.running():
        cluster.pgbench("-i", "-q", "-s", str(scale))
    size = tree_size(cluster.data)
    each, more = max(1, few // _CLIENTS), max(1, many // _CLIENTS)
    first, second = f"{few:,} tx", f"{many:,} tx"
    steps = (
        Step("full"),
        Step(first, lambda number: cluster.transactions(each, seed=number)),
        Step(second, lambda number: cluster.transactions(more, seed=1000 + number), restore="restore"),
    )
    goals = (
        *(Goal(f"{step}, s", "pgbackrest", _MOST) for step in ("full", first, second, "restore")),
        *(Goal(f"memory {step}, bytes", "", MOST_MEMORY) for step in ("full", first, second, "restore")),
    )
    what = f"PGDATA {size / 1e6:,.0f} MB"
    return Scenario("pgdata", what, cluster.data, steps, goals, compare=("base", "global", "pg_xact"))


def as_owner(path: Path) -> None:
    """Give a directory to the server's user, when we are root."""
    if os.geteuid() == 0:
        shutil.chown(path, _USER, _USER)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A PostgreSQL of this machine; its server runs as a user of its own when we are root. It answers on a socket in
    its own directory."""

    server: Path
    place: Path
    port: int = 5432

    @property
    def data(self) -> Path:
        return self.place / "data"

    def create(self) -> None:
        self.place.mkdir()
        as_owner(self.place)
        self._run("initdb", "-D", str(self.data), "-U", _USER, "-A", "trust", "--data-checksums", "--no-sync")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leaves its files at rest."""
        with self._started("-c listen_addresses=", "-c fsync=off", "-c max_wal_size=256MB"):
            yield
        # Caches that pgBackRest leaves out: they would only make its restore differ.
        for cache in self.data.rglob("pg_internal.init"):
            cache.unlink()
        shutil.rmtree(self.data / "base" / "pgsql_tmp", ignore_errors=True)

    @contextmanager
    def listening(self, *options: str) -> Iterator[None]:
        """As a server in use: on a port of this machine too, every commit flushed."""
        with self._started("-c listen_addresses=127.0.0.1", "-c max_wal_size=2GB", *options):
            yield

    @contextmanager
    def _started(self, *options: str) -> Iterator[None]:
        self._run(*self._start(*options))
        try:
            yield
        finally:
            self.stop()

    def _start(self, *options: str) -> list[str]:
        given = " ".join((f"-k {self.place}", f"-c port={self.port}", "-c shared_buffers=256MB", *options))
        return [
            "pg_ctl",
            "-D",
            str(self.data),
            "-w",
            "-s",
            "-l",
            str(self.place / "log"),
            "-o",
            given,
            "start",
        ]

    def recovered(self, restore: list[str]) -> list[str]:
        """A command that restores, starts the server and ends when it is promoted."""
        start = shlex.join(self._program(self._start("-c listen_addresses=", "-c archive_mode=off")))
        ask = shlex.join(self._program(self._psql("SELECT pg_is_in_recovery()")))
        script = f'{shlex.join(restore)} && {start} && until [ "$({ask})" = f ]; do sleep 0.05; done'
        return self.owner(["sh", "-c", script])

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-w", "-s", "-m", "fast", "stop")

    def pgbench(self, *argv: str) -> None:
        self._run("pgbench", *argv, "-h", str(self.place), "-p", str(self.port), "-U", _USER, "postgres")

    def sql(self, statements: str) -> str:
        """What psql prints of it, bare."""
        return self._run(*self._psql(statements)).strip()

    def _psql(self, statements: str) -> list[str]:
        return [
            "psql", "-qXAt", "-v", "ON_ERROR_STOP=1", "-h", str(self.place), "-p", str(self.port), "-U", _USER,
            "-c", statements, "postgres",
        ]  # fmt: skip

    def transactions(self, each: int, *, seed: int) -> None:
        with self.running():
            self.pgbench("-n", "-c", str(_CLIENTS), "-j", "2", "-t", str(each), f"--random-seed={seed}")

    def owner(self, argv: list[str]) -> list[str]:
        """The same command as the server's user."""
        if os.geteuid():
            return argv
        return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", *argv]

    def _program(self, argv: list[str]) -> list[str]:
        return [str(self.server / argv[0]), *argv[1:]]

    def _run(self, *argv: str) -> str:
        log = self.place / "said"
        with log.open("wb") as out:  # a file, not a pipe: the server keeps it open
            done = subprocess.run(
                self.owner(self._program([*argv])), cwd=self.place, stdout=out, stderr=out, check=False
            )
        said = log.read_text(errors="replace")
        if done.returncode:
            raise ToolFailed(f"{' '.join(argv)}: {said[-2000:]}")
        return said
