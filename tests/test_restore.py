"""Restore: into fresh containers, a directory, one container. What it promises when all goes well and when not."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import docker
import pytest
import services as bed
from commands import Home, InsideHome
from conftest import StartService
from hypothesis import given
from hypothesis import strategies as st

from backupd import waiting
from backupd.backup import back_up
from backupd.errors import Interrupted, NoRecoveryPoint, RestoreFailed, UsageError
from backupd.model import (
    Archive,
    Capture,
    Container,
    ContainerSpec,
    Driver,
    Facts,
    Json,
    Problem,
    RecoveryPoint,
    Silence,
    Stream,
    Streams,
)
from backupd.plan import LATEST, RestorePlan, Step, plan_restore
from backupd.repository import Repository
from backupd.restore import (
    Work,
    compare,
    export_to_file,
    flatten,
    restore_to_container,
    restore_to_directory,
    restore_to_sandbox,
)
from backupd.sandbox.docker import DockerSandbox, Engine
from backupd.stores import MemoryStore


def utc_now() -> datetime:
    return datetime.now(UTC)


class Notes:
    """A driver of a very small service: a shell that keeps a file. Real containers, quick to start."""

    kind = "notes"

    def __init__(self, text: str = "hello", *, breaks: str = "", forgets: bool = False) -> None:
        self.text, self.breaks, self.forgets = text, breaks, forgets

    @contextmanager
    def capture(self, since: RecoveryPoint | None) -> Iterator[Capture]:
        chunks = iter([self.text.encode()])
        yield Capture(
            Streams([Stream("notes.txt", chunks)]), utc_now(), facts={"notes": {"length": len(self.text)}}
        )

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        return ContainerSpec(
            "redis:7",
            command=("sh", "-c", "touch /up && sleep 600"),
            volumes=("/data",),
            ready=("test", "-e", "/up"),
        )

    def load(self, archive: Archive, container: Container) -> None:
        if self.breaks == "load":
            raise RestoreFailed("the load broke", hint="look at it")
        if b"".join(container.exec(["ls", "/data"])):
            raise RestoreFailed("it holds data already", hint="take a fresh one")
        data = b"" if self.forgets else b"".join(archive.read("notes.txt"))
        b"".join(container.exec(["sh", "-c", "cat > /data/notes.txt"], stdin=[data]))

    def facts(self, container: Container) -> Facts:
        out = b"".join(container.exec(["cat", "/data/notes.txt"]))
        return {"notes": {"length": len(out)}}

    def check(self) -> list[Problem]:
        return []


@pytest.fixture(scope="module")
def engine(docker_client: docker.DockerClient) -> Engine:
    """The real one; a session without it fails."""
    return Engine()


@pytest.fixture
def sandbox(engine: Engine, docker_client: docker.DockerClient) -> Iterator[DockerSandbox]:
    """Its name is free; what is left of it is removed after the test."""
    made = DockerSandbox(engine, f"test-{secrets.token_hex(4)}", labels={"backupd.test": "1"})
    yield made
    made.destroy()


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStore(), clock=utc_now)


def captured(repository: Repository, **drivers: Driver) -> RestorePlan:
    for source, driver in drivers.items():
        back_up(source, driver, repository, clock=utc_now, progress=Silence(), stop=threading.Event())
    return plan_restore(repository.points(), LATEST, list(drivers))


def left_of(client: docker.DockerClient, sandbox: DockerSandbox) -> list[object]:
    """Everything that still carries the sandbox's label."""
    mine: dict[str, str | list[str] | bool] = {"label": f"backupd.sandbox={sandbox.name}"}
    return [
        *client.containers.list(all=True, filters=mine, ignore_removed=True),
        *client.networks.list(filters=mine),
        *client.volumes.list(filters=mine),
    ]


