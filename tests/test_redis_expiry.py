"""Keys whose time to live has passed since the instant of a restore: kept with the time that they had.

Nobody waits for them here: the source drops nothing by itself, and all its instants are dated a minute back, so that a
key of which a moment was left then had a minute.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import captured
import pytest
import services as bed
from commands import InsideHome
from conftest import StartService
from redis_exact import instant
from test_redis_pitr import DIGESTS, Kept, client, driver_of

from backupd.drivers import redis_expiry
from backupd.drivers.redis_expiry import command, keeping, refuse_old
from backupd.drivers.redis_home import refuse_used
from backupd.drivers.redis_wire import Connection, RedisAddress
from backupd.errors import RestoreFailed
from backupd.logs import read_logs
from backupd.model import Container, LogSpan
from backupd.repository import Repository
from backupd.sandbox.engine import Engine
from backupd.stores import LocalStore

MINUTE = timedelta(minutes=1)
MILLISECOND = timedelta(milliseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclasses.dataclass
class Recorded:
    """A base and its log, dated a minute back, and when each key of it expires."""

    kept: Kept
    base: captured.Held
    expires: dict[tuple[int, str], int]
    """Database and key -> milliseconds since 1970."""

    def restore(self, container: Container, *, log: bool) -> datetime:
        """To the end of the log, or the dump alone; the restored instant."""
        driver = self.kept.driver.keeping()
        if not log:
            driver.load(self.base, container)
            return self.base.point.instant
        driver.load_to(self.base, self.log(), None, container)
        container.start()
        said = driver.recovered(container)
        return datetime.fromisoformat(str(said.get("as_of") or said["holds_until"]))

    def log(self) -> Iterator[tuple[LogSpan, bytes]]:
        for span, data in read_logs(self.kept.repository, self.kept.chain().spans):
            anchors = tuple(one._replace(at=one.at - MINUTE) for one in span.anchors)
            yield dataclasses.replace(span, anchors=anchors), data


@pytest.fixture(scope="module")
def engine(docker_client: object) -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def recorded(module_services: bed.Services) -> Recorded:
    """Two keys whose time has passed, one in the dump and one in the log; one that has long to live; one for good."""
    source = module_services.redis(*DIGESTS)
    one = client(source)
    one.execute_command("DEBUG", "SET-ACTIVE-EXPIRE", "0")
    expires: dict[tuple[int, str], int] = {}

    def put(db: int, key: str, lives: float) -> None:
        expires[db, key] = round((time.time() + lives) * 1000)
        client(source, db).set(key, 1, pxat=expires[db, key])

    one.set("lasting", 1)
    put(0, "early", 0.5)
    kept = Kept(driver_of(source))
    with kept.recording():
        base = captured.take(kept.driver)
        put(0, "late", 0.5)
        put(3, "long", 1000)
        kept.wait_for(instant(one).offset)
    bed.wait_until(lambda: time.time() * 1000 > expires[0, "late"], timeout=20, what="the end of two keys")
    point = dataclasses.replace(base.point, instant=base.point.instant - MINUTE)
    return Recorded(kept, dataclasses.replace(base, point=point), expires)


def expiry(container: Container, keys: list[tuple[int, str]]) -> list[int]:
    """When keys of a restored server expire; it is started if it is not."""
    if not container.running:
        container.start()
    host, port = container.address(6379)
    service = bed.Service(None, container.name, host, port)  # type: ignore[arg-type]
    bed.wait_until(lambda: bed.redis_answers(service), timeout=30, what="the restored server")
    return [int(client(service, db).pexpiretime(key)) for db, key in keys]


@pytest.mark.parametrize(("appendonly", "log"), [("no", True), ("yes", True), ("no", False)])
def test_what_had_expired_is_there_with_the_time_it_had_at_the_instant(
    appendonly: str, log: bool, recorded: Recorded, services: bed.Services, engine: Engine
) -> None:
    """From the dump and from the log, whether the server keeps an append-only file or not. By as much as has passed
    since the instant all times are later, no matter how often the server is started."""
    argv = ["redis-server", "--appendonly", appendonly]
    home = engine.container(services.container(bed.REDIS_IMAGE, argv, port=6379, start=False).name)
    before = datetime.now(UTC)
    instant = recorded.restore(home, log=log)
    after = datetime.now(UTC)
    keys = [key for key in recorded.expires if log or key == (0, "early")]
    found = expiry(home, keys)
    moved = {now - recorded.expires[key] for key, now in zip(keys, found, strict=True)}
    assert len(moved) == 1
    assert before - MILLISECOND <= instant + moved.pop() * MILLISECOND <= after
    home.stop()
    assert expiry(home, keys) == found
    assert expiry(home, [(0, "lasting")]) == [-1]


def test_a_server_that_is_too_old_to_keep_them_is_refused_and_stays_empty(
    recorded: Recorded, services: bed.Services, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one that would do, held to be old."""
    home = engine.container(services.container(bed.REDIS_IMAGE, port=6379, start=False).name)
    with (
        monkeypatch.context() as patched,
        pytest.raises(RestoreFailed, match="cannot be kept on Redis") as failure,
    ):
        patched.setattr(redis_expiry, "OLDEST", 99)
        recorded.restore(home, log=True)
    assert "leave --expired out" in failure.value.hint
    assert not home.running
    refuse_used(home, "/data")


