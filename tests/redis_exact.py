"""The exactness rig of Redis: a workload of every type, quiesced instants with what the server held then, an address
that leads to one server or another, and a server that is fed what a restore would feed it. No pytest in here."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from backupd.drivers.redis_expiry import has_fields, version
from backupd.drivers.redis_in_place import Address
from backupd.drivers.redis_master import Feed, Master
from backupd.drivers.redis_wire import Connection, RedisAddress

DATABASES = (0, 3, 9)
KEYS = 40
"""Of each type, in each of them."""
LIBRARY = "#!lua name={name}\nredis.register_function('{name}', function(keys, args) return {value} end)"


def work(client: Any, dice: random.Random, steps: int, *, functions: bool = True) -> None:
    """Random writes of every type, in three databases: by commands, scripts, transactions, and functions where the
    server knows them."""
    for _ in range(steps):
        client.select(dice.choice(DATABASES))
        key, value = f"{dice.randrange(KEYS)}", dice.randrange(1000)
        dice.choice(WRITES if functions else WRITES[:-1])(client, key, value)


def _stream(client: Any, key: str, value: int) -> None:
    client.xadd(f"x{key}", {"v": value}, maxlen=50, approximate=value % 2 == 0)
    if value % 3 == 0:
        if not client.xinfo_groups(f"x{key}"):
            client.xgroup_create(f"x{key}", "g", 0)
        found = client.xreadgroup("g", f"c{value % 2}", {f"x{key}": ">"}, count=3)
        if found and value % 2:
            client.xack(f"x{key}", "g", *[entry for entry, _ in found[0][1]][:1])


def _transaction(client: Any, key: str, value: int) -> None:
    with client.pipeline(transaction=True) as together:
        together.incrby(f"n{key}", value).rpush(f"l{key}", value).ltrim(f"l{key}", -30, -1).execute()


def _script(client: Any, key: str, value: int) -> None:
    code = "redis.call('SET', KEYS[1], ARGV[1] .. redis.call('TIME')[2]) redis.call('SADD', KEYS[2], ARGV[1])"
    client.eval(code, 2, f"s{key}", f"t{key}", value)


def _expiry(client: Any, key: str, value: int) -> None:
    client.set(f"e{key}", value, px=1 + value % 40)
    client.pexpireat(f"s{key}", LASTING + value)
    left = ("PERSIST",) if value % 5 == 0 else ("PX", 1 + value % 30)
    client.execute_command("GETEX", f"e{key}", *left)


def _function(client: Any, key: str, value: int) -> None:
    code = LIBRARY.format(name=f"lib{value % 4}", value=value)
    client.execute_command("FUNCTION", "LOAD", "REPLACE", code)


WRITES = (
    lambda c, k, v: c.set(f"s{k}", "x" * v),
    lambda c, k, v: c.append(f"s{k}", str(v)),
    lambda c, k, v: c.incrbyfloat(f"f{k}", v / 7),
    lambda c, k, v: c.hset(f"h{k}", mapping={f"a{v}": v, "b": v / 3}),
    lambda c, k, v: c.hincrbyfloat(f"h{k}", "b2", 0.1),
    lambda c, k, v: c.lpush(f"l{k}", v, f"v{v}"),
    lambda c, k, v: c.lmove(f"l{k}", f"l{v % 40}"),
    lambda c, k, v: c.sadd(f"t{k}", v, f"m{v}"),
    lambda c, k, v: c.spop(f"t{k}"),
    lambda c, k, v: c.zadd(f"z{k}", {f"m{v % 30}": v / 3}),
    lambda c, k, v: c.zpopmin(f"z{k}"),
    lambda c, k, v: c.pfadd(f"p{k}", v),
    lambda c, k, v: c.geoadd(f"g{k}", (v / 10, v / 20, f"m{v}")),
    lambda c, k, v: c.setbit(f"b{k}", v, 1),
    lambda c, k, v: c.execute_command("BITFIELD", f"b{k}", "INCRBY", "u8", str(v), "7"),
    lambda c, k, v: c.delete(f"s{k}", f"h{v % 40}"),
    lambda c, k, v: c.copy(f"h{k}", f"copy{v % 40}", replace=True),
    _stream, _transaction, _script, _expiry, _function,
)  # fmt: skip


# --- what a server holds ---------------------------------------------------------------------------------------

FAR = 4_000_000_000_000
"""Milliseconds since 1970: times to live that end behind it are compared to the millisecond. Those before may have
passed when a restored server is looked at, which then shows neither the key nor when that was."""
LASTING = FAR + 1
BESIDE = """
local out, left = {}, {}
for _, name in ipairs({'seen-time', 'active-time', 'entries-read', 'lag', 'radix-tree-keys', 'radix-tree-nodes'}) do
  left[name] = 1
