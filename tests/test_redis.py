"""Redis, against real servers: captured by every way, restored with the append-only file off and on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import secrets
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import captured
import pytest
import redis as redis_py
import services as bed
from conftest import StartService

from backupd.drivers.redis import RedisDriver, RedisSettings
from backupd.drivers.redis_home import Home, layout
from backupd.drivers.redis_wire import Connection, RedisAddress
from backupd.errors import BackupdError, CaptureFailed, RestoreFailed
from backupd.sandbox.docker import DockerSandbox
from backupd.sandbox.engine import Engine
from backupd.waiting import StartingDriver


@pytest.fixture
def engine(docker_client: object) -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def start_redis(services: bed.Services) -> StartService:
    """As everywhere, without the seconds that a server waits for more replicas before it sends a dump."""
    return lambda *args, **options: services.redis("--repl-diskless-sync-delay", "0", *args, **options)


@pytest.fixture
def sandbox(engine: Engine) -> Iterator[DockerSandbox]:
    made = DockerSandbox(engine, f"test-{secrets.token_hex(4)}", labels=bed.labels())
    yield made
    made.destroy()


def client(service: bed.Service, db: int = 0) -> Any:
    """redis-py, whose annotations allow every answer to be a future; it shares no code with the driver."""
    return redis_py.Redis(
        service.host, service.port, db, password=service.password or None, socket_timeout=20
    )


def address(service: bed.Service) -> RedisAddress:
    return RedisAddress(service.host, service.port, password=service.password)


def driver(
    service: bed.Service, engine: Engine | None = None, *, way: str = "auto", path: Path | None = None
) -> RedisDriver:
    """Over TCP; with an engine, through the container too."""
    where = (lambda: engine.container(service.name)) if engine else None
    at = None if engine else address(service)
    return RedisDriver(RedisSettings(at, way, path, password=service.password), container=where)


def fill(service: bed.Service) -> None:
    """Every type of value, three databases, keys that expire, a function."""
    one = client(service)
    with one.pipeline() as batch:
        for n in range(2000):
            batch.set(f"s:{n}", secrets.token_bytes(60))
        batch.execute()
    one.set("compressible", "x" * 50_000)
    one.set("number", 12345)
    one.rpush("list", *map(str, range(1000)))
    one.rpush("blobs", secrets.token_bytes(20_000), secrets.token_bytes(20_000))
    one.sadd("numbers", *range(100))
    one.sadd("set", *(f"m{n}" for n in range(1000)))
    one.zadd("zset", {f"m{n}": n / 3 for n in range(1000)})
    one.hset("small", mapping={"a": "1"})
    one.hset("hash", mapping={f"f{n}": str(n) for n in range(1000)})
    for n in range(300):
        one.xadd("stream", {"n": str(n)})
    one.xgroup_create("stream", "g", 0)
    one.xreadgroup("g", "reader", {"stream": ">"}, count=20)
    for n in range(7):
        one.set(f"short:{n}", "v", ex=3600)
    client(service, 3).set("third", "v")
    client(service, 15).mset({f"k{n}": "v" for n in range(20)})
    one.execute_command(
        "FUNCTION", "LOAD", "#!lua name=lib\nredis.register_function('f', function() return 1 end)"
    )


PERSISTENT = {"0": 2010, "15": 20, "3": 1}


def digest(service: bed.Service) -> str:
    """Redis' own digest of everything it holds."""
    return str(client(service).execute_command("DEBUG", "DIGEST"))


def persistent(service: bed.Service) -> dict[str, int]:
    keys = client(service).info("keyspace")
    return {name[2:]: v["keys"] - v["expires"] for name, v in keys.items()}


def wait_for_link(replica: bed.Service) -> None:
    """Until a replica has what its master has."""
    up = client(replica)
    bed.wait_until(
        lambda: up.info("replication")["master_link_status"] == "up", timeout=30, what="the replica"
    )


