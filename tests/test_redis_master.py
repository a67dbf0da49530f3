"""A fake master, and a restore into a running Redis server that keeps its place."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import captured
import pytest
import redis as redis_py
import services as bed
from commands import InsideHome
from conftest import StartService
from hypothesis import given
from hypothesis import strategies as st

from backupd.drivers import redis_master
from backupd.drivers.redis import RedisDriver, RedisSettings
from backupd.drivers.redis_expiry import command, kept
from backupd.drivers.redis_in_place import MARK, Address, Left, left, refuse, unfinished
from backupd.drivers.redis_master import Feed, Lost, Master, Progress, take_command
from backupd.drivers.redis_wire import RedisAddress
from backupd.errors import RestoreFailed, UsageError
from backupd.live import Way
from backupd.model import Silence
from backupd.repository import Repository
from backupd.stores import LocalStore

NOW = ("--repl-diskless-sync-delay", "0")


def client(service: bed.Service, db: int = 0) -> Any:
    """redis-py shares no code with the driver."""
    return redis_py.Redis(
        service.host, service.port, db, password=service.password or None, socket_timeout=20
    )


def driver(service: bed.Service) -> RedisDriver:
    at = RedisAddress(service.host, service.port, password=service.password)
    return RedisDriver(RedisSettings(at, "wire", password=service.password))


def put_back(service: bed.Service, point: captured.Held, *, keep: bool = False, **way: Any) -> Any:
    """As `restore --to in-place` does, with a safety copy of a given name."""
    mine = driver(service)
    with (mine.keeping() if keep else mine).standing() as standing:
        return standing.replace(point, lambda: iter(()), None, Way(safety="s4fe", **way), Silence())


# --- restore in place ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("appendonly", ["yes", "no"])
def test_a_running_server_holds_what_was_captured_and_keeps_its_clients_and_settings(
    appendonly: str, start_redis: StartService
) -> None:
    """Clients see READONLY for a moment, never a half; a restart brings the restored state back."""
    server = start_redis(
        *NOW, "--enable-debug-command", "yes", "--appendonly", appendonly, "--save", "3600 1", "--masterauth", "mine",
        password="secret",
    )  # fmt: skip
    one = client(server)
    one.mset({f"k{n}": n for n in range(2000)})
    digest = one.execute_command("DEBUG", "DIGEST")
    point = captured.take(driver(server))
    one.flushall()
    one.set("wrong", 1)
    seen, stop = set(), threading.Event()

    def write() -> None:
        writer = client(server)
        while not stop.is_set():
            try:
                writer.set("wrong", 2)
            except redis_py.ReadOnlyError:
                seen.add("READONLY")
            except redis_py.RedisError as error:
                seen.add(str(error))

    thread = threading.Thread(target=write)
    thread.start()
    with driver(server).standing() as standing:
        time.sleep(0.1)
        done = standing.replace(point, lambda: iter(()), None, Way(safety="s4fe"), Silence())
    stop.set()
    thread.join()
    assert not done.warnings and done.facts["functions"] == 0
    assert seen <= {"READONLY"}
    one.delete("wrong")
    assert one.execute_command("DEBUG", "DIGEST") == digest
    assert one.info("replication")["role"] == "master"
    assert one.config_get("masterauth") == {"masterauth": "mine"}
    assert one.config_get("repl-timeout") == {"repl-timeout": "60"}
    server.container.kill()
    server.container.start()
    server.refresh_port(6379)
    bed.wait_until(lambda: bed.redis_answers(server), timeout=20, what="the server")
    assert client(server).dbsize() == 2000 or client(server).get("wrong") == b"2"


@pytest.mark.parametrize("keep", [False, True])
def test_keys_whose_time_has_passed_go_and_are_counted_or_are_kept_with_the_time_they_had(
    keep: bool, start_redis: StartService
) -> None:
    server = start_redis(*NOW)
    one = client(server)
    one.mset({"lasting": 1, "short": 2})
    one.pexpire("short", 1500)
    client(server, 3).set("long", 1, ex=1000)
    point = captured.take(driver(server))
    time.sleep(1.6)
    done = put_back(server, point, keep=keep)
    if keep:
        assert 0 < one.pttl("short") <= 1600
        assert 998_000 < client(server, 3).pttl("long") <= 1_000_100
    else:
        assert done.recovered["expired"] == 1
        bed.wait_until(lambda: one.dbsize() == 1, timeout=10, what="expiry")
        assert client(server, 3).pttl("long") < 998_500


def test_a_damaged_archive_changes_nothing(start_redis: StartService) -> None:
    """The last bytes of a dump are sent when all was read: what fails before leaves the old state, writable."""
    server = start_redis(*NOW)
    one = client(server)
    one.mset({f"k{n}": "v" * 1000 for n in range(3000)})
    point = captured.take(driver(server))
    one.set("new", 1)

    class Torn(captured.Held):
        def read(self, name: str) -> Iterator[bytes]:
            yield from [self.files[name][:-10]]
            raise RestoreFailed("a block is damaged", hint="verify")

    with pytest.raises(RestoreFailed, match="holds what it held before, and takes writes") as failure:
        put_back(server, Torn(point.point, point.files))
    assert "a block is damaged" in failure.value.message
    assert one.get("new") == b"1" and one.set("more", 1)
    assert one.config_get("masterauth") == {"masterauth": ""}


def test_a_server_left_without_a_whole_state_is_read_only_and_the_next_restore_knows_it(
    start_redis: StartService,
) -> None:
    """The link breaks behind the dump: never a master again by us, and the way out is told."""
    server = start_redis(*NOW)
    one = client(server)
    one.mset({f"k{n}": n for n in range(100)})
    point = captured.take(driver(server))

    def broken() -> Iterator[Any]:
        raise RestoreFailed("the log is damaged")

    from backupd.drivers.redis_in_place import Standing, Wanted

    dump = point.files["dump.rdb"]
    connect = driver(server).connect
    with Standing(connect) as standing, pytest.raises(RestoreFailed, match="is read-only") as failure:
        standing.replace(Wanted(Feed(lambda: iter([dump]), len(dump), broken), {}, "s4fe"))
    assert "--point s4fe" in failure.value.hint
    with pytest.raises(redis_py.ReadOnlyError):
        one.set("a", 1)
    with driver(server).standing() as again:
        assert again.unfinished == "s4fe"
        done = again.replace(point, lambda: iter(()), None, Way(safety="s4fe"), Silence())
    assert any("masterauth is empty now" in warning for warning in done.warnings)
    assert one.set("a", 1) and one.dbsize() == 101


def test_an_address_that_the_server_does_not_reach(
    start_redis: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told with the option that helps; the server is as it was."""
    monkeypatch.setattr(redis_master, "_COMES_WITHIN", 1.5)
    server = start_redis(*NOW)
    client(server).set("a", 1)
    point = captured.take(driver(server))
    with pytest.raises(RestoreFailed, match="did not come") as failure:
        put_back(server, point, listen="192.0.2.1")
    assert "--listen" in failure.value.hint and client(server).set("b", 1)


