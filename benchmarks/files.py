"""One file out of a large recovery point: how long a person waits for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.corpus import Maker, make_tree
from benchmarks.goals import MOST_MEMORY, Goal, Verdict
from benchmarks.large import write_file
from benchmarks.measure import Taken, ToolFailed, run
from benchmarks.report import layout, tell_verdicts
from benchmarks.scenario import Say
from benchmarks.tools import Bench, Tool, backupd_argv

GOAL = 0.3
_FILE = 64 * 10**6
_TIMES = 5


def bench_files(work: Path, tools: Sequence[Tool], *, size: int, files: int, say: Say) -> dict[str, object]:
    """`files` small ones and large ones up to `size` bytes; one of the small and one of the large are asked for."""
    tree = work / "tree"
    say(f"making a point of {size / 1e9:g} GB: {files:,} small files, the rest large ones")
    left = size - make_tree(tree / "small", files=files).bytes
    maker = Maker(seed=31)
    (tree / "large").mkdir()
    for number in range(max(1, left // _FILE)):
        write_file(tree / "large" / f"{number:04d}.raw", maker.binary, min(_FILE, max(1 << 20, left)))
    small = sorted(path for path in (tree / "small").rglob("*.py") if path.is_file())
    large = sorted((tree / "large").iterdir())
    wanted = {"small file": small[len(small) // 2], "64 MB file": large[len(large) // 2]}
    seconds: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    for index, tool in enumerate(tools):
        bench = Bench(work / f"bench-{index}", tree)
        bench.base.mkdir()
        env, log = tool.env(bench), bench.base / "log"
        run(tool.init(bench), cwd=tree, env=env, log=log)
        full = run(tool.backup(bench, 1), cwd=tree, env=env, log=log)
        say(f"  {tool.name}: full {full.seconds:.2f} s")
        seconds[tool.name] = {}
        for what, path in wanted.items():
            taken = [_take(tool, bench, path) for _ in range(_TIMES)]
            seconds[tool.name][what] = median(one.seconds for one in taken)
            memory[tool.name] = max(one.memory for one in taken)
        if tool.name == "backupd":
            shutil.rmtree(bench.base / "backupd", ignore_errors=True)  # what it knows of its repository
            seconds[tool.name]["small file, cache lost"] = _take(tool, bench, wanted["small file"]).seconds
        shutil.rmtree(bench.base)  # few objects: the next tool needs the room
    return _tell(seconds, memory, size)


def _take(tool: Tool, bench: Bench, path: Path) -> Taken:
    """Raises ToolFailed where something else comes."""
    log = bench.base / "out"
    argv = _argv(tool, bench, path.relative_to(bench.tree).as_posix())
    taken = run(argv, cwd=bench.tree, env=tool.env(bench), log=log)
    if log.read_bytes() != path.read_bytes():
        raise ToolFailed(f"{tool.name} gave another file than {path.name}")
    return taken


def _argv(tool: Tool, bench: Bench, path: str) -> list[str]:
    """Whatever writes one file to standard output."""
    tar = ["bash", "-c", 'zstd -q -d -c "$1"/*.zst | tar --extract --to-stdout --file - "./$2"', "cat"]
    return {
        "backupd": [*backupd_argv(), "-q", "cat", "tree", path],
        "restic": ["restic", "-q", "dump", "latest", f"/{path}"],
        "borg": ["borg", "extract", "--stdout", "::run1", path],
        "tar|zstd": [*tar, str(bench.repository), path],
    }[tool.name]


def _tell(seconds: dict[str, dict[str, float]], memory: dict[str, float], size: int) -> dict[str, object]:
    names = list(seconds)
    rows = [["", *names]]
    for what in max(seconds.values(), key=len):
        cells = [f"{seconds[name][what]:.3f}" if what in seconds[name] else "" for name in names]
        rows.append([f"{what}, s", *cells])
    rows.append(["memory, MB", *(f"{memory[name] / 1e6:.1f}" for name in names)])
    print(f"\nfiles: one out of {size / 1e9:g} GB\n\n{layout(rows)}\n")
    verdicts = []
    if "backupd" in seconds:
        verdicts = [
            Verdict(Goal("small file, s", "", GOAL), seconds["backupd"]["small file"]),
            Verdict(Goal("memory, bytes", "", MOST_MEMORY), memory["backupd"]),
        ]
    tell_verdicts(verdicts)
    return {"seconds": seconds, "memory": memory, "goals": [verdict.row() for verdict in verdicts]}
