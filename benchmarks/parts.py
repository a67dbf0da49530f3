"""The parts of the benchmark by name, each at full size or small."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import tell
from benchmarks.scenario import Scenario, bench
from benchmarks.tools import Tool

MB = 10**6


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line said."""

    tools: list[Tool]
    rounds: int
    small: bool
    files: int | None
    gigabytes: tuple[float, ...] | None
    counts: tuple[float, ...] | None
    point_gb: float | None
    scale: int | None = None
    initial_gb: float | None = None

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def general(self) -> list[Tool]:
        """Those that take any tree."""
        return [tool for tool in self.tools if tool.name != "pgbackrest"]


def say(text: str) -> None:
    print(text, flush=True)


def _run(work: Path, scenario: Scenario, asked: Asked, tools: list[Tool]) -> dict[str, object]:
    most_runs = asked.size(9, 1)
    taken = bench(work / "rounds", scenario, tools, rounds=asked.rounds, say=say, most_runs=most_runs)
    return tell(scenario, taken, rounds=asked.rounds)


def _trees(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.trees import trees

    made = trees(work, files=asked.files or asked.size(60_000, 400), say=say)
    return _run(work, made, asked, asked.general())


def _mixed(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.mixed import SMALL, Scale, mixed

    with ExitStack() as stack:
        made = mixed(work, scale=SMALL if asked.small else Scale(), stack=stack, say=say)
        return _run(work, made, asked, asked.general())


def _large(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.large import large

    return _run(work, large(work, size=asked.size(1000 * MB, 8 * MB), say=say), asked, asked.general())


def _dump(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.dump import dump

    return _run(work, dump(work, rows=asked.size(2_500_000, 5000), say=say), asked, asked.general())


def _moves(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.trees import moves

    made = moves(work, files=asked.files or asked.size(20_000, 200), say=say)
    return _run(work, made, asked, asked.general())


def _pgdata(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.pgdata import pgdata, programs

    server = programs()
    pair = [tool for tool in asked.tools if tool.name in ("backupd", "pgbackrest")]
    if server is None or not pair:
        reason = "no PostgreSQL of this machine" if server is None else "neither backupd nor pgBackRest"
        say(f"pgdata is left out: {reason}")
        return {"left out": reason}
    made = pgdata(
        work,
        server,
        scale=asked.size(50, 1),
        few=asked.size(4000, 40),
        many=asked.size(100_000, 200),
        say=say,
    )
    return _run(work, made, asked, pair)


def _cluster(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.cluster import bench_cluster
    from benchmarks.pgdata import programs

    server = programs()
    names = {tool.name for tool in asked.tools}
    if server is None or not {"backupd", "pgbackrest"} <= names:
        reason = "it needs backupd, pgBackRest and a PostgreSQL of this machine"
        say(f"cluster is left out: {reason}")
        return {"left out": reason}
    return bench_cluster(
        work,
        server,
        scale=asked.scale or asked.size(335, 1),
        few=asked.size(20_000, 40),
        rounds=asked.rounds,
        say=say,
    )


def _growth(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.growth import growth

    ours = [tool for tool in asked.tools if tool.name == "backupd"]
    if not ours:
        say("growth is left out: it is about backupd")
        return {"left out": "no backupd"}
    sizes = asked.gigabytes or ((0.002, 0.004, 0.008) if asked.small else (1, 4, 16))
    counts = asked.counts or ((50, 100, 200) if asked.small else (10_000, 100_000, 1_000_000))
    svg = work / "growth.svg" if asked.small else Path(__file__).with_name("growth.svg")
    return growth(work, ours[0], gigabytes=sizes, counts=counts, looks=asked.size(3, 1), svg=svg, say=say)


def _store(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.store import bench_store

    files = asked.files or asked.size(60_000, 100)
    work.mkdir(parents=True)
    return bench_store(work, asked.tools, files=files, rounds=asked.rounds, small=asked.small, say=say)


def _files(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.files import bench_files

    size = int((asked.point_gb or (0.004 if asked.small else 4)) * 1000 * MB)
    return bench_files(work, asked.general(), size=size, files=asked.files or asked.size(5000, 30), say=say)


def _postgres(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.postgres import bench_postgres

    return bench_postgres(work, small=asked.small, rounds=asked.rounds, say=say)


def _recording(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.recording import bench_recording

    return bench_recording(
        work, scale=asked.size(20, 1), clients=4, seconds=asked.size(60, 3), rounds=asked.rounds, say=say
    )


def _stream(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.stream import Load, bench_stream

    # So many that a turn takes ten to twenty seconds.
    loads = (
        Load("one at a time", asked.size(200_000, 1000), 1),
        Load("sixteen at once", asked.size(1_000_000, 2000), 16),
    )
    return bench_stream(work, loads=loads[: asked.size(2, 1)], rounds=asked.rounds, say=say)


def _initial(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.initial import bench_initial

    size = int((asked.initial_gb or (0.02 if asked.small else 1)) * 1000 * MB)
    return bench_initial(work, size=size, say=say)


def _start(work: Path, asked: Asked) -> dict[str, object]:
    from benchmarks.start import bench_start

    return bench_start(work, runs=asked.size(15, 3), say=say)


PARTS: dict[str, Callable[[Path, Asked], dict[str, object]]] = {
    "trees": _trees,
    "mixed": _mixed,
    "large": _large,
    "dump": _dump,
    "moves": _moves,
    "pgdata": _pgdata,
    "cluster": _cluster,
    "growth": _growth,
    "store": _store,
    "files": _files,
    "postgres": _postgres,
    "recording": _recording,
    "stream": _stream,
    "initial": _initial,
    "start": _start,
}
MANY_FILES = {"trees", "moves", "growth", "store"}