@pytest.mark.parametrize("version", ["6.2.14", "4.0.9", ""])
def test_versions_that_hide_such_keys_from_the_script_are_known(version: str) -> None:
    with pytest.raises(RestoreFailed, match="cannot be kept"):
        refuse_old({"redis_version": version})
    refuse_old({"redis_version": "7.0.15"})
    refuse_old({"redis_version": "7.2.4", "valkey_version": "9.1.2"})


def test_valkey_keeps_fields_of_hashes_too(start_valkey: StartService, tmp_path: Path) -> None:
    """An append-only file made by hand: all in it has long expired when the server starts."""
    probe = start_valkey("probe")
    with Connection(RedisAddress(probe.host, probe.port)) as server:
        now = server.time()
        last = keeping(server, now - MINUTE)
    ended = str((now - EPOCH) // MILLISECOND - 1000)
    words = [
        ("SELECT", "0"), ("SET", "key", "v", "PXAT", ended), ("HSET", "hash", "kept", "1", "lasting", "1"),
        ("HPEXPIREAT", "hash", ended, "FIELDS", "1", "kept"),
    ]  # fmt: skip
    folder = tmp_path / "fresh" / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_text("file appendonly.aof.1.incr.aof seq 1 type i\n")
    (folder / "appendonly.aof.1.incr.aof").write_bytes(b"".join(command(*one) for one in words) + last)
    one = client(start_valkey("fresh", "--appendonly", "yes"))
    assert 0 < one.pttl("key") < 60_000
    (left,) = one.execute_command("HPTTL", "hash", "FIELDS", "1", "kept")
    assert 0 < left < 60_000 and one.hlen("hash") == 2


def test_on_the_command_line_it_is_for_what_expires(start_redis: StartService, tmp_path: Path) -> None:
    """Of a stack its Redis; with files, or where nothing expires, it is refused before anything is made."""
    server = start_redis()
    one = client(server)
    one.set("session", 1, ex=1000)
    home = InsideHome(tmp_path)
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "a").write_text("a")
    home.configure(
        f'[repository]\nlocation = "repo"\n[sources.cache]\ndriver = "redis"\ncontainer = "{server.name}"\n'
        '[sources.uploads]\ndriver = "volume"\npath = "uploads"\n[stacks.shop]\nsources = ["cache", "uploads"]\n'
    )
    Repository.create(LocalStore(tmp_path / "repo", create=True), clock=lambda: datetime.now(UTC))
    home.ok("backup", "shop")
    keep = ("--expired", "keep")
    said = home.refused("restore", "--at", "latest", "shop", "--to", "dir:out", *keep, code=2)
    assert "files are restored as they are" in said.message and not (tmp_path / "out").exists()
    said = home.refused("restore", "--at", "latest", "uploads", *keep, code=2)
    assert "nothing of uploads expires" in said.message
    name = f"expiry-{time.time_ns()}"
    try:
        home.ok("restore", "--at", "latest", "shop", "--name", name, *keep)
        restored = Engine().container(f"backupd-{name}-cache")
        assert expiry(restored, [(0, "session")]) > [one.pexpiretime("session")]
    finally:
        home.run("sandbox", "remove", name)