end
local function tell(what)
  if type(what) ~= 'table' then out[#out + 1] = tostring(what) return end
  out[#out + 1] = '['
  local skip = false
  for _, one in ipairs(what) do
    if skip then skip = false elseif type(one) == 'string' and left[one] then skip = true else tell(one) end
  end
  out[#out + 1] = ']'
end
local function times_of_fields(database, key)
  local fields = redis.call('HKEYS', key)
  table.sort(fields)
  for _, field in ipairs(fields) do
    local ends = redis.pcall('HPEXPIRETIME', key, 'FIELDS', 1, field)
    if type(ends[1]) == 'number' and ends[1] > tonumber(ARGV[1]) then tell({database, key, field, ends[1]}) end
  end
end
for database = 0, 15 do
  redis.call('SELECT', database)
  local keys = redis.call('KEYS', '*')
  table.sort(keys)
  for _, key in ipairs(keys) do
    local ends = redis.pcall('PEXPIRETIME', key)
    if type(ends) == 'number' and ends > tonumber(ARGV[1]) then tell({database, key, ends}) end
    local kind = redis.call('TYPE', key).ok
    if kind == 'stream' then tell({database, key, redis.call('XINFO', 'STREAM', key, 'FULL', 'COUNT', 0)}) end
    if kind == 'hash' and ARGV[2] == '1' then times_of_fields(database, key) end
  end
end
return redis.sha1hex(table.concat(out, ' '))
"""
"""What DEBUG DIGEST leaves out: when keys and fields of hashes expire, and the groups of streams with their consumers
and what is pending. When a consumer was last seen, and how many entries a group read, replicas are not told."""


@dataclasses.dataclass(frozen=True)
class Instant:
    """A moment of a server: its clock, its place, and all that it holds."""

    at: datetime
    replid: str
    offset: int
    held: tuple[str, ...]
    """Redis' own digest; one of what that leaves out; the libraries of functions."""


def instant(client: Any) -> Instant:
    """Nothing happens between its parts."""
    about = client.info("server")
    functions = version(about["redis_version"]) >= (7, 0)
    with client.pipeline(transaction=True) as together:
        together.execute_command("TIME").execute_command("INFO", "replication")
        together.execute_command("DEBUG", "DIGEST")
        together.execute_command("EVAL", BESIDE, 0, FAR, int(has_fields(about)))
        if functions:
            together.execute_command("FUNCTION", "LIST", "WITHCODE")
        (seconds, micros), role, *held = together.execute()
    at = datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)
    libraries = sorted(map(repr, held.pop())) if functions else []
    place = role["master_replid"], role.get("slave_repl_offset", role["master_repl_offset"])
    return Instant(at, *place, (*map(text, held), *libraries))


def quiesced(client: Any) -> Instant:
    """Behind `work`: a moment that a recorder notes exactly."""
    time.sleep(0.05)
    for database in DATABASES:  # keys that are asked for expire at once, others when the server comes to them
        client.select(database)
        client.exists(*(f"e{key}" for key in range(KEYS)))
    return at_rest(client)


def at_rest(client: Any) -> Instant:
    """A moment before which nothing was executed, no expiry either, since a recorder last read the server's clock and
    place."""
    while True:
        before, read = instant(client), _readings(client)
        _wait(lambda: _readings(client) > read)  # noqa: B023
        now = instant(client)
        if now.offset == before.offset:
            return now


def _readings(client: Any) -> int:
    """Of the server's clock, by anyone."""
    return int(client.info("commandstats")["cmdstat_time"]["calls"])


def text(answer: Any) -> str:
    """Of a string, however the client hands it out."""
    return answer if isinstance(answer, str) else str(answer.decode())


# --- the same place, whoever is there ----------------------------------------------------------------------------


class Lead:
    """An address that leads to one server, then to another, or to none: what a virtual address or a name does."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._to: tuple[str, int] | None = None
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Lead:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.to(None)

    def to(self, there: tuple[str, int] | None) -> None:
        """From now on; connections that are open break."""
        self._to = there
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                with contextlib.suppress(OSError):
                    if self._to is None:
                        here.close()
                        continue
                    there = socket.create_connection(self._to)
                    self._open |= {here, there}
                    for pair in ((here, there), (there, here)):
                        threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := come.recv(1 << 16):
                go.sendall(data)
        for one in (come, go):
            self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


# --- a server that is fed ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fed:
    """What a restore hands to a server: a dump, the place it is of, and logs that each begin with the one before."""

    dump: bytes
    start: int
    first: bytes
    """What comes before all of the log."""
    logs: Iterable[bytes]


def held_after_each(target: Any, seen_from: str, fed: Fed) -> list[tuple[str, ...]]:
    """What the server holds when it has executed each of the logs, as a replica that expires nothing by itself."""
    found: list[tuple[str, ...]] = []

    def stream() -> Iterator[bytes]:
        yield fed.first
        done = b""
        for log in fed.logs:
            assert log.startswith(done)
            yield log[len(done) :]
            done = log
            reached = fed.start + len(fed.first) + len(done)
            _wait(lambda: target.info("replication").get("slave_repl_offset", 0) >= reached)  # noqa: B023
            found.append(instant(target).held)

    with Master(Feed(lambda: iter([fed.dump]), len(fed.dump), stream, fed.start), password="rig") as master:
        target.config_set("masterauth", "rig")
        target.execute_command("REPLICAOF", seen_from, master.port)
        with master.led():
            target.execute_command("REPLICAOF", "NO", "ONE")
    return found


def _wait(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < deadline, "nothing more comes to the server"
        time.sleep(0.002)


def seen_from(host: str, port: int) -> str:
    """The address under which a server sees this machine."""
    with Connection(RedisAddress(host, port)) as server:
        return Address.of_client(server.text("CLIENT", "INFO")).reached
