"""The exactness rig of Redis: a workload of every type, quiesced instants with their digests, and a server that is
fed a recorded stream from instant to instant. No pytest in here."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from backupd.drivers.redis_in_place import Address
from backupd.drivers.redis_master import Feed, Master
from backupd.drivers.redis_wire import Connection, RedisAddress
from backupd.errors import BackupdError
from backupd.model import LogSpan, RecordingDriver

LIBRARY = "#!lua name={name}\nredis.register_function('{name}', function(keys, args) return {value} end)"


def work(client: Any, dice: random.Random, steps: int) -> None:
    """Random writes of every type, in three databases: by commands, scripts, functions and transactions."""
    for _ in range(steps):
        client.select(dice.choice((0, 0, 3, 9)))
        key, value = f"{dice.randrange(40)}", dice.randrange(1000)
        dice.choice(WRITES)(client, key, value)


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
    client.set(f"e{key}", value, px=1 + value)
    client.pexpire(f"s{key}", 200 + value * 100)
    left = ("PERSIST",) if value % 5 == 0 else ("PX", value + 1)
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


def own_digest(client: Any) -> str:
    """Of every key that is shown, its value as the server dumps it, and when it expires: where DEBUG is not allowed."""
    whole = 0
    for name in client.info("keyspace"):
        client.select(int(name[2:]))
        for key in client.scan_iter(count=1000):
            told = b"|".join(
                (name.encode(), key, client.dump(key) or b"", str(client.pexpiretime(key)).encode())
            )
            whole ^= int.from_bytes(hashlib.blake2b(told, digest_size=20).digest(), "big")
    return f"{whole:040x}"


@dataclasses.dataclass(frozen=True)
class Instant:
    """A quiesced moment of the source."""

    at: datetime
    replid: str
    offset: int
    digest: str


def instant(client: Any) -> Instant:
    """The source's clock, place and digest, nothing between them."""
    with client.pipeline(transaction=True) as together:
        together.execute_command("TIME").execute_command("DEBUG", "DIGEST").info("replication")
        (seconds, micros), digest, role = together.execute()
    at = datetime.fromtimestamp(seconds, UTC).replace(microsecond=micros)
    return Instant(at, role["master_replid"], role["master_repl_offset"], text(digest))


def text(answer: Any) -> str:
    """Of a string, however the client hands it out."""
    return answer if isinstance(answer, str) else str(answer.decode())


@dataclasses.dataclass
class Tape:
    """A log sink in memory: per epoch a row of bytes, and what happened."""

    logs: dict[str, tuple[int, bytearray]] = dataclasses.field(default_factory=dict)
    events: list[str] = dataclasses.field(default_factory=list)
    epoch: str = ""
    begun: threading.Event = dataclasses.field(default_factory=threading.Event)

    def claim(self, server: str) -> None:
        assert server

    def begin(self, epoch: str, position: int) -> None:
        self.events.append(f"begin {epoch[:6]}")
        self.epoch = epoch
        self.logs.setdefault(epoch, (position, bytearray()))
        self.begun.set()

    def piece(self, start: int, end: int, data: bytes) -> None:
        begin, log = self.logs[self.epoch]
        assert end - start == len(data)
        assert start <= begin + len(log), "a hole in the log"
        del log[start - begin :]
        log += data

    def anchor(self, at: datetime, position: int) -> None:
        pass

    def last(self, belongs: Callable[[str], bool]) -> LogSpan | None:
        raise AssertionError("a Redis recorder does not ask")

    def tail(self, epoch: str, size: int) -> bytes:
        raise AssertionError("a Redis recorder does not ask")

    def gap(self, reason: str) -> None:
        self.events.append("gap")

    def end(self, epoch: str) -> int:
        begin, log = self.logs[epoch]
        return begin + len(log)


def record(driver: RecordingDriver, tape: Tape, stop: threading.Event) -> None:
    """As the agent does: what ended badly is begun again where the tape ends."""
    while not stop.is_set():
        since = None
        if tape.epoch:
            end = tape.end(tape.epoch)
            since = LogSpan("rig", tape.epoch, end, end, None, 0)
        try:
            driver.recorder(interval=0.1).record(since, tape, stop)
        except BackupdError as error:
            tape.events.append(error.message)
            stop.wait(0.2)


def check_instants(
    target: Any, seen_from: str, dump: bytes, base: int, tape: Tape, first: bytes, instants: list[Instant]
) -> list[tuple[str, str]]:
    """Feed a server a dump and its stream from one instant to the next; the digest there and here, of each."""
    begin, log = tape.logs[instants[0].replid]
    compared: list[tuple[str, str]] = []

    def stream() -> Iterator[bytes]:
        yield first
        at = base
        for reference in instants:
            yield bytes(log[at - begin : reference.offset - begin])
            at = reference.offset
            deadline = time.monotonic() + 30
            while (role := target.info("replication")).get("slave_repl_offset", 0) < reference.offset + len(
                first
            ):
                assert time.monotonic() < deadline, f"the server stays at {role}"
                time.sleep(0.001)
            found = target.execute_command("DEBUG", "DIGEST")
            compared.append((reference.digest, text(found)))

    with Master(Feed(lambda: iter([dump]), len(dump), stream, base), password="rig") as master:
        target.config_set("masterauth", "rig")
        target.execute_command("REPLICAOF", seen_from, master.port)
        with master.led():
            target.execute_command("REPLICAOF", "NO", "ONE")
    return compared


def seen_from(host: str, port: int) -> str:
    """The address under which a server sees this machine."""
    with Connection(RedisAddress(host, port)) as server:
        return Address.of_client(server.text("CLIENT", "INFO")).reached
