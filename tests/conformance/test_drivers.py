"""What every driver must do: one suite for PostgreSQL, Redis, ChromaDB and volumes, on real servers.

Captured, written to a repository, read back, loaded into a fresh container: the facts are equal.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
import services as bed

from backupd.archive import open_archive
from backupd.backup import back_up
from backupd.config.models import ChromaSource, PostgresSource, RedisSource, SourceConfig, VolumeSource
from backupd.config.secret import Secret
from backupd.drivers import DRIVERS, make_driver
from backupd.errors import BackupdError, CaptureFailed, RestoreFailed, UsageError
from backupd.model import (
    Archive,
    Container,
    Driver,
    RecoveryPoint,
    RunStatus,
    Silence,
    Stream,
    Streams,
    TarStream,
)
from backupd.repository import Repository
from backupd.sandbox.docker import DockerSandbox, Engine
from backupd.stores import MemoryStore

PASSWORD = "a-secret-of-the-source"


def now() -> datetime:
    """The clock of a run."""
    return datetime.now(UTC)


@dataclass
class Case:
    """A filled source, and how to say that it is somewhere else."""

    source: SourceConfig
    absent: SourceConfig
    change: Callable[[], object]
    """Adds to the source."""
    measured: bool = True
    """False for volumes: the archive lists every file, and `load` itself compares with that."""


def make_postgres(services: bed.Services) -> Case:
    """A table and a role with a password."""
    service = services.postgres(password=PASSWORD)

    def add() -> None:
        service.exec("psql", "-U", "postgres", "-d", "app", "-c", "INSERT INTO t VALUES (1)")

    service.exec(
        "psql", "-U", "postgres", "-d", "app", "-c", "CREATE TABLE t AS SELECT generate_series(1, 1000) x"
    )
    return Case(PostgresSource(container=service.name), PostgresSource(container="nosuch"), add)


def make_redis(services: bed.Services) -> Case:
    """Keys of some types, behind a password."""
    service = services.redis(password=PASSWORD)
    auth = {"REDISCLI_AUTH": PASSWORD}
    for command in ("SET a 1", "RPUSH list 1 2 3", "HSET hash f v", "SET gone 1 EX 90000"):
        service.exec("redis-cli", *command.split(), env=auth)
    return Case(
        RedisSource(container=service.name, password=Secret(PASSWORD)),
        RedisSource(container="nosuch"),
        lambda: service.exec("redis-cli", "SET", "more", "1", env=auth),
    )


def make_chroma(services: bed.Services) -> Case:
    """A collection with documents."""
    service = services.chroma(volume=services.volume())
    base = "/api/v2/tenants/default_tenant/databases/default_database/collections"

    def post(path: str, body: object) -> dict[str, str]:
        connection = http.client.HTTPConnection(service.host, service.port, timeout=30)
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status < 300, text
        found: dict[str, str] = json.loads(text)
        return found

    collection = post(base, {"name": "docs"})["id"]

    def add(first: int = 0, count: int = 1) -> None:
        ids = range(first, first + count)
        body = {
            "ids": [f"id{i}" for i in ids],
            "embeddings": [[float(i % 7), float(i % 11), float(i)] for i in ids],
            "documents": [f"document {i}" for i in ids],
            "metadatas": [{"n": i} for i in ids],
        }
        post(f"{base}/{collection}/add", body)

    add(0, 50)
    return Case(
        ChromaSource(container=service.name, url=f"http://{service.host}:{service.port}"),
        ChromaSource(container="nosuch"),
        lambda: add(1000, 20),
    )


def make_volume(services: bed.Services) -> Case:
    """A few files and a link in a Docker volume."""
    volume = services.volume()
    writer = services.container(bed.REDIS_IMAGE, ["sleep", "1000"], volumes={volume: "/v"}, init=True)
    writer.exec("sh", "-c", "mkdir -p /v/a/b; echo x > /v/a/b/file; ln -s file /v/a/b/link; touch /v/empty")
    return Case(
        VolumeSource(volume=volume, helper_image=bed.REDIS_IMAGE),
        VolumeSource(volume="backupd-nosuch"),
        lambda: writer.exec("sh", "-c", "echo more > /v/more"),
        measured=False,
    )


MAKERS = {"chroma": make_chroma, "postgres": make_postgres, "redis": make_redis, "volume": make_volume}
ENGINE = Engine()


@pytest.fixture(scope="module", params=sorted(MAKERS))
def case(request: pytest.FixtureRequest, module_services: bed.Services) -> Case:
    """One filled source of each kind."""
    return MAKERS[request.param](module_services)


@pytest.fixture
def repository() -> Repository:
    """A repository in memory."""
    return Repository.create(MemoryStore(), clock=now)


@pytest.fixture
def sandbox() -> Iterator[DockerSandbox]:
    """Where things are restored."""
    made = DockerSandbox(ENGINE, f"test-{time.time_ns()}", labels=bed.labels())
    yield made
    made.destroy()


def backed_up(case: Case, repository: Repository) -> tuple[Driver, RecoveryPoint]:
    """One backup of it; the driver and the new point."""
    driver = make_driver(case.source, ENGINE)
    run = back_up(
        "source", driver, repository, clock=now, progress=Silence(), stop=threading.Event(), allow_shrink=True
    )
    assert run.status in {RunStatus.OK, RunStatus.WARNED}
    return driver, repository.find(run.point)


def restored(driver: Driver, archive: Archive, sandbox: DockerSandbox, name: str = "source") -> Container:
    """As `restore` does it."""
    spec = driver.home(archive.point)
    container = sandbox.create(name, spec)
    if spec.load_while == "running":
        container.start()
        sandbox.wait_ready(container, spec)
    driver.load(archive, container)
    if spec.load_while == "stopped" and spec.service:
        container.start()
        sandbox.wait_ready(container, spec)
    return container


def test_the_table_names_every_driver() -> None:
    """Each has a case here, and a kind nobody brings is refused with the list."""
    assert sorted(DRIVERS) == sorted(MAKERS)
    with pytest.raises(UsageError, match="no driver 'nosuch'") as failure:
        make_driver(RedisSource(driver="nosuch"), ENGINE)  # type: ignore[arg-type]
    assert "postgres" in failure.value.hint


def test_what_was_captured_comes_back(case: Case, repository: Repository, sandbox: DockerSandbox) -> None:
    """In a fresh container the facts are equal; they and the attributes are JSON, and hold no secret."""
    assert [p for p in make_driver(case.source, ENGINE).check() if p.fatal] == []
    before = now()
    driver, point = backed_up(case, repository)
    assert before <= point.instant <= point.finished
    assert point.driver == driver.kind
    assert bool(point.facts) == case.measured
    told = json.dumps([dict(point.facts), dict(point.attributes), point.warnings])
    assert PASSWORD not in told
    archive = open_archive(repository, point)
    container = restored(driver, archive, sandbox)
    facts = driver.facts(container)
    assert facts
    assert facts == point.facts or not case.measured
    with pytest.raises(RestoreFailed) as failure:  # it holds data now
        driver.load(archive, container)
    assert failure.value.hint
    assert driver.facts(container) == facts


def test_a_later_change_is_in_the_later_point_only(
    case: Case, repository: Repository, sandbox: DockerSandbox
) -> None:
    """Each point brings back its own state, and the facts, or the size, tell them apart."""
    driver, first = backed_up(case, repository)
    case.change()
    _, second = backed_up(case, repository)
    assert first.instant < second.instant
    assert (first.facts, first.size) != (second.facts, second.size)
    earlier = driver.facts(restored(driver, open_archive(repository, first), sandbox, "earlier"))
    later = driver.facts(restored(driver, open_archive(repository, second), sandbox, "later"))
    assert earlier != later
    if case.measured:
        assert (earlier, later) == (first.facts, second.facts)


def test_a_capture_given_up_leaves_the_source_alone(case: Case, repository: Repository) -> None:
    """Half-way through the reader fails; the next backup is as good as any."""
    driver = make_driver(case.source, ENGINE)
    with pytest.raises(ZeroDivisionError), driver.capture(None) as capture:
        if isinstance(capture.content, Streams):
            stream: Stream = next(iter(capture.content.streams))
            next(stream.chunks)
        elif isinstance(capture.content, TarStream):
            capture.content.file.read(100)
        raise ZeroDivisionError
    _, point = backed_up(case, repository)
    assert point.members


def test_a_source_that_is_not_there_fails_in_one_line(case: Case, repository: Repository) -> None:
    """`check` finds it, a backup fails with it, no point is made."""
    driver = make_driver(case.absent, ENGINE)
    problems = [problem for problem in driver.check() if problem.fatal]
    assert problems
    assert all("\n" not in problem.message for problem in problems)
    with pytest.raises(BackupdError) as failure:
        back_up("source", driver, repository, clock=now, progress=Silence(), stop=threading.Event())
    assert isinstance(failure.value, CaptureFailed)
    assert "\n" not in failure.value.message
    assert failure.value.hint
    assert repository.points() == []
