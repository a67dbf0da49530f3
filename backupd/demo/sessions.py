"""Redis in the demo: what is written, what is changed, how all of it is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from backupd.demo.picture import Picture, digest
from backupd.drivers.redis_wire import Connection, RedisAddress

SESSIONS = 3000
FAR_AWAY = 4_102_444_800  # 2100-01-01: no key may expire while the demo runs


def fill(address: RedisAddress) -> None:
    """Keys of every type, some that expire, in two databases."""
    with Connection(address) as redis:
        _all(redis, _commands())
        redis.call("SELECT", "1")
        _all(redis, (["SET", f"flag:{i}", "on"] for i in range(50)))


def _commands() -> Iterator[list[str]]:
    for i in range(SESSIONS):
        yield ["SET", f"session:{i}", f"user={i};token={digest(i)}", "EXAT", str(FAR_AWAY + i)]
    for i in range(400):
        yield ["HSET", f"cart:{i}", *(word for j in range(12) for word in (f"item:{j}", str(i * j)))]
        yield ["ZADD", "ranking", str(i * 37 % 401), f"user:{i}"]
        yield ["SADD", f"group:{i % 20}", f"user:{i}"]
        yield ["RPUSH", "queue", f"job {i}"]
        yield ["XADD", "events", f"{i + 1}-0", "kind", str(i % 3), "user", str(i)]
    yield ["SET", "binary", "\\x00\udcff\udcfe"]


def change(address: RedisAddress) -> None:
    """A cache moves on: keys changed, gone, new; one whole database emptied."""
    with Connection(address) as redis:
        _all(redis, (["SET", f"session:{i}", "changed"] for i in range(0, SESSIONS, 3)))
        _all(redis, (["DEL", f"cart:{i}"] for i in range(0, 400, 2)))
        _all(redis, (["LPOP", "queue"] for _ in range(100)))
        redis.call("SELECT", "1")
        redis.call("FLUSHDB")


def _all(redis: Connection, commands: Iterator[list[str]]) -> None:
    for command in commands:
        redis.call(*(word.encode("utf-8", "surrogateescape") for word in command))


def look(address: RedisAddress) -> Picture:
    """Every key of every database: its type, its whole value, when it expires."""
    things: dict[str, str] = {}
    with Connection(address) as redis:
        databases = sorted(name.removeprefix("db") for name in redis.info("keyspace"))
        for database in databases:
            redis.call("SELECT", database)
            for key in _keys(redis):
                name = f"db{database}: {key.decode('utf-8', 'backslashreplace')}"
                things[name] = digest(redis.call("PEXPIRETIME", key), *_value(redis, key))
    return Picture(f"{len(things):,} keys in {len(databases)} database{'s' * (len(databases) > 1)}", things)


def _keys(redis: Connection) -> Iterator[bytes]:
    cursor: Any = b"0"
    seen: set[bytes] = set()  # SCAN may give a key twice
    while True:
        cursor, keys = _list(redis.call("SCAN", cursor, "COUNT", "1000"))
        new = [key for key in keys if key not in seen]
        seen.update(new)
        yield from new
        if cursor == b"0":
            return


def _value(redis: Connection, key: bytes) -> Sequence[object]:
    """The value in one form, whatever form the server keeps it in: sets and hashes have no order."""
    kind = redis.text("TYPE", key)
    if kind == "string":
        return kind, redis.call("GET", key)
    if kind == "hash":
        flat = _list(redis.call("HGETALL", key))
        return kind, *(part for pair in sorted(zip(flat[::2], flat[1::2], strict=True)) for part in pair)
    if kind == "set":
        return kind, *sorted(_list(redis.call("SMEMBERS", key)))
    if kind == "list":
        return kind, *_list(redis.call("LRANGE", key, "0", "-1"))
    if kind == "zset":
        return kind, *_list(redis.call("ZRANGE", key, "0", "-1", "WITHSCORES"))
    return kind, *(f"{entry}" for entry in _list(redis.call("XRANGE", key, "-", "+")))


def _list(reply: Any) -> list[Any]:
    assert isinstance(reply, list)  # noqa: S101  the protocol says so
    return reply