class Slow(Notes):
    """It answers when its third look has told how far it is."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        super().__init__()
        self.looks, self.stop = 0, stop

    def home(self, point: RecoveryPoint) -> ContainerSpec:
        return replace(super().home(point), command=("sleep", "600"))

    def starting(self, container: Container) -> str:
        self.looks += 1
        if self.looks == 3:
            b"".join(container.exec(["touch", "/up"]))
        if self.stop is not None:
            self.stop.set()
        return f"{self.looks} of 3"


# --- into a sandbox ----------------------------------------------------------------------------------


def test_sources_come_back_in_fresh_containers_that_reach_each_other_by_name(
    repository: Repository, sandbox: DockerSandbox
) -> None:
    """What, where, how big, how long, how far from T, and what was compared: the report has it all."""
    drivers: Mapping[str, Driver] = {"a": Notes("first"), "b": Notes("second note")}
    plan = captured(repository, **drivers)
    report = restore_to_sandbox(plan, lambda p: drivers[p.source], sandbox, Work(repository, utc_now))
    assert [r.step.source for r in report.restored] == ["a", "b"]
    for restored in report.restored:
        assert (restored.compared, restored.differences) == (1, ())
        assert restored.seconds > 0
        assert restored.image == "redis:7"
    made = sandbox.containers()
    assert b"".join(made["a"].exec(["cat", "/data/notes.txt"])) == b"first"
    assert b"".join(made["a"].exec(["getent", "hosts", "b"]))
    assert report.differences == {}


def test_a_restore_that_brought_nothing_back_is_not_called_a_success(
    repository: Repository, sandbox: DockerSandbox
) -> None:
    """The load ended well and the data is not there: the facts say so, by name; the data stays to be looked at."""
    plan = captured(repository, a=Notes("ten bytes!"))
    report = restore_to_sandbox(plan, lambda p: Notes(forgets=True), sandbox, Work(repository, utc_now))
    assert report.differences == {"a": ("notes.length: was 10, is 0",)}
    assert sandbox.containers()["a"].running


def test_a_failed_restore_destroys_what_it_made_and_names_every_failure(
    repository: Repository, sandbox: DockerSandbox, docker_client: docker.DockerClient, services: bed.Services
) -> None:
    """Containers, volumes and network go; nothing else on the engine does."""
    other = services.container(bed.REDIS_IMAGE, ["sleep", "infinity"], start=False)
    plan = captured(repository, a=Notes(), b=Notes())
    with pytest.raises(RestoreFailed, match="the load broke"):
        restore_to_sandbox(plan, lambda p: Notes(breaks="load"), sandbox, Work(repository, utc_now))
    assert left_of(docker_client, sandbox) == []
    assert docker_client.containers.get(other.name).status == "created"


def test_a_failed_restore_leaves_what_it_made_when_told_to(
    repository: Repository, sandbox: DockerSandbox, docker_client: docker.DockerClient
) -> None:
    """--keep, to look into it."""
    plan = captured(repository, a=Notes())
    with pytest.raises(RestoreFailed, match=r"^a: the load broke"):
        restore_to_sandbox(
            plan, lambda p: Notes(breaks="load"), sandbox, Work(repository, utc_now), keep=True
        )
    assert len(left_of(docker_client, sandbox)) >= 2


def test_a_service_that_does_not_come_up_fails_the_restore(
    repository: Repository, sandbox: DockerSandbox, docker_client: docker.DockerClient
) -> None:
    """With the container's last lines."""

    class Ends(Notes):
        def home(self, point: RecoveryPoint) -> ContainerSpec:
            return replace(super().home(point), command=("sh", "-c", "echo no disk; exit 3"))

    plan = captured(repository, a=Notes())
    with pytest.raises(RestoreFailed, match="no disk"):
        restore_to_sandbox(plan, lambda p: Ends(), sandbox, Work(repository, utc_now))
    assert left_of(docker_client, sandbox) == []


