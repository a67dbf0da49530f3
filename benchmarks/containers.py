"""Containers that the corpora come from: started, asked, removed with their data."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import ToolFailed

POSTGRES_IMAGE = "postgres:16"
REDIS_IMAGE = "redis:7"


def docker(*argv: str, stdin: bytes | None = None) -> bytes:
    """What the program `docker` said. Raises ToolFailed when it ends badly."""
    if not shutil.which("docker"):
        raise ToolFailed("this part needs the program `docker` and an engine")
    done = subprocess.run(["docker", *argv], input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise ToolFailed(f"docker {' '.join(argv)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


@contextmanager
def container(image: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
    """One that runs; its name. `options` are those of `docker run`."""
    name = f"backupd-bench-{secrets.token_hex(4)}"
    docker("run", "--detach", "--name", name, "--label", "backupd.test=1", *options, image, *command)
    try:
        yield name
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)


def wait_for(ready: Callable[[], object], what: str, *, timeout: float = 120) -> None:
    """Ask until it is true. Raises ToolFailed when that takes too long."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise ToolFailed(f"{what} did not get ready")
        time.sleep(0.2)


@contextmanager
def postgres(*settings: str, data: Path | None = None) -> Iterator[str]:
    """A PostgreSQL server; its container. `data`: where its files shall lie here; they are at rest afterwards."""
    # Parallel queries share memory: Docker's 64 MB are too little for them.
    options = ["--env", "POSTGRES_HOST_AUTH_METHOD=trust", "--shm-size", "1g"]
    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
        options += ["--volume", f"{data}:/var/lib/postgresql/data"]
    flags = [word for setting in settings for word in ("-c", setting)]
    with container(POSTGRES_IMAGE, "postgres", *flags, options=tuple(options)) as name:
        # The image starts the server once for itself before it listens on the network.
        wait_for(lambda: _answers(name), POSTGRES_IMAGE)
        yield name
        if data is not None:
            docker("stop", "--time", "120", name)


def address(name: str) -> str:
    """Where a container is reached on the engine's network."""
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return docker("inspect", "--format", form, name).decode().strip()


def _answers(name: str) -> bool:
    return _succeeds("docker", "exec", name, "pg_isready", "-q", "-h", "127.0.0.1", "-U", "postgres")


def _succeeds(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def sql(name: str, script: str) -> None:
    """Run statements as the superuser. Raises ToolFailed at the first that fails."""
    psql = ("psql", "-qX", "-U", "postgres", "-v", "ON_ERROR_STOP=1")
    docker("exec", "-i", name, *psql, stdin=script.encode())


@contextmanager
def redis(*settings: str) -> Iterator[str]:
    """A Redis server that saves when it is told to; its container. `settings`: options of redis-server."""
    with container(REDIS_IMAGE, "redis-server", "--save", "", *settings) as name:
        wait_for(lambda: _succeeds("docker", "exec", name, "redis-cli", "ping"), REDIS_IMAGE)
        yield name