# --- capture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["wire", "container", "file"])
def test_each_way_brings_the_same_data(way: str, start_redis: StartService, engine: Engine) -> None:
    """The dump is whole, holds every key, and its facts are what the server held."""
    source = start_redis("--enable-debug-command", "yes")
    fill(source)
    where = engine.container(source.name).mount("/data") if way == "file" else None
    taken = captured.take(driver(source, engine if way == "container" else None, way=way, path=where))
    assert taken.point.facts == {"persistent_keys": PERSISTENT, "functions": 1}
    assert taken.point.attributes["expiring_keys"] == {"0": 7}
    assert not taken.point.warnings
    assert str(taken.point.attributes["version"]).startswith("7.")

    fresh = start_redis("--enable-debug-command", "yes")
    copy = engine.container(fresh.name)
    driver(fresh, engine).load(taken, copy)
    fresh.refresh_port(6379)
    assert digest(fresh) == digest(source)
    assert driver(fresh, engine).facts(copy) == taken.point.facts


def test_what_was_acknowledged_before_the_instant_is_in(start_redis: StartService, engine: Engine) -> None:
    """While clients write all the time, and by every way; the instant is the server's own time."""
    source = start_redis("--repl-diskless-sync-delay", "1")
    stop = threading.Event()
    acknowledged: list[tuple[float, int]] = []

    def write() -> None:
        writer, n = client(source), 0
        while not stop.is_set():
            n += 1
            writer.set(f"n:{n}", n)
            acknowledged.append((time.time(), n))
            time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for way in ("wire", "container"):
            time.sleep(0.3)
            taken = captured.take(driver(source, engine if way == "container" else None, way=way))
            instant = taken.point.instant.timestamp()
            facts: Any = taken.point.facts
            kept = facts["persistent_keys"]["0"]
            before = max(n for at, n in acknowledged if at < instant)
            after = [n for at, n in acknowledged if at > instant + 1.1]
            assert kept >= before, way
            assert not after or kept < max(after) + 1, way
    finally:
        stop.set()
        thread.join()


def test_no_replica_stays_attached(start_redis: StartService) -> None:
    """After the dump over the wire the server feeds nobody."""
    source = start_redis()
    captured.take(driver(source, way="wire"))
    bed.wait_until(
        lambda: client(source).info("replication")["connected_slaves"] == 0, timeout=30, what="no replica"
    )


@pytest.mark.parametrize("diskless", ["yes", "no"])
def test_both_framings_of_a_dump_over_the_wire(diskless: str, start_redis: StartService) -> None:
    """With a mark at the end where it is sent as it is made, with its length where it was a file first."""
    source = start_redis("--repl-diskless-sync", diskless)
    client(source).mset({f"k{n}": "v" * 1000 for n in range(3000)})
    assert captured.take(driver(source)).point.facts["persistent_keys"] == {"0": 3000}


def test_a_save_under_way_is_awaited_and_another_one_taken(start_redis: StartService, engine: Engine) -> None:
    """What is written after the first fork is in the backup."""
    source = start_redis("--rdb-key-save-delay", "2000", "--save", "")
    one = client(source)
    one.mset({f"k{n}": "v" for n in range(500)})
    one.bgsave()
    one.set("written while it saved", "v")
    assert one.info("persistence")["rdb_bgsave_in_progress"] == 1
    taken = captured.take(driver(source, engine, way="container"))
    assert taken.point.facts["persistent_keys"] == {"0": 501}
    assert one.info("persistence")["rdb_saves"] == 2


