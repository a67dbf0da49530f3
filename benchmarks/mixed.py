"""What databases leave on a disk: PGDATA under pgbench, a Redis RDB, a SQLite file with vectors."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks.containers import docker, postgres, redis
from benchmarks.corpus import Maker, tree_size
from benchmarks.goals import usual
from benchmarks.scenario import Say, Scenario, Step
from benchmarks.states import keep, put_back

SHARE = 0.01
_SETTINGS = ("fsync=off", "synchronous_commit=off", "max_wal_size=256MB", "shared_buffers=256MB")
_DIMENSIONS = 384
_CLIENTS = 4


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of each."""

    pgbench: int = 50
    """100,000 accounts, 15 MB, each."""
    keys: int = 200_000
    vectors: int = 120_000
    few: int = 4_000
    """Transactions; `many` is the second count."""
    many: int = 100_000


SMALL = Scale(pgbench=1, keys=300, vectors=200, few=40, many=200)


def mixed(work: Path, *, scale: Scale, stack: ExitStack, say: Say) -> Scenario:
    """The servers' files, at rest. Redis runs until `stack` ends: it writes its keys in an order of its own, which a
    new start would change; PostgreSQL runs only while it works."""
    tree, earlier = work / "tree", work / "earlier"
    data, rdb, vectors = tree / "pgdata", tree / "dump.rdb", tree / "vectors.sqlite3"
    tree.mkdir(parents=True)
    say(f"pgbench of scale {scale.pgbench}, {scale.keys:,} keys, {scale.vectors:,} vectors")
    with postgres(*_SETTINGS, data=data) as server:
        docker("exec", server, "pgbench", "-q", "-i", "-U", "postgres", "-s", str(scale.pgbench), "postgres")
    keys = stack.enter_context(redis())
    fill_redis(keys, scale.keys, seed=1)
    save_redis(keys, rdb)
    make_vectors(vectors, scale.vectors, seed=1)

    def changed(number: int) -> None:
        if not earlier.exists():
            keep(tree, earlier)
        transactions(data, scale.few, seed=number)
        fill_redis(keys, scale.keys, seed=100 + number, share=SHARE)
        save_redis(keys, rdb)
        change_vectors(vectors, share=SHARE, seed=number)

    few, many = f"{scale.few:,} tx + 1%", f"{scale.many:,} tx"
    steps = (
        Step("full", restore="restore"),
        Step("unchanged", runs=3),
        Step(few, changed),
        Step(many, lambda number: transactions(data, scale.many, seed=1000 + number)),
        Step("went back", lambda _: put_back(earlier, tree), restore="restore last"),
    )
    what = (
        f"PGDATA {tree_size(data) / 1e6:,.0f} MB, RDB {rdb.stat().st_size / 1e6:,.0f} MB, "
        f"SQLite {vectors.stat().st_size / 1e6:,.0f} MB"
    )
    say(f"  {what}")
    goals = tuple(usual({few: 0.3, many: 1.0, "went back": 1.0}))
    return Scenario("mixed", what, tree, steps, goals)


def transactions(data: Path, count: int, *, seed: int) -> None:
    """pgbench on a server that is started for it and leaves its files at rest."""
    each = max(1, count // _CLIENTS)
    with postgres(*_SETTINGS, data=data) as server:
        docker(
            "exec", server, "pgbench", "-n", "-U", "postgres", "-c", str(_CLIENTS), "-j", "2", "-t", str(each),
            f"--random-seed={seed}", "postgres",
        )  # fmt: skip


def fill_redis(server: str, count: int, *, seed: int, share: float = 1.0) -> None:
    """Sessions as hashes and pages as strings; with a share, that many of the keys get new values."""
    docker("exec", "-i", server, "redis-cli", "--pipe", stdin=b"".join(_commands(count, seed, share)))


def _commands(count: int, seed: int, share: float) -> Iterator[bytes]:
    maker = Maker(seed)
    numbers = (
        range(count) if share >= 1 else sorted(maker.random.sample(range(count), int(count * share) or 1))
    )
    for number in numbers:
        text = maker.text(maker.random.randrange(200, 1400))
        if number % 3:
            words = [b"HSET", b"session:%d" % number, b"user", b"%d" % (number % 9973), b"token"]
            words += [maker.random.randbytes(16).hex().encode(), b"basket", text]
        else:
            words = [b"SET", b"page:%d" % number, text]
        yield b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def save_redis(server: str, target: Path) -> None:
    """The RDB as a new file under the old name, as the server itself does it."""
    docker("exec", server, "redis-cli", "SAVE")
    new = target.with_name("temp.rdb")
    docker("cp", f"{server}:/data/dump.rdb", str(new))
    new.rename(target)


def make_vectors(path: Path, count: int, *, seed: int) -> None:
    """Texts with a vector each, as a vector store keeps them."""
    maker = Maker(seed)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE documents (id INTEGER PRIMARY KEY, text TEXT, embedding BLOB)")
        database.executemany(
            "INSERT INTO documents VALUES (?, ?, ?)",
            ((number, maker.text(300).decode(), vector(maker.random)) for number in range(count)),
        )


def change_vectors(path: Path, *, share: float, seed: int) -> None:
    """New texts and vectors for a share of the rows, anywhere in the file."""
    maker = Maker(seed + 50)
    with closing(sqlite3.connect(path)) as database, database:
        (count,) = database.execute("SELECT count(*) FROM documents").fetchone()
        chosen = sorted(maker.random.sample(range(count), max(1, int(count * share))))
        database.executemany(
            "UPDATE documents SET text = ?, embedding = ? WHERE id = ?",
            ((maker.text(300).decode(), vector(maker.random), number) for number in chosen),
        )


_SIGN_AND_FRACTION = int.from_bytes(b"\xff\xff\xff\x81" * _DIMENSIONS, "little")
_EXPONENT = int.from_bytes(b"\x00\x00\x00\x3c" * _DIMENSIONS, "little")


def vector(numbers: random.Random) -> bytes:
    """32-bit floats between 1/128 and 1/8 in size, of either sign: 26 of 32 bits are chance, as in real ones."""
    return (numbers.getrandbits(32 * _DIMENSIONS) & _SIGN_AND_FRACTION | _EXPONENT).to_bytes(
        4 * _DIMENSIONS, "little"
    )
