"""The demo's stack in containers: started, lost, and found again where a restore put it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol

from backupd.demo import orders
from backupd.demo.orders import Psql
from backupd.demo.uploads import Shell
from backupd.drivers.redis_wire import RedisAddress
from backupd.errors import ContainerError
from backupd.model import Container, ContainerSpec, Progress, Silence
from backupd.sandbox.docker import DockerContainer, DockerSandbox, Engine

POSTGRES, REDIS, CHROMA = "postgres:16", "redis:7", "chromadb/chroma:1.5.9"


@dataclass(frozen=True, slots=True)
class Services:
    """How the four services of a stack are reached: to fill them, to change them, to measure them."""

    orders: Psql
    sessions: RedisAddress
    vectors: tuple[str, int]
    uploads: Shell


class Stack(Protocol):
    """Where the demo happens."""

    @property
    def told(self) -> str:
        """For people: what it runs on."""

    @property
    def environment(self) -> dict[str, str]:
        """What `backupd` needs in its environment."""

    def start(self) -> Services: ...

    def sources(self) -> str:
        """The `[sources]` of the configuration that protects it."""

    def lose(self) -> None:
        """Servers and data are gone."""

    def restore_to(self) -> tuple[str, ...]:
        """Where `backupd restore` shall put it: its options."""

    def restored(self) -> Services:
        """What the restore made."""

    def close(self) -> None:
        """Nothing of it is left."""


class DockerStack:
    """Containers and volumes on a network of their own; a restore makes a sandbox beside it."""

    def __init__(self, engine: Engine, *, progress: Progress | None = None) -> None:
        self._engine = engine
        self._version = engine.ping()
        token = secrets.token_hex(3)
        self._stack = DockerSandbox(engine, f"demo-{token}", progress=progress or Silence())
        self._restored = f"demo-{token}-restored"
        self._containers: dict[str, Container] = {}
        self._password = secrets.token_urlsafe(12)

    @property
    def told(self) -> str:
        return f"in containers, Docker engine {self._version}"

    @property
    def environment(self) -> dict[str, str]:
        return {"DEMO_PASSWORD": self._password}

    def start(self) -> Services:
        for source, spec in self._specs().items():
            container = self._containers[source] = self._stack.create(source, spec)
            if spec.service:
                container.start()
        for source, spec in self._specs().items():
            if spec.service:
                self._stack.wait_ready(self._containers[source], spec)
        return self._services({s: self._engine.container(c.name) for s, c in self._containers.items()})

    def _specs(self) -> dict[str, ContainerSpec]:
        environment = {
            "POSTGRES_USER": orders.USER,
            "POSTGRES_DB": orders.DATABASE,
            "POSTGRES_PASSWORD": self._password,
        }
        # over TCP: the first server of the image's entry point, which is not the last, has only a socket
        ready = ("pg_isready", "-q", "-h", "127.0.0.1", "-U", orders.USER, "-d", orders.DATABASE)
        port = "exec 3<>/dev/tcp/127.0.0.1/8000"  # the image has no client; bash opens the port
        return {
            "orders": ContainerSpec(
                POSTGRES, env=environment, volumes=("/var/lib/postgresql/data",), port=5432, ready=ready
            ),
            "sessions": ContainerSpec(
                REDIS,
                # a replica's dump is otherwise put off by five seconds, in case another replica comes
                command=("redis-server", "--repl-diskless-sync-delay", "0"),
                volumes=("/data",),
                port=6379,
                ready=("sh", "-c", "redis-cli ping | grep -q PONG"),
            ),
            "vectors": ContainerSpec(CHROMA, volumes=("/data",), port=8000, ready=("bash", "-c", port)),
            "uploads": ContainerSpec(REDIS, volumes=("/data",), service=False),
        }

    def _services(self, containers: dict[str, DockerContainer]) -> Services:
        postgres = containers["orders"]
        volume = _volume(containers["uploads"])

        def psql(database: str, sql: str) -> str:
            argv = ("psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-U", orders.USER, "-d", database, "-f", "-")
            return b"".join(postgres.exec(argv, stdin=[sql.encode()])).decode()

        def shell(script: str) -> bytes:
            argv = ("sh", "-c", f"cd /volume\n{script}")
            return b"".join(self._engine.run_helper(REDIS, argv, volumes={volume: ("/volume", "rw")}))

        host, port = containers["sessions"].address(6379)
        return Services(psql, RedisAddress(host, port), containers["vectors"].address(8000), shell)

    def sources(self) -> str:
        names = {source: container.name for source, container in self._containers.items()}
        redis = self._containers["sessions"].address(6379)
        chroma = self._containers["vectors"].address(8000)
        volume = _volume(self._engine.container(names["uploads"]))
        return f"""\
[sources.orders]
driver = "postgres"
container = "{names["orders"]}"
user = "{orders.USER}"
password = "${{DEMO_PASSWORD}}"

[sources.sessions]
driver = "redis"
url = "redis://{redis[0]}:{redis[1]}/0"

[sources.vectors]
driver = "chroma"
container = "{names["vectors"]}"
url = "http://{chroma[0]}:{chroma[1]}"

[sources.uploads]
driver = "volume"
volume = "{volume}"
"""

    def lose(self) -> None:
        self._stack.destroy()

    def restore_to(self) -> tuple[str, ...]:
        return ("--to", "sandbox", "--name", self._restored)

    def restored(self) -> Services:
        return self._services(DockerSandbox.find(self._engine, self._restored).containers())

    def close(self) -> None:
        names = DockerSandbox.names(self._engine)
        for name in (self._stack.name, self._restored):
            if name in names:
                DockerSandbox.find(self._engine, name).destroy()
        self._engine.close()


def _volume(container: DockerContainer) -> str:
    """The volume that was made for it; its image may have brought others of its own, without a name."""
    for mount in container.inspect()["Mounts"]:
        if mount.get("Type") == "volume" and str(mount["Name"]).startswith(container.name):
            return str(mount["Name"])
    raise ContainerError(f"{container.name} has no volume of its own")