def test_a_restore_that_is_told_to_stop_stops_and_cleans_up(
    repository: Repository, sandbox: DockerSandbox, docker_client: docker.DockerClient
) -> None:
    """Between two steps and between two blocks."""
    plan = captured(repository, a=Notes())
    work = Work(repository, utc_now)

    class Stops(Notes):
        def load(self, archive: Archive, container: Container) -> None:
            work.stop.set()
            super().load(archive, container)

    with pytest.raises(Interrupted):
        restore_to_sandbox(plan, lambda p: Stops(), sandbox, work)
    assert left_of(docker_client, sandbox) == []


def test_a_point_that_holds_nothing_is_refused(repository: Repository, sandbox: DockerSandbox) -> None:
    """To restore nothing with success would be a lie."""
    plan = captured(repository, a=Notes())
    empty = RestorePlan(plan.at, (Step(replace(plan.steps[0].point, members=0), timedelta(0)),))
    with pytest.raises(RestoreFailed, match="holds nothing"):
        restore_to_sandbox(empty, lambda p: Notes(), sandbox, Work(repository, utc_now))
    with pytest.raises(UsageError):
        plan_restore(repository.points(), LATEST, [])
    with pytest.raises(NoRecoveryPoint):
        plan_restore(repository.points(), LATEST, ["a", "b"])


def test_a_service_that_starts_slowly_is_waited_for_and_told(
    repository: Repository, sandbox: DockerSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_TOLD_EVERY", 0)
    stages: list[str] = []

    class Told(Silence):
        def stage(self, text: str) -> None:
            stages.append(text)

    plan = captured(repository, a=Slow())
    restore_to_sandbox(plan, lambda p: Slow(), sandbox, Work(repository, utc_now, lambda step: Told()))
    at = stages.index("waiting until it answers")
    assert stages[at + 1 : at + 4] == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_restore_that_waits_hears_that_it_is_to_stop(
    repository: Repository, sandbox: DockerSandbox
) -> None:
    stop = threading.Event()
    plan, slow = captured(repository, a=Slow()), Slow(stop)
    with pytest.raises(Interrupted):
        restore_to_sandbox(plan, lambda p: slow, sandbox, Work(repository, utc_now, stop=stop))
    assert slow.looks == 1


# --- into one container ------------------------------------------------------------------------------


def test_one_source_comes_back_in_a_container_that_is_there(
    repository: Repository, engine: Engine, sandbox: DockerSandbox, start_container: StartService
) -> None:
    """Fresh and running; its facts are compared as in a sandbox."""
    plan = captured(repository, a=Notes("mine"))
    service = start_container("redis:7", ["sh", "-c", "touch /up && sleep 600"])
    target, work = engine.container(service.name), Work(repository, utc_now)
    report = restore_to_container(plan, lambda p: Notes(), target, work, ready=sandbox.wait_ready)
    assert report.restored[0].compared == 1
    assert service.exec("cat", "/data/notes.txt") == "mine"
    with pytest.raises(RestoreFailed, match="holds data already"):
        restore_to_container(plan, lambda p: Notes(), target, work, ready=sandbox.wait_ready)
    assert service.exec("cat", "/data/notes.txt") == "mine"


def test_one_container_takes_one_source(
    repository: Repository, engine: Engine, sandbox: DockerSandbox, start_container: StartService
) -> None:
    """And one that must not run yet is not stopped by us."""
    plan = captured(repository, a=Notes(), b=Notes())
    service = start_container("redis:7", ["sleep", "600"])
    target, work = engine.container(service.name), Work(repository, utc_now)
    with pytest.raises(UsageError, match="one container takes one source"):
        restore_to_container(plan, lambda p: Notes(), target, work, ready=sandbox.wait_ready)

    class Stopped(Notes):
        def home(self, point: RecoveryPoint) -> ContainerSpec:
            return replace(super().home(point), load_while="stopped")

    one = plan_restore(repository.points(), LATEST, ["a"])
    with pytest.raises(UsageError, match="is running"):
        restore_to_container(one, lambda p: Stopped(), target, work, ready=sandbox.wait_ready)
    assert target.running


# --- into a directory --------------------------------------------------------------------------------


def test_sources_come_back_as_files(repository: Repository, tmp_path: Path) -> None:
    """No engine and no driver is needed: on the worst day neither may be there."""
    plan = captured(repository, a=Notes("first"), b=Notes("second"))
    report = restore_to_directory(plan, tmp_path / "new" / "out", Work(repository, utc_now))
    assert (tmp_path / "new" / "out" / "a" / "notes.txt").read_text() == "first"
    assert (tmp_path / "new" / "out" / "b" / "notes.txt").read_text() == "second"
    assert len(report.restored) == 2


def test_nothing_is_ever_written_over(repository: Repository, tmp_path: Path) -> None:
    """A directory that holds anything is refused before anything is written, for all sources."""
    plan = captured(repository, a=Notes(), b=Notes())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    with pytest.raises(UsageError, match="b is not empty"):
        restore_to_directory(plan, tmp_path, Work(repository, utc_now))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["b", "b/mine"]


def test_a_directory_that_fails_half_way_leaves_no_half_tree(repository: Repository, tmp_path: Path) -> None:
    """A source is there under its name only when it is whole; what others made there stays."""
    plan = captured(repository, a=Notes("x" * 100_000))
    store = repository.store
    assert isinstance(store, MemoryStore)
    (pack,) = [info.key for info in store.list("packs/")]
    damaged = bytearray(store.get(pack))
    for n in range(20, 60):
        damaged[n] ^= 0xFF
    store.put(pack, bytes(damaged), overwrite=True)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(Exception, match="a") as raised:
        restore_to_directory(plan, tmp_path, Work(repository, utc_now))
    assert getattr(raised.value, "exit_code", None) == 22
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_an_earlier_restore_left_is_not_touched(repository: Repository, tmp_path: Path) -> None:
    """A killed restore's `.partial` may be all that somebody has."""
    plan = captured(repository, a=Notes())
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "file").write_text("x")
    with pytest.raises(UsageError, match=r"a\.partial is left"):
        restore_to_directory(plan, tmp_path, Work(repository, utc_now))
    assert (tmp_path / "a.partial" / "file").exists()