def test_a_server_that_does_not_count_its_saves(
    start_redis: StartService, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before version 7 only LASTSAVE tells of a new save, in whole seconds: two in one second are told apart."""
    told = Connection.info
    hidden = {"rdb_saves"}
    monkeypatch.setattr(
        Connection, "info", lambda *args: {k: v for k, v in told(*args).items() if k not in hidden}
    )
    source = start_redis("--save", "")
    for count in range(1, 4):
        client(source).set(f"k{count}", "v")
        taken = captured.take(driver(source, engine, way="container"))
        assert taken.point.facts["persistent_keys"] == {"0": count}


def test_a_dump_begun_at_the_turn_of_a_second_is_taken(start_redis: StartService, engine: Engine) -> None:
    """It dates itself by the kernel's coarse clock, which may still show the second before."""
    source = start_redis("--save", "")
    client(source).set("k", "v")
    for _ in range(5):
        time.sleep(1 - time.time() % 1)
        captured.take(driver(source, engine, way="wire"))


def test_a_failed_save_fails_the_capture(start_redis: StartService, engine: Engine) -> None:
    """Its old dump.rdb stays readable all the while: status, not only presence, is looked at."""
    source = start_redis("--save", "")
    client(source).set("k", "v")
    captured.take(driver(source, engine, way="container"))
    client(source).set("k2", "v")
    source.exec("chmod", "555", "/data")
    source.exec("chown", "root", "/data")
    with pytest.raises(CaptureFailed, match="BGSAVE failed") as failure:
        captured.take(driver(source, engine, way="container"))
    assert "disk full" in failure.value.hint


def test_the_dump_of_another_server_is_refused(start_redis: StartService, tmp_path: Path) -> None:
    """`path` points to some old dump.rdb: the wrong place would be backed up for years."""
    source = start_redis()
    client(source).set("k", "v")
    old = captured.take(driver(source, way="wire")).files["dump.rdb"]
    time.sleep(1.1)
    (tmp_path / "dump.rdb").write_bytes(old)
    with pytest.raises(CaptureFailed, match="older than the save"):
        captured.take(driver(source, way="file", path=tmp_path))


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_damage_on_the_way_fails_the_capture(
    harm: str, start_redis: StartService, engine: Engine, tmp_path: Path
) -> None:
    """A file on a disk that lies: told at the end of the stream, before a recovery point can be made."""
    source = start_redis()
    client(source).mset({f"k{n}": "v" * 1000 for n in range(2000)})
    mounted = engine.container(source.name).mount("/data")
    assert mounted is not None

    class Lying(RedisDriver):
        def _dump(self, *args: object) -> tuple[object, Iterator[bytes]]:  # type: ignore[override]
            before, chunks = super()._dump(*args)  # type: ignore[arg-type]
            data = bytearray(b"".join(chunks))
            data[len(data) // 2] ^= harm == "flip"
            return before, iter([bytes(data[: -1000 if harm == "cut" else None])])

    with pytest.raises(CaptureFailed, match=r"damaged|cut off"):
        captured.take(Lying(RedisSettings(address(source), "file", mounted)))


def test_a_server_killed_half_way_fails_the_capture(start_redis: StartService) -> None:
    """The stream ends early, so it raises: half a dump never becomes a recovery point."""
    source = start_redis()
    one = client(source)
    for n in range(60):
        one.set(f"big:{n}", secrets.token_bytes(1_000_000))
    with pytest.raises(CaptureFailed, match="closed the connection"), driver(source).capture(None) as capture:
        for stream in capture.content.streams:  # type: ignore[union-attr]
            for number, _ in enumerate(stream.chunks):
                if number == 20:
                    source.container.kill()


def test_a_stream_that_nobody_read_makes_no_point(start_redis: StartService) -> None:
    """A capture whose content was left unread ends with an error."""
    with pytest.raises(CaptureFailed, match="not read to its end"), driver(start_redis()).capture(None):
        pass


def test_a_dump_without_checksum_is_a_warning(start_redis: StartService) -> None:
    """`rdbchecksum no`: the backup is made, and says what it cannot promise."""
    source = start_redis("--rdbchecksum", "no")
    assert any("no checksum" in w for w in captured.take(driver(source)).point.warnings)


# --- who may ask ---------------------------------------------------------------------------------------


WIRE_RIGHTS = ["+ping", "+time", "+info", "+config|get", "+psync", "+replconf"]
FILE_RIGHTS = ["+ping", "+time", "+info", "+config|get", "+bgsave", "+lastsave"]


@pytest.mark.parametrize(("way", "rights"), [("wire", WIRE_RIGHTS), ("file", FILE_RIGHTS)])
def test_the_documented_rights_are_enough_and_each_is_needed(
    way: str, rights: list[str], start_redis: StartService, engine: Engine
) -> None:
    """The ACL user of the driver's documentation."""
    import backupd.drivers.redis as module

    assert " ".join(rights) in (module.__doc__ or "")
    source = start_redis(password="admin")
    client(source).set("k", "v")
    admin = client(source)
    admin.execute_command("ACL", "SETUSER", "backupd", "on", ">pw", "-@all", *rights)
    at = RedisAddress(source.host, source.port, username="backupd", password="pw")
    path = engine.container(source.name).mount("/data")
    mine = RedisDriver(RedisSettings(at, way, path))
    assert not mine.check()
    assert captured.take(mine).point.facts["persistent_keys"] == {"0": 1}
    admin.execute_command("ACL", "SETUSER", "backupd", "-psync", "-bgsave")
    with pytest.raises(CaptureFailed, match="NOPERM") as failure:
        captured.take(mine)
    assert "+psync" in failure.value.hint


def test_a_missing_and_a_wrong_password_are_told_apart(start_redis: StartService) -> None:
    """One line and a hint each; the password itself is in neither, nor in any repr."""
    source = start_redis(password="right-password")
    for given, word in (("", "NOAUTH"), ("wrong-password", "WRONGPASS")):
        at = RedisAddress(source.host, source.port, password=given)
        mine = RedisDriver(RedisSettings(at, password=given))
        with pytest.raises(CaptureFailed, match=word) as failure:
            captured.take(mine)
        assert failure.value.hint
        problems = mine.check()
        assert problems and problems[0].fatal and word in problems[0].message
        shown = f"{failure.value} {failure.value.hint} {at!r} {problems}"
        assert not given or given not in shown


def test_a_server_that_is_not_there(docker_client: object) -> None:
    """One line, a hint, the exit code of a failed capture."""
    (port,) = bed.free_ports(1)
    mine = RedisDriver(RedisSettings(RedisAddress("127.0.0.1", port)))
    with pytest.raises(CaptureFailed, match="no Redis server answers") as failure:
        captured.take(mine)
    assert failure.value.exit_code == 20 and failure.value.hint
    assert mine.check()[0].fatal


def test_a_server_that_speaks_something_else() -> None:
    """A web server at that port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with contextlib.suppress(OSError):
                there, _ = listener.accept()
                there.recv(100)
                there.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                there.close()

        thread = threading.Thread(target=answer)
        thread.start()
        at = RedisAddress("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(CaptureFailed, match="does not speak"):
            captured.take(RedisDriver(RedisSettings(at)))
        thread.join()


def test_addresses_are_read_from_urls() -> None:
    """Credentials, TLS, sockets; the password shows nowhere."""
    at = RedisAddress.of_url("rediss://me:p%40ss@example.org:7000/0?ssl_ca_certs=/ca.pem")
    assert (at.host, at.port, at.tls, at.ca_file, at.username) == ("example.org", 7000, True, "/ca.pem", "me")
    assert at.password == "p@ss" and "p@ss" not in f"{at} {at!r}"
    assert RedisAddress.of_url("unix:///run/redis.sock").unix == "/run/redis.sock"
    for wrong in ("http://x", "redis://x:port"):
        with pytest.raises(BackupdError):
            RedisAddress.of_url(wrong)


def test_facts_can_be_left_out(start_redis: StartService) -> None:
    """Then nothing is counted; the dump is checked all the same."""
    source = start_redis()
    client(source).set("k", "v")
    point = captured.take(RedisDriver(RedisSettings(address(source), facts=False))).point
    assert point.facts == {} and point.size > 0


def test_over_tls(services: bed.Services, tmp_path: Path) -> None:
    """`rediss://`: the server's certificate is checked, against the authority that is given."""
    source, certificate = services.redis_over_tls(tmp_path)
    url = f"rediss://{source.host}:{source.port}"
    mine = RedisDriver(RedisSettings(RedisAddress.of_url(f"{url}?ssl_ca_certs={certificate}")))
    bed.wait_until(lambda: not mine.check(), timeout=20, what="Redis over TLS")
    assert captured.take(mine).point.facts == {"persistent_keys": {}, "functions": 0}
    with pytest.raises(CaptureFailed, match="certificate"):
        captured.take(RedisDriver(RedisSettings(RedisAddress.of_url(url))))


# --- restore -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("appendonly", ["no", "yes"])
def test_a_restore_survives_two_restarts_with_a_replica_attached(
    appendonly: str, sandbox: DockerSandbox, start_redis: StartService
) -> None:
    """A server with an append-only file ignores dump.rdb; a replica must get the data, not wipe it."""
    source = start_redis("--appendonly", appendonly)
    fill(source)
    mine = driver(source)
    taken = captured.take(mine)

    spec = mine.home(taken.point)
    assert spec.image == "redis:7" and spec.load_while == "stopped"
    assert ("--appendonly" in spec.command) == (appendonly == "yes")
    home = sandbox.create("cache", spec)
    mine.load(taken, home)
    assert not home.running
    replica = None
    for _ in range(3):
        home.start()
        sandbox.wait_ready(home, spec)
        assert mine.facts(home) == taken.point.facts
        host, port = home.address(6379)
        restored: Any = redis_py.Redis(host, port, socket_timeout=20)
        assert restored.config_get("appendonly")["appendonly"] == appendonly
        restored.config_set("repl-diskless-sync-delay", 0)
        if replica is None:
            replica = start_redis(
                "--repl-timeout", "3", "--replicaof", "cache", "6379", network=sandbox.network
            )
        wait_for_link(replica)
        assert persistent(replica) == PERSISTENT
        restored.set("written after", "v")
        restored.delete("written after")
        home.stop()


def test_a_server_that_loads_for_long_tells_how_far_it_is(
    start_redis: StartService, services: bed.Services, engine: Engine
) -> None:
    """So it is waited for as long as it gets on, and not for two minutes; here each key takes it half a millisecond."""
    source = start_redis("--enable-debug-command", "yes", "--rdbcompression", "no")
    client(source).execute_command("DEBUG", "POPULATE", "3000", "key", "1000")
    taken = captured.take(driver(source))
    slow = ["--key-load-delay", "500", "--loading-process-events-interval-bytes", "65536"]
    made = services.container(bed.REDIS_IMAGE, ["redis-server", *slow], port=6379, start=False)
    home, mine = engine.container(made.name), driver(source)
    assert isinstance(mine, StartingDriver)
    mine.load(taken, home)
    home.start()
    seen: list[str] = []

    def loaded() -> bool:
        seen.append(mine.starting(home))
        return seen[-1] == "" and len(set(seen)) > 2

    bed.wait_until(loaded, timeout=60, what="the loading server")
    assert all(re.fullmatch(r"(loading its data: \d of 2 MiB)?", said) for said in seen)


@pytest.mark.parametrize("appendonly", ["no", "yes"])
def test_a_running_fresh_container_is_restored_into_and_keeps_running(
    appendonly: str, start_redis: StartService, engine: Engine
) -> None:
    """Also where the server was set up with a password and saves of its own."""
    source = start_redis()
    fill(source)
    taken = captured.take(driver(source))
    fresh = start_redis("--appendonly", appendonly, "--save", "1 1", password="pw")
    target = engine.container(fresh.name)
    mine = driver(fresh, engine)
    mine.load(taken, target)
    assert target.running
    assert mine.facts(target) == taken.point.facts
    fresh.refresh_port(6379)
    assert client(fresh).config_get("appendonly")["appendonly"] == appendonly


def test_a_server_that_holds_keys_is_refused_and_untouched(start_redis: StartService, engine: Engine) -> None:
    """Nothing is overwritten, and it goes on running."""
    source = start_redis()
    taken = captured.take(driver(source))
    used = start_redis()
    client(used).set("mine", "precious")
    with pytest.raises(RestoreFailed, match="already holds keys") as failure:
        driver(used, engine).load(taken, engine.container(used.name))
    assert failure.value.hint
    assert client(used).get("mine") == b"precious"


@pytest.mark.parametrize("used_as", ["no", "yes"])
def test_a_stopped_server_that_holds_data_is_refused_and_untouched(
    used_as: str, start_redis: StartService, services: bed.Services, engine: Engine
) -> None:
    """Also where it would not show: a dump.rdb beside `appendonly yes` is ignored by the server itself."""
    taken = captured.take(driver(start_redis()))
    volume = services.volume()
    used = start_redis("--appendonly", used_as, volume=volume)
    client(used).set("mine", "precious")
    used.container.stop()
    for mode in ("no", "yes"):
        made = services.container(
            bed.REDIS_IMAGE,
            ["redis-server", "--appendonly", mode],
            port=6379,
            volumes={volume: "/data"},
            start=False,
        )
        target = engine.container(made.name)
        with pytest.raises(RestoreFailed, match="already holds data"):
            driver(made, engine).load(taken, target)
        assert not target.running
    used.container.start()
    used.refresh_port(6379)
    bed.wait_until(lambda: bed.redis_answers(used), timeout=20, what="the used server")
    assert client(used).get("mine") == b"precious"


def test_a_replica_is_no_place_to_restore_into(
    start_redis: StartService, services: bed.Services, engine: Engine
) -> None:
    """Its master would wipe what was restored."""
    net = services.network()
    start_redis(network=net, aliases=["master"])
    replica = start_redis("--replicaof", "master", "6379", network=net)
    taken = captured.take(driver(start_redis()))
    with pytest.raises(RestoreFailed, match="replica of master"):
        driver(replica, engine).load(taken, engine.container(replica.name))


@pytest.mark.parametrize("appendonly", ["no", "yes"])
def test_valkey_with_types_of_its_own(appendonly: str, start_valkey: StartService, tmp_path: Path) -> None:
    """Its dumps begin with other letters, and hold hashes whose fields expire; by both ways, and back."""
    source = start_valkey("source")
    one = client(source)
    one.mset({f"k{n}": "v" for n in range(50)})
    one.hset("hash", mapping={"a": "1", "b": "2"})
    one.execute_command("HEXPIRE", "hash", "10000", "FIELDS", "1", "a")
    client(source, 5).set("k", "v")
    by_file = RedisDriver(RedisSettings(address(source), "file", tmp_path / "source"))
    facts = {"persistent_keys": {"0": 51, "5": 1}, "functions": 0}
    assert captured.take(by_file).point.facts == facts
    taken = captured.take(driver(source))
    assert taken.point.facts == facts
    assert taken.files["dump.rdb"].startswith(b"VALKEY")
    assert driver(source).home(taken.point).image == "valkey/valkey:9"

    dump = taken.files["dump.rdb"]
    tar = b"".join(layout(Home(appendonly=appendonly == "yes"), len(dump), taken.read("dump.rdb")))
    (tmp_path / "fresh").mkdir()
    with tarfile.open(fileobj=io.BytesIO(tar)) as found:
        found.extractall(tmp_path / "fresh", filter="data")
    fresh = start_valkey("fresh", "--appendonly", appendonly)
    assert persistent(fresh) == {"0": 51, "5": 1}


def test_more_than_sixteen_databases_find_a_home(start_redis: StartService, sandbox: DockerSandbox) -> None:
    """A fresh server has sixteen, and ends when it is given a dump with more."""
    source = start_redis("--databases", "40")
    client(source, 33).set("k", "v")
    mine = driver(source)
    taken = captured.take(mine)
    spec = mine.home(taken.point)
    home = sandbox.create("cache", spec)
    mine.load(taken, home)
    home.start()
    sandbox.wait_ready(home, spec)
    assert mine.facts(home) == taken.point.facts == {"persistent_keys": {"33": 1}, "functions": 0}


def test_a_server_before_version_7_finds_one_file() -> None:
    """Redis 6 appends to appendonly.aof itself: a second name of it would change with it."""
    tar = b"".join(layout(Home(appendonly=True, major=6), 5, [b"REDIS"]))
    with tarfile.open(fileobj=io.BytesIO(tar)) as found:
        assert found.getnames() == ["appendonly.aof"]
    seven = b"".join(layout(Home(appendonly=True), 5, [b"RED", b"IS"]))
    with tarfile.open(fileobj=io.BytesIO(seven)) as found:
        assert [e.islnk() for e in found if e.name == "dump.rdb"] == [True]
        assert {e.uid for e in found} == {999}


def test_an_archive_shorter_than_it_says_is_refused() -> None:
    """The tar would end in the middle of a file."""
    with pytest.raises(RestoreFailed, match="off its length"):
        list(layout(Home(), 10, [b"REDIS"]))


def test_an_image_for_a_server_without_a_container(start_redis: StartService) -> None:
    """The newest of its major version, or the source's very own."""
    source = start_redis()
    taken = captured.take(driver(source))
    point = taken.point
    assert driver(source).home(point).image == "redis:7"
    about = {**point.attributes, "server": "valkey", "version": "8.1.2"}
    assert driver(source).home(dataclasses.replace(point, attributes=about)).image == "valkey/valkey:8"