# --- the master ------------------------------------------------------------------------------------------------


def test_a_stranger_is_sent_away_and_the_server_is_served_all_the_same(start_redis: StartService) -> None:
    """Wrong password, none, nonsense: nobody but the server gets a byte of the dump."""
    server = start_redis(*NOW)
    client(server).set("a", 1)
    dump = captured.take(driver(server)).files["dump.rdb"]
    said: list[bytes] = []
    with Master(Feed(lambda: iter([dump]), None), user="u", password="right") as master:

        def strangers() -> None:
            for words in (("AUTH", "u", "wrong"), ("PSYNC", "?", "-1"), ("AUTH", "right")):
                with socket.create_connection(("127.0.0.1", master.port)) as there:
                    there.sendall(command(*words))
                    said.append(there.recv(100))
            one = client(server)
            one.config_set("masteruser", "u")
            one.config_set("masterauth", "right")
            with contextlib.suppress(StopIteration):
                line = one.execute_command("CLIENT", "INFO")
                one.execute_command("REPLICAOF", line["addr"].rpartition(":")[0] if isinstance(line, dict)
                                    else line.decode().split("addr=")[1].split(":")[0], master.port)  # fmt: skip

        thread = threading.Thread(target=strangers)
        thread.start()
        with master.led() as end:
            client(server).execute_command("REPLICAOF", "NO", "ONE")
        thread.join()
    assert end == 0 and [answer[:7] for answer in said] == [b"-WRONGP", b"-NOAUTH", b"-WRONGP"]


@given(st.lists(st.lists(st.binary(max_size=30), min_size=1, max_size=4), max_size=4), st.integers(1, 50))
def test_commands_are_read_whatever_pieces_they_come_in(commands: list[list[bytes]], step: int) -> None:
    """With signs of life between them."""
    wire = b"".join(
        b"\n*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)
        for words in commands
    )
    buffer, found = bytearray(), []
    for at in range(0, len(wire), step):
        buffer += wire[at : at + step]
        while (words := take_command(buffer)) is not None:
            found.append(words)
    assert found == commands


@given(st.binary(max_size=60))
def test_nonsense_ends_the_link_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(Lost):
        take_command(bytearray(data))