def test_an_export_is_a_plain_archive(repository: Repository, tmp_path: Path) -> None:
    """Standard tools read it; a file that is there is not replaced; a failure leaves nothing."""
    from backupd.archive import open_archive

    plan = captured(repository, a=Notes("n" * 5_000_000))
    archive = open_archive(repository, plan.steps[0].point)
    target = tmp_path / "a.tar.zst"
    export_to_file(archive, target, Silence())
    listing = subprocess.run(
        f"zstd -dc {target} | tar -tvf -", shell=True, capture_output=True, text=True, check=True
    ).stdout
    assert "5000000" in listing
    assert "notes.txt" in listing
    with pytest.raises(UsageError, match="there already"):
        export_to_file(archive, target, Silence())
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.zst"]


# --- facts -------------------------------------------------------------------------------------------

json_values: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
facts = st.dictionaries(st.text(max_size=5), json_values, max_size=4)


@given(facts)
def test_facts_equal_themselves(measured: dict[str, Json]) -> None:
    """Also after a journey through JSON, as they travel in the manifest."""
    import json

    assert compare(measured, json.loads(json.dumps(measured))) == ()


@given(facts, facts)
def test_facts_that_differ_are_named(before: dict[str, Json], after: dict[str, Json]) -> None:
    """Each key that was lost, came, or changed; and nothing else."""
    lines = compare(before, after)
    a, b = flatten(before), flatten(after)
    assert len(lines) == sum(a.get(k, ...) != b.get(k, ...) for k in {*a, *b})


# --- from outside, with real services ----------------------------------------------------------------


