"""A database through backupd against the pipe that everybody writes: pg_dump | zstd -3 -T0 > file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.containers import postgres, sql
from benchmarks.measure import Taken, run
from benchmarks.tools import backupd_argv, clean_env

GOAL = 1.1
_ROWS = 1_500_000

# Orders as shops have them: numbers, words that come again, a note that does not.
FILL = """
CREATE TABLE orders (id bigint PRIMARY KEY, customer int, state text, amount numeric(10,2), placed timestamptz,
                     note text);
INSERT INTO orders
SELECT i, hashint8(i) % 50000, (ARRAY['new','paid','sent','returned'])[1 + abs(hashint8(i * 3)) % 4],
       (abs(hashint8(i * 7)) % 1000000) / 100.0, timestamptz '2026-01-01' + i * interval '7 seconds',
       'order of customer ' || hashint8(i) % 50000 || ', reference ' || md5(i::text) || ', to be sent by '
       || (ARRAY['train','lorry','bicycle','ship'])[1 + abs(hashint8(i * 11)) % 4]
FROM generate_series(1, {rows}) AS i;
CREATE INDEX ON orders (customer);
VACUUM ANALYZE orders;
CHECKPOINT;
"""
CHANGE = "UPDATE orders SET state = 'sent', amount = amount + 1 WHERE id % 100 = 7; CHECKPOINT;"


def bench_postgres(work: Path, *, small: bool, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """Seconds by step, medians and ratios. The same route for both: programs run in the server's container."""
    seconds: dict[str, list[float]] = {"pipe": [], "backupd full": [], "backupd 1% of rows changed": []}
    with postgres() as name:
        rows = 5000 if small else _ROWS
        say(f"filling a database with {rows:,} rows")
        sql(name, FILL.format(rows=rows))
        for number in range(1, rounds + 1):
            base = work / f"database-{number}"
            base.mkdir(parents=True)
            for step, taken in _round(base, name):
                seconds[step].append(taken.seconds)
                say(f"  {step:26} {taken.seconds:6.2f} s, {taken.memory / 1e6:4.0f} MB")
            shutil.rmtree(base)
    middle = {step: median(values) for step, values in seconds.items()}
    ratio = middle["backupd full"] / middle["pipe"]
    print(
        f"\nbackupd / pg_dump | zstd -3 -T0: {ratio:.3f}  goal {GOAL:g}: {'met' if ratio <= GOAL else 'MISSED'}\n"
    )
    return {"rows": rows, "medians": middle, "ratio": ratio, "goal": GOAL, "all": seconds}


def _round(base: Path, name: str) -> Iterator[tuple[str, Taken]]:
    repository = base / "repository"
    (base / "backupd.toml").write_text(
        f'[repository]\nlocation = "{repository}"\n'
        f'[sources.orders]\ndriver = "postgres"\ncontainer = "{name}"\n'
    )
    env = clean_env(base, BACKUPD_CONFIG=str(base / "backupd.toml"), XDG_STATE_HOME=str(base))
    log = base / "log"
    pipe = (
        f"set -o pipefail; docker exec {name} pg_dump -U postgres postgres | zstd -q -3 -T0 > {base}/dump.zst"
    )
    backup = [*backupd_argv(), "-q", "backup", "orders"]
    run([*backupd_argv(), "-q", "init"], cwd=base, env=env, log=log)
    yield "pipe", run(["bash", "-c", pipe], cwd=base, env=env, log=log)
    yield "backupd full", run(backup, cwd=base, env=env, log=log)
    sql(name, CHANGE)
    yield "backupd 1% of rows changed", run(backup, cwd=base, env=env, log=log)