# --- decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dump", "sent", "end", "role", "loading", "expected"),
    [
        (10, False, None, {"master_replid": "old"}, False, Left.BEFORE),
        (10, True, None, {"master_replid": "old"}, False, Left.NEITHER),
        (10, True, None, {"master_replid": "old"}, True, Left.NEITHER),
        (10, True, 90, {"master_replid": "ours", "slave_repl_offset": "89"}, False, Left.EARLIER),
        (10, True, None, {"master_replid": "ours", "slave_repl_offset": "90"}, False, Left.EARLIER),
        (10, True, 90, {"master_replid": "ours", "slave_repl_offset": "90"}, False, Left.AFTER),
    ],
)
def test_what_a_failed_restore_leaves(
    dump: int, sent: bool, end: int | None, role: dict[str, str], loading: bool, expected: Left
) -> None:
    """Only a whole state may be a master again."""
    progress = Progress(dump=dump, dump_sent=sent, end=end)
    assert left("ours", progress, role, {}, loading=loading) is expected
    assert expected.whole == (expected in (Left.BEFORE, Left.AFTER))


SEVEN = {"redis_version": "7.0.15"}


@pytest.mark.parametrize(
    ("about", "role", "settings", "point", "clustered", "word"),
    [
        (SEVEN, {}, {}, {}, True, "cluster"),
        (SEVEN, {"role": "slave", "master_host": "m"}, {}, {}, False, "replica of m"),
        (SEVEN, {}, {"tls-replication": "yes"}, {}, False, "TLS"),
        (SEVEN, {}, {"databases": "16"}, {"databases": 40}, False, "40 databases"),
        (SEVEN, {}, {}, {"version": "8.2.3", "rdb_version": 12}, False, "cannot be read by Redis 7.0.15"),
        (SEVEN, {}, {}, {"server": "valkey", "version": "9.0.0", "rdb_version": 80}, False, "cannot be read"),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.0"}, {}, {}, {"version": "8.0.0", "rdb_version": 12},
         False, "cannot be read by Valkey"),
    ],
)  # fmt: skip
def test_a_server_that_could_not_take_it_is_refused_before_anything_is_changed(
    about: dict[str, str], role: dict[str, str], settings: dict[str, str], point: dict[str, Any], clustered: bool,
    word: str,
) -> None:  # fmt: skip
    with pytest.raises(RestoreFailed, match=word) as failure:
        refuse(about, role, settings, point, clustered=clustered)
    assert failure.value.hint


def test_the_password_of_a_restore_names_its_safety_copy() -> None:
    assert unfinished({"masterauth": f"{MARK}abc123-0f0f"}) == "abc123"
    assert unfinished({"masterauth": "the user's own"}) is None


def test_addresses_by_option_and_as_the_server_sees_us() -> None:
    assert Address.of_option("10.0.0.1:7000") == Address("10.0.0.1", "", 7000)
    assert Address.of_option("agent") == Address("agent", "", 0)
    assert Address.of_option("[fe80::1]:7") == Address("fe80::1", "", 7)
    assert Address.of_client("id=3 addr=172.17.0.1:5000 fd=8").reached == "172.17.0.1"
    assert Address.of_client("id=3 addr=/run/redis.sock:0 fd=8").reached == "127.0.0.1"
    with pytest.raises(UsageError):
        Address.of_option("host:port")


def test_the_keeping_script_moves_by_a_distance() -> None:
    """Not by a time: it must do the same when a file is loaded again."""
    assert kept(timedelta(seconds=90), 16).endswith(b"$5\r\n90000\r\n$2\r\n16\r\n$1\r\n0\r\n")


# --- the command line --------------------------------------------------------------------------------------------


def test_in_place_on_the_command_line_and_back_by_the_safety_copy(
    start_redis: StartService, tmp_path: Path
) -> None:
    """What the server held is a point of its own, and the same command brings it back."""
    server = start_redis(*NOW)
    home = InsideHome(tmp_path)
    url = f"redis://{server.host}:{server.port}"
    home.configure(f'[repository]\nlocation = "repo"\n[sources.cache]\ndriver = "redis"\nurl = "{url}"\n')
    Repository.create(LocalStore(tmp_path / "repo", create=True), clock=lambda: datetime.now(UTC))
    one = client(server)
    one.mset({"a": 1, "b": 2})
    home.ok("backup", "cache")
    one.flushall()
    one.set("precious too", 1)
    (restored,) = home.ok("restore", "--at", "latest", "cache", "--to", "in-place", "--json").json["restored"]
    assert sorted(one.keys()) == [b"a", b"b"] and restored["compared"] and not restored["differences"]
    safety = restored["recovered"]["held_before"]
    home.ok("restore", "--point", safety, "--to", "in-place")
    assert one.keys() == [b"precious too"]
    home.refused("restore", "--at", "latest", "cache", "--listen", "here", code=2)