def test_a_stack_comes_back_from_the_command_line(
    tmp_path: Path,
    start_redis: StartService,
    start_container: StartService,
    docker_client: docker.DockerClient,
) -> None:
    """Redis and a directory, an earlier state, fresh containers; equal facts; then the sandbox is removed."""
    server = start_redis()
    server.exec("redis-cli", "set", "greeting", "hello")
    home = Home(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("before")
    home.configure(
        f"""
        [repository]
        location = "repo"
        [sources.cache]
        driver = "redis"
        container = "{server.name}"
        [sources.files]
        driver = "volume"
        path = "data"
        [stacks.shop]
        sources = ["cache", "files"]
        """
    )
    home.ok("init")
    home.ok("backup", "shop")
    instant = utc_now().isoformat()
    server.exec("redis-cli", "set", "greeting", "changed")
    (tmp_path / "data" / "a.txt").write_text("after, and longer")
    home.ok("backup", "shop")
    name = f"test-{secrets.token_hex(4)}"
    try:
        report = home.ok("restore", "shop", "--at", instant, "--name", name, "--json").json
        by_source = {r["source"]: r for r in report["restored"]}
        assert by_source["cache"]["compared"] > 0
        assert all(r["differences"] == [] for r in report["restored"])
        assert all(step["lands_at"] <= instant.replace("+00:00", "Z") for step in report["plan"]["steps"])
        container = docker_client.containers.get(by_source["cache"]["where"])
        assert container.exec_run(["redis-cli", "get", "greeting"]).output == b"hello\n"
        assert name in home.ok("sandbox").out
        assert "already" in home.refused("restore", "shop", "--at", instant, "--name", name, code=1).message
        assert docker_client.containers.get(str(container.id)).status == "running", (
            "another's sandbox was destroyed"
        )
        fresh = start_container("redis:7", ["redis-server"], port=6379, start=False)
        into_it = ("restore", "cache", "--at", instant, "--to", f"container:{fresh.name}")
        home.ok(*into_it)
        assert fresh.exec("redis-cli", "get", "greeting") == "hello\n"
        assert (
            "running"
            in home.refused(
                "restore", "cache", "--at", instant, "--to", f"container:{fresh.name}", code=2
            ).message
        )
    finally:
        home.run("sandbox", "remove", name)
    assert docker_client.networks.list(names=[f"backupd-{name}"]) == []
    out = home.ok("restore", "files", "--at", instant, "--to", "dir:out", "--json").json
    assert (tmp_path / "out" / "files" / "a.txt").read_text() == "before"
    assert out["restored"][0]["where"] == "out/files"


def test_a_repository_alone_restores_on_a_machine_that_knows_nothing(tmp_path: Path) -> None:
    """No configuration, no history: the location is enough."""
    home = InsideHome(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("hello")
    home.configure('[repository]\nlocation = "repo"\n[sources.files]\ndriver = "volume"\npath = "data"')
    home.ok("init")
    home.ok("backup")
    elsewhere = InsideHome(tmp_path / "elsewhere")
    elsewhere.path.mkdir()
    at_hand = ("--repository", str(tmp_path / "repo"))
    assert len(elsewhere.ok("list", "--json", *at_hand).json) == 1
    elsewhere.ok("restore", "--at", "latest", "--to", "dir:out", *at_hand)
    assert (elsewhere.path / "out" / "files" / "a.txt").read_text() == "hello"
    assert elsewhere.ok("cat", "files", "a.txt", *at_hand).raw == b"hello"


def test_what_the_target_has_no_room_for_is_named(tmp_path: Path) -> None:
    """Extended attributes onto a file system without any: the data comes back, the loss is told, exit code 3."""
    home = InsideHome(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("hello")
    os.setxattr(tmp_path / "data" / "a.txt", "user.note", b"kept")
    home.configure('[repository]\nlocation = "repo"\n[sources.files]\ndriver = "volume"\npath = "data"')
    home.ok("init")
    home.ok("backup")
    (tmp_path / "out").mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", tmp_path / "out"], check=True)
    try:
        done = home.run("restore", "--at", "latest", "--to", "dir:out")
        assert (tmp_path / "out" / "files" / "a.txt").read_text() == "hello"
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)
    assert done.code == 3
    assert "WARNING files: a.txt: its attribute user.note could not be set" in done.out
