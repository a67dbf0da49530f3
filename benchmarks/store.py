"""A full backup into an S3 server at the end of a slow line, beside the time that line needs for the bytes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

from benchmarks.corpus import digest_tree, make_tree
from benchmarks.goals import MOST_MEMORY, Goal, Verdict
from benchmarks.measure import Taken, ToolFailed, run
from benchmarks.objectstore import REGION, ObjectStore, object_store, slow_line
from benchmarks.report import layout, tell_verdicts
from benchmarks.scenario import Say
from benchmarks.tools import Backupd, Bench, Restic, Tool

DELAY_MS = 10
RATE_MB = 100
GOAL = 1.1
_BODY = 16 << 20


class BackupdS3(Backupd):
    """Into a bucket; the repository's directory in `Bench` gives the bucket its name."""

    __slots__ = ("address", "store")

    def __init__(self, store: ObjectStore, address: str) -> None:
        super().__init__()
        self.store = store
        self.address = address

    def env(self, bench: Bench) -> dict[str, str]:
        return {**super().env(bench), **_keys(self.store)}

    def init(self, bench: Bench) -> list[str]:
        argv = super().init(bench)
        (bench.base / "backupd.toml").write_text(
            f'[repository]\nlocation = "s3://{bench.base.name}/backups"\nendpoint_url = "http://{self.address}"\n'
            f'region = "{REGION}"\npath_style = true\n'
            f'[sources.tree]\ndriver = "volume"\npath = "{bench.tree}"\n'
        )
        return argv


class ResticS3(Restic):
    """The same bucket, the same line."""

    __slots__ = ("address", "store")

    def __init__(self, store: ObjectStore, address: str) -> None:
        super().__init__()
        self.store = store
        self.address = address

    def env(self, bench: Bench) -> dict[str, str]:
        where = f"s3:http://{self.address}/{bench.base.name}"
        return {**super().env(bench), **_keys(self.store), "RESTIC_REPOSITORY": where}


def _keys(store: ObjectStore) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "AWS_DEFAULT_REGION": REGION,
        "NO_PROXY": "127.0.0.1",
    }


@dataclass(frozen=True, slots=True)
class _Sent:
    """One full run and the way back."""

    full: Taken
    restore: Taken
    stored: int

    @property
    def against_line(self) -> float:
        return self.full.seconds / (self.stored / (RATE_MB * 1e6))


def bench_store(
    work: Path, tools: list[Tool], *, files: int, rounds: int, small: bool, say: Say
) -> dict[str, object]:
    """backupd, and restic where it was asked for, in turn."""
    tree = work / "tree"
    say(f"making a tree of {files:,} files")
    corpus = make_tree(tree, files=files)
    expected = digest_tree(tree)
    known: dict[str, Callable[[ObjectStore, str], Tool]] = {"backupd": BackupdS3, "restic": ResticS3}
    names = [tool.name for tool in tools if tool.name in known]
    sent: dict[str, list[_Sent]] = {name: [] for name in names}
    with (
        object_store(work / "server") as store,
        slow_line(store, milliseconds=DELAY_MS, megabytes=RATE_MB, log=work / "line.log") as address,
    ):
        itself = _line_itself(store, address, 2 if small else 16)
        say(f"  the line itself, four puts at once: {itself:.3f} of the time its width needs")
        for number in range(1, rounds + 1):
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:
                bucket = f"{name}-{number}"
                store.client().create_bucket(Bucket=bucket)
                took = _send(known[name](store, address), Bench(work / bucket, tree), store, expected)
                sent[name].append(took)
                say(f"  full {name:9} {took.full.seconds:6.2f} s, {took.against_line:.3f} of the line's time")
    return _tell(sent, itself, f"{corpus.files:,} files, {corpus.bytes / 1e6:,.0f} MB")


def _send(tool: Tool, bench: Bench, store: ObjectStore, expected: str) -> _Sent:
    bench.base.mkdir()
    env, log = tool.env(bench), bench.base / "log"
    run(tool.init(bench), cwd=bench.tree, env=env, log=log)
    before = store.size(bench.base.name)
    digest_tree(bench.tree)  # warms the page cache
    full = run(tool.backup(bench, 1), cwd=bench.tree, env=env, log=log)
    stored = store.size(bench.base.name) - before
    back = run(tool.restore(bench), cwd=bench.tree, env=env, log=log)
    if digest_tree(tool.found(bench)) != expected:
        raise ToolFailed(f"{tool.name} restored something else than it was given")
    return _Sent(full, back, stored)


def _line_itself(store: ObjectStore, address: str, bodies: int) -> float:
    """Time of plain puts over what the line's width allows: what is above 1 is the delay's, this server's and the
    proxy's, and no tool can do better here."""
    store.client().create_bucket(Bucket="plain")
    body = memoryview(Random(3).randbytes(_BODY))
    sizes = [_BODY * (4 + number * 5 % 13) // 16 for number in range(bodies)]  # else all four end at once
    clients = [store.client(address) for _ in range(4)]

    def put(number: int) -> None:
        clients[number % 4].put_object(Bucket="plain", Key=f"{number}", Body=bytes(body[: sizes[number]]))

    started = perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(bodies)))
    return (perf_counter() - started) / (sum(sizes) / (RATE_MB * 1e6))


def _tell(sent: dict[str, list[_Sent]], itself: float, what: str) -> dict[str, object]:
    middle = {
        name: {
            "full, s": median(one.full.seconds for one in rows),
            "full / line's time": median(one.against_line for one in rows),
            "restore, s": median(one.restore.seconds for one in rows),
            "stored, MB": median(one.stored for one in rows) / 1e6,
            "memory full, MB": median(one.full.memory for one in rows) / 1e6,
            "memory restore, MB": median(one.restore.memory for one in rows) / 1e6,
        }
        for name, rows in sent.items()
    }
    print(f"\nstore: {what}, over {DELAY_MS} ms and {RATE_MB} MB/s\n")
    print(
        layout([["", *middle], *([key, *(f"{middle[n][key]:.3f}" for n in middle)] for key in _KEYS)]) + "\n"
    )
    verdicts = []
    if "backupd" in middle:
        ours = middle["backupd"]
        verdicts = [
            Verdict(Goal("full, s", "the line", GOAL), ours["full / line's time"]),
            Verdict(Goal("memory full, bytes", "", MOST_MEMORY), ours["memory full, MB"] * 1e6),
        ]
    tell_verdicts(verdicts)
    return {"what": what, "line itself": itself, "medians": middle, "goals": [v.row() for v in verdicts]}


_KEYS = (
    "full, s",
    "full / line's time",
    "restore, s",
    "stored, MB",
    "memory full, MB",
    "memory restore, MB",
)
