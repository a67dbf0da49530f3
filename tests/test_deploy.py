"""deploy/: each file is what it says, and the compose stack runs and is backed up as it stands."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import services as bed
from engine_proxy import engine_proxy

from backupd.demo import vectors

COMPOSE = Path(__file__).parent.parent / "deploy" / "compose"


def _program() -> list[str]:
    """The plugin where there is one, else the older program. A machine with neither fails."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return ["docker", "compose"]
    assert shutil.which("docker-compose"), "compose is missing; hint: tests/testbed/provision.sh compose"
    return ["docker-compose"]


class Stack:
    """A compose project in a copy of deploy/compose."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder = folder
        self.project = f"backupd-test-{secrets.token_hex(4)}"
        self._files = [part for file in files for part in ("-f", file)]

    def compose(self, *arguments: str, check: bool = True) -> str:
        """What it prints; AssertionError with all it said when it ends badly."""
        argv = [*_program(), "-p", self.project, *self._files, *arguments]
        ended = subprocess.run(argv, cwd=self.folder, capture_output=True, text=True, check=False)
        assert not check or ended.returncode == 0, f"{' '.join(argv)}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def backupd(self, *arguments: str) -> str:
        """A command in the agent's container."""
        return self.compose("exec", "-T", "backupd", "backupd", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deploy/compose with secrets made, as its first line says."""
    copy = tmp_path_factory.mktemp("compose") / "stack"
    shutil.copytree(COMPOSE, copy)
    subprocess.run([copy / "make-secrets.sh"], check=True)
    return copy


def _additions(stack: Stack, image: str) -> dict[str, Any]:
    """What a test adds: the image it built, and labels by which an interrupted run is swept."""
    mine = {"labels": bed.labels()}
    services: dict[str, Any] = {name: dict(mine) for name in stack.compose("config", "--services").split()}
    services["backupd"]["image"] = image
    volumes = dict.fromkeys(stack.compose("config", "--volumes").split(), mine)
    return {"services": services, "volumes": volumes, "networks": {"default": mine}}


@pytest.fixture(scope="module")
def stack(folder: Path, agent_image: str) -> Iterator[Stack]:
    """compose.yaml, running, with the image of this checkout."""
    additions = _additions(Stack(folder, "compose.yaml"), agent_image)
    (folder / "test.yaml").write_text(json.dumps(additions))  # JSON is YAML
    made = Stack(folder, "compose.yaml", "test.yaml")
    try:
        made.compose("up", "-d", "--no-build")
        yield made
    finally:
        made.compose("down", "-v", "-t", "5", check=False)


def test_secrets_are_made_once(folder: Path) -> None:
    """A second run keeps them: the servers were set up with the first."""
    before = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    subprocess.run([folder / "make-secrets.sh"], check=True)
    after = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    assert before == after
    assert before.keys() == {"pg_password", "redis_password"}
    assert all(len(text.strip()) >= 32 for text in before.values())


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "socket-proxy.yaml")])
def test_compose_accepts_its_files(folder: Path, files: tuple[str, ...]) -> None:
    """Syntax, and every volume, network and secret that is named is declared."""
    Stack(folder, *files).compose("config", "-q")


FILL_VECTORS = 'from backupd.demo import vectors; vectors.fill(("chroma", 8000))'


def _fill(stack: Stack, module_services: bed.Services) -> None:
    """Something in each of the four."""
    sql = "create table kept as select generate_series(1, 100) i"
    stack.compose("exec", "-T", "postgres", "psql", "-U", "productdemo", "-c", sql)
    script = 'redis-cli --no-auth-warning -a "$(cat /run/secrets/redis_password)" set kept yes'
    assert "OK" in stack.compose("exec", "-T", "redis", "sh", "-c", script)
    stack.compose("exec", "-T", "backupd", "python", "-c", FILL_VECTORS)
    volume = {f"{stack.project}_uploads": "/data"}
    write = ["sh", "-c", "echo kept >/data/kept.txt; chmod 600 /data/kept.txt; chown 4711 /data/kept.txt"]
    helper = module_services.container(bed.REDIS_IMAGE, write, volumes=volume)
    assert helper.container.wait(timeout=30)["StatusCode"] == 0


def test_the_stack_runs_and_is_backed_up_as_it_stands(stack: Stack, module_services: bed.Services) -> None:
    """Four sources, passwords from secrets, no socket: check is content, and each point can be read back."""
    _fill(stack, module_services)
    stack.backupd("init")
    stack.backupd("check")
    stack.backupd("backup", "productdemo")
    points = {point["source"]: point for point in json.loads(stack.backupd("list", "--json"))}
    assert points.keys() == {"orders", "sessions", "vectors", "uploads"}
    assert [point["warnings"] for point in points.values()] == [[]] * 4
    assert stack.backupd("cat", points["uploads"]["id"], "kept.txt") == "kept\n"
    assert "productdemo.dump" in stack.backupd("ls", points["orders"]["id"])
    stack.backupd("verify", "--data", "100%")


def test_the_servers_of_the_stack_let_nobody_in_without_the_secret(stack: Stack) -> None:
    """Redis has no password in its argument list, and has one all the same."""
    assert "NOAUTH" in stack.compose("exec", "-T", "redis", "redis-cli", "get", "kept")
    secret = (stack.folder / "secrets" / "redis_password").read_text().strip()
    assert secret not in stack.compose("top", "redis")


PROXIED = """
state = "./state"
[repository]
location = "./repository"
[sources.orders]
driver = "postgres"
container = "{postgres}"
[sources.sessions]
driver = "redis"
container = "{redis}"
[sources.vectors]
driver = "chroma"
container = "{chroma}"
[sources.uploads]
driver = "volume"
volume = "{volume}"
read_through = "helper"
helper_image = "{helper}"
"""


def test_the_socket_proxy_lets_through_what_is_needed_and_nothing_else(
    services: bed.Services, tmp_path: Path
) -> None:
    """Backup and restore through a proxy on TCP: each switch that is on is needed, and no other is."""
    postgres, redis, chroma = services.postgres(), services.redis(), services.chroma()
    postgres.exec("psql", "-U", "postgres", "-d", "app", "-c", "create table kept as select 1 as i")
    redis.exec("redis-cli", "set", "kept", "yes")
    vectors.fill((chroma.host, chroma.port))
    volume = services.volume()
    write = services.container(
        bed.REDIS_IMAGE, ["sh", "-c", "echo kept >/data/kept"], volumes={volume: "/data"}
    )
    write.container.wait(timeout=30)
    names = {"postgres": postgres.name, "redis": redis.name, "chroma": chroma.name}
    (tmp_path / "backupd.toml").write_text(PROXIED.format(volume=volume, helper=bed.REDIS_IMAGE, **names))
    sandbox = f"test-{secrets.token_hex(4)}"
    with engine_proxy() as proxy:
        env = {**os.environ, "DOCKER_HOST": f"tcp://127.0.0.1:{proxy.port}"}

        def backupd(*arguments: str) -> None:
            argv = [sys.executable, "-m", "backupd", *arguments]
            ended = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stdout + ended.stderr

        backupd("init")
        backupd("check")
        backupd("backup")
        try:
            backupd("restore", "--at", "latest", "--name", sandbox)
        finally:
            backupd("sandbox", "remove", sandbox)
        needed = proxy.switches
    switches = re.findall(r"^ +([A-Z]+): 1$", (COMPOSE / "socket-proxy.yaml").read_text(), re.MULTILINE)
    assert needed == set(switches)
