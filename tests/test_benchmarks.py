"""The benchmark works: every step is done and measured, and a tool that restores something else is refused.

No figure is judged here: a machine that runs tests is busy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.corpus import change_tree, digest_tree, make_tree
from benchmarks.measure import ToolFailed, run
from benchmarks.report import STEPS
from benchmarks.tools import Bench, TarZstd
from benchmarks.trees import bench_trees


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_a_small_benchmark_tells_medians_and_ratios_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out.json"
    argv = ["trees", "start", "--small", "--no-install", "--tools", "backupd,tar|zstd"]
    assert main([*argv, "--work", str(work), "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    for tool in ("backupd", "tar|zstd"):
        medians = told["trees"]["medians"][tool]
        assert all(medians[f"{step}, s"] > 0 for step in STEPS)
        assert 0 < medians["repository, bytes"] < told["trees"]["bytes"]
        assert medians["grown, bytes"] > 0
    assert {row["peer"] for row in told["trees"]["ratios"]} == {"tar|zstd"}
    assert told["versions"]["backupd"].startswith("backupd ")
    assert told["start"]["more"] > 0
    assert "| full, s" in capsys.readouterr().out
    assert list(work.iterdir()) == []


def test_the_same_seed_makes_the_same_tree_and_the_same_changes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_tree(tmp_path / name, files=150)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    for name in ("one", "two"):
        assert change_tree(tmp_path / name, share=0.2, seed=3) == 30
    after = contents(tmp_path / "one")
    assert after == contents(tmp_path / "two")
    different = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert len(different) == 30


class Forgetful(TarZstd):
    """Restores all but one."""

    def restore(self, bench: Bench) -> list[str]:
        argv = super().restore(bench)
        argv[2] += '; rm "$(find "$2" -type f | head -n 1)"'
        return argv


def test_a_tool_that_restores_something_else_makes_the_benchmark_fail(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="restored something else"):
        bench_trees(tmp_path, [Forgetful()], files=30, rounds=1, say=lambda _: None)


def test_a_changed_mode_byte_or_name_changes_the_digest_of_a_tree(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b"
    file.parent.mkdir()
    file.write_bytes(b"one")
    digests = [digest_tree(tmp_path)]
    file.write_bytes(b"two")
    digests.append(digest_tree(tmp_path))
    file.chmod(0o600)
    digests.append(digest_tree(tmp_path))
    file.rename(file.with_name("c"))
    digests.append(digest_tree(tmp_path))
    assert len(set(digests)) == 4


def test_memory_is_that_of_all_processes_at_one_time(tmp_path: Path) -> None:
    hold = f'{sys.executable} -c "import time; kept = bytes(range(256)) * 160000; time.sleep(1)"'
    taken = run(["sh", "-c", f"{hold} & {hold} & wait"], cwd=tmp_path, env={}, log=tmp_path / "log")
    assert 80 << 20 < taken.memory < 160 << 20


def test_a_program_that_ends_badly_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="no such thing"):
        run(["sh", "-c", "echo no such thing; exit 3"], cwd=tmp_path, env={}, log=tmp_path / "log")
