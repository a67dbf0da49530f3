"""The demo's stack without containers: the same real servers as processes of this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from backupd.demo import orders, programs, vectors
from backupd.demo.stack import Services
from backupd.drivers.redis_wire import Connection, RedisAddress
from backupd.errors import BackupdError

NOBODY = 65534
"""Who PostgreSQL runs as where we are root, whom it refuses."""

Process = subprocess.Popen[bytes]


class EmbeddedStack:
    """Servers on 127.0.0.1 with their data in `folder`; a restore makes files, and new servers are given them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._password = secrets.token_urlsafe(12)
        self._postgres = programs.postgres_folder()
        self._redis = programs.redis_server()
        self._chroma = programs.chroma_server()
        self._running: list[Process] = []
        self._ports: dict[str, int] = {}
        folder.chmod(0o711)  # PostgreSQL's own user passes through it

    @property
    def told(self) -> str:
        return "as processes of this machine, without containers"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self._postgres}{os.pathsep}{os.environ.get('PATH', '')}"
        return {"DEMO_PASSWORD": self._password, "PATH": path}

    def start(self) -> Services:
        home = self._folder / "stack"
        for name in ("sessions", "vectors", "uploads"):
            (home / name).mkdir(parents=True)
        return self._start(home)

    def _start(self, home: Path) -> Services:
        """Servers on what is in `home`; PostgreSQL always on an empty cluster."""
        self._start_postgres(home / "cluster")
        self._start_redis(home / "sessions")
        self._start_chroma(home / "vectors")

        def shell(script: str) -> bytes:
            return self._run(["sh", "-c", f"cd '{home / 'uploads'}'\n{script}"])

        redis = RedisAddress(port=self._ports["sessions"])
        return Services(self._psql, redis, ("127.0.0.1", self._ports["vectors"]), shell)

    def sources(self) -> str:
        home = self._folder / "stack"
        return f"""\
[sources.orders]
driver = "postgres"
url = "postgresql://{orders.USER}@127.0.0.1:{self._ports["orders"]}/{orders.DATABASE}"
password = "${{DEMO_PASSWORD}}"

[sources.sessions]
driver = "redis"
url = "redis://127.0.0.1:{self._ports["sessions"]}/0"

[sources.vectors]
driver = "chroma"
path = "{home / "vectors"}"
url = "http://127.0.0.1:{self._ports["vectors"]}"

[sources.uploads]
driver = "volume"
path = "{home / "uploads"}"
"""

    def lose(self) -> None:
        self._stop()
        shutil.rmtree(self._folder / "stack")

    def restore_to(self) -> tuple[str, ...]:
        return ("--to", f"dir:{self._folder / 'restored'}")

    def restored(self) -> Services:
        """Servers started on what the restore wrote; the dump is loaded as RECOVER.md says."""
        home = self._folder / "restored"
        services = self._start(home)
        self._load(home / "orders")
        return services

    def close(self) -> None:
        self._stop()

    # --- servers ---------------------------------------------------------------------------------------

    def _start_postgres(self, cluster: Path) -> None:
        owner = NOBODY if os.geteuid() == 0 else None
        cluster.mkdir(parents=True)
        if owner is not None:
            os.chown(cluster, owner, owner)
        port = self._ports["orders"] = _free_port()
        password = self._folder / "password"
        password.write_text(self._password)
        password.chmod(0o644)
        tool = str(self._postgres / "initdb")
        self._run(
            [tool, "-D", str(cluster), "-U", orders.USER, "--pwfile", str(password), "-A", "scram-sha-256",
             "-E", "UTF8", "--locale=C", "--no-sync"], owner=owner,
        )  # fmt: skip
        password.unlink()
        self._spawn(
            [str(self._postgres / "postgres"), "-D", str(cluster), "-p", str(port), "-k", "",
             "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"], owner=owner,
        )  # fmt: skip
        self._wait("PostgreSQL", lambda: self._psql("postgres", "SELECT 1") == "1\n")
        self._psql("postgres", f"CREATE DATABASE {orders.DATABASE}")

    def _start_redis(self, folder: Path) -> None:
        port = self._ports["sessions"] = _free_port()
        # a replica's dump is otherwise put off by five seconds, in case another replica comes
        options = ["--bind", "127.0.0.1", "--dir", str(folder), "--repl-diskless-sync-delay", "0"]
        self._spawn([self._redis, "--port", str(port), *options])

        def answers() -> bool:
            with Connection(RedisAddress(port=port), timeout=2) as redis:
                return redis.call("PING") == b"PONG"

        self._wait("Redis", answers)

    def _start_chroma(self, folder: Path) -> None:
        port = self._ports["vectors"] = _free_port()
        arguments = ["run", "--path", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        self._spawn([*self._chroma, *arguments])
        self._wait("ChromaDB", lambda: bool(vectors.ask(("127.0.0.1", port), "GET", "/api/v2/heartbeat")))

    def _load(self, dumps: Path) -> None:
        """Roles first, then each database, with PostgreSQL's own tools."""
        mine = f"CREATE ROLE {orders.USER};"  # whom this cluster was made with
        roles = (dumps / "globals.sql").read_text().splitlines()
        self._psql("postgres", "\n".join(line for line in roles if line != mine))
        there = self._psql("postgres", "SELECT datname FROM pg_database").splitlines()
        for dump in sorted(dumps.glob("*.dump")):
            database = unquote(dump.stem)
            if database not in there:
                self._psql("postgres", f'CREATE DATABASE "{database}" TEMPLATE template0')
            argv = [str(self._postgres / "pg_restore"), "--exit-on-error", *self._to(database), str(dump)]
            self._run(argv)

    def _psql(self, database: str, sql: str) -> str:
        options = ["-XqAt", "-v", "ON_ERROR_STOP=1", *self._to(database), "-f", "-"]
        return self._run([str(self._postgres / "psql"), *options], stdin=sql.encode()).decode()

    def _to(self, database: str) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self._ports["orders"]), "-U", orders.USER, "-d", database]

    # --- processes -------------------------------------------------------------------------------------

    def _run(self, argv: Sequence[str], *, stdin: bytes = b"", owner: int | None = None) -> bytes:
        ended = subprocess.run(
            argv, input=stdin, capture_output=True, env=self._environment(), check=False, cwd=self._folder,
            user=owner, group=owner,
        )  # fmt: skip
        if ended.returncode != 0:
            said = ended.stderr.decode(errors="replace").strip()
            raise BackupdError(f"{Path(argv[0]).name} ended with {ended.returncode}: {said[-500:]}")
        return ended.stdout

    def _spawn(self, argv: Sequence[str], *, owner: int | None = None) -> None:
        with (self._folder / "servers.log").open("ab") as log:
            self._running.append(
                subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(),
                    cwd=self._folder, user=owner, group=owner,
                    process_group=0,  # Ctrl-C is for us: we stop them, in order
                )
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PGPASSWORD": self._password, "LC_ALL": "C.UTF-8"}

    def _wait(self, what: str, ready: Callable[[], bool], *, timeout: float = 60.0) -> None:
        deadline, said = time.monotonic() + timeout, ""
        while True:
            try:
                if ready():
                    return
            except BackupdError as error:
                said = error.message
            if self._running[-1].poll() is not None or time.monotonic() > deadline:
                log = (self._folder / "servers.log").read_text(errors="replace")
                raise BackupdError(f"{what} did not come up: {said}\n{log[-1000:]}")
            time.sleep(0.05)

    def _stop(self) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
