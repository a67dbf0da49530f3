"""The benchmark works: every step is done and measured, and a tool that restores something else is refused.

No figure is judged here: a machine that runs tests is busy.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.chart import Line, Panel, write_svg
from benchmarks.corpus import change_tree, digest_tree, make_tree
from benchmarks.goals import Goal, judge
from benchmarks.large import byte_ahead, write_over
from benchmarks.measure import ToolFailed, run
from benchmarks.mixed import vector
from benchmarks.objectstore import ObjectStore, slow_line
from benchmarks.scenario import Scenario, Step, bench
from benchmarks.states import keep, put_back
from benchmarks.tools import Bench, TarZstd


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory that a server's own user can reach, as it cannot pytest's."""
    with tempfile.TemporaryDirectory(prefix="backupd-test-bench-", dir="/var/tmp") as made:
        Path(made).chmod(0o711)
        yield Path(made)


def small(disk: Path, *parts: str) -> dict[str, Any]:
    """What a small benchmark tells; nothing of it stays."""
    work, out = disk / "work", disk / "out.json"
    argv = [*parts, "--small", "--no-install", "--tools", "backupd,tar|zstd,pgbackrest"]
    assert main([*argv, "--work", str(work), "--json", str(out)]) == 0
    assert list(work.iterdir()) == []
    told: dict[str, Any] = json.loads(out.read_text())
    return told


def test_a_small_benchmark_tells_medians_and_ratios_and_leaves_nothing(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = small(disk, "trees", "start")
    for tool in ("backupd", "tar|zstd"):
        medians = told["trees"]["medians"][tool]
        for step in ("full", "unchanged", "1% changed", "went back", "restore"):
            assert medians[f"{step}, s"] > 0
        assert medians["repository, bytes"] > 0
        assert medians["grown 1% changed, bytes"] > 0
    assert {row["peer"] for row in told["trees"]["goals"]} == {"tar|zstd", ""}
    assert told["versions"]["backupd"].startswith("backupd ")
    start = told["start"]["medians"]
    assert min(start.values()) > 0  # which is less is told, and not for a busy machine to decide
    assert told["start"]["more"] == start["backupd --version"] - start["python"]
    said = capsys.readouterr().out
    assert "| full, s" in said
    assert "goals met" in said


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("mixed", ("40 tx + 1%", "200 tx", "went back")),
        ("large", ("1% changed", "byte ahead", "went back")),
        ("dump", ("1% changed", "byte ahead", "went back")),
        ("moves", ("renamed", "copied")),
    ],
)
def test_each_corpus_is_made_changed_and_restored(disk: Path, part: str, changes: tuple[str, ...]) -> None:
    medians = small(disk, part)[part]["medians"]
    for tool in ("backupd", "tar|zstd"):
        assert medians[tool]["restore, s"] > 0
        for step in changes:
            assert medians[tool][f"{step}, s"] > 0
            assert medians[tool][f"grown {step}, bytes"] > 0


def test_pgdata_is_compared_with_pgbackrest_where_there_is_one(disk: Path) -> None:
    told = small(disk, "pgdata")
    if "left out" not in told["pgdata"]:
        assert told["pgdata"]["medians"]["backupd"]["40 tx, s"] > 0


def test_a_cluster_at_work_is_compared_with_pgbackrest_where_there_is_one(disk: Path) -> None:
    told = small(disk, "cluster")["cluster"]
    if "left out" not in told:
        for tool in ("backupd", "pgbackrest"):
            assert told["medians"][tool]["restore, s"] > 0
            assert told["medians"][tool]["second, stored MB"] > 0


def test_growth_is_measured_along_both_axes(disk: Path) -> None:
    told = small(disk, "growth")["growth"]
    assert [point["amount"] for point in told["by count"]] == [50, 100, 200]
    assert all(point["full"]["memory"] > 0 for point in told["by size"])


def test_a_store_is_judged_by_the_line_to_it(disk: Path) -> None:
    told = small(disk, "store")["store"]
    assert told["medians"]["backupd"]["stored, MB"] > 0
    assert told["line itself"] > 0.9
    assert told["goals"][0]["peer"] == "the line"


def test_recording_is_measured_in_turns_alone_and_beside_another_receiver(disk: Path) -> None:
    told = small(disk, "recording")["recording"]
    assert {kind: each["transactions a second"] > 0 for kind, each in told["ratio"].items()} == {
        "receiver": True,
        "agent": True,
    }
    assert 0 < told["lag"]["median"] <= told["lag"]["p95"] <= told["lag"]["max"]
    assert {kind: len(turns) for kind, turns in told["all"].items()} == dict.fromkeys(told["medians"], 1)


def test_a_stream_is_measured_in_turns_beside_others_that_receive_it(disk: Path) -> None:
    told = small(disk, "stream")["stream"]["one at a time"]
    assert set(told["all"]) == {"reader", "replica", "agent"}
    assert {"SET", "LPUSH"} <= set(told["ratio"]["agent"])
    assert told["costs"]["agent"]["memory"] > 0
    assert told["costs"]["replica"]["beside"] > 0


def test_memory_for_a_first_base_is_measured_for_a_server_and_for_a_tenth_of_it(disk: Path) -> None:
    told = small(disk, "initial")["initial"]
    assert list(told["taken"]) == ["2000000", "20000000"]
    assert told["ratio"] > 0


def test_one_file_comes_out_of_a_point_and_a_database_out_of_its_server(disk: Path) -> None:
    told = small(disk, "files", "postgres")
    for tool in ("backupd", "tar|zstd"):
        assert told["files"]["seconds"][tool]["small file"] > 0
    assert told["postgres"]["ratio"] > 0


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
    tree = tmp_path / "tree"
    make_tree(tree, files=30)
    scenario = Scenario("tree", "", tree, (Step("full", restore="restore"),), ())
    with pytest.raises(ToolFailed, match="restored something else"):
        bench(tmp_path / "rounds", scenario, [Forgetful()], rounds=1, say=lambda _: None)


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


def test_bytes_read_are_those_of_all_processes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5_000_000))
    taken = run(["sh", "-c", "cat file > copy"], cwd=tmp_path, env={}, log=tmp_path / "log")
    assert 5_000_000 <= taken.read < 6_000_000


def test_a_tree_is_put_back_as_it_was(tmp_path: Path) -> None:
    tree, aside = tmp_path / "tree", tmp_path / "aside"
    make_tree(tree, files=120)
    expected = digest_tree(tree)
    keep(tree, aside)
    change_tree(tree, share=0.5, seed=1)
    (tree / "new" / "below").mkdir(parents=True)
    (tree / "new" / "link").symlink_to("below")
    assert digest_tree(tree) != expected
    put_back(aside, tree)
    assert digest_tree(tree) == expected


def test_a_large_file_changes_in_places_and_moves_on_by_a_byte(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    write_over(file, share=0.1, seed=1)
    changed = file.read_bytes()
    assert len(changed) == 1 << 20
    assert 50_000 < sum(byte != 0 for byte in changed) <= 104_858
    byte_ahead(file, 7)
    assert file.read_bytes() == b"\x07" + changed


def test_vectors_are_floats_as_embeddings_have_them() -> None:
    import array
    import random

    numbers = array.array("f", vector(random.Random(1)))
    assert len(numbers) == 384
    assert all(1 / 128 <= abs(number) < 1 / 8 for number in numbers)
    assert {number > 0 for number in numbers} == {True, False}


def test_goals_are_judged_by_ratio_or_by_the_figure_itself() -> None:
    middle = {"backupd": {"full, s": 2.0, "memory full, bytes": 5e7}, "restic": {"full, s": 10.0}}
    goals = (
        Goal("full, s", "restic", 0.25),
        Goal("full, s", "restic", 0.1),
        Goal("memory full, bytes", "", 4e7),
        Goal("full, s", "borg", 1.0),  # not measured: judged by nothing
        Goal("restore, s", "restic", 1.0),
    )
    assert [verdict.met for verdict in judge(goals, middle)] == [True, False, False]
    assert "50.00  goal 40: MISSED" in judge(goals, middle)[-1].line()


def test_a_chart_is_well_formed(tmp_path: Path) -> None:
    lines = [Line("full", [1.0, 4.0, 16.0]), Line("un<changed", [0.2, 0.2, 0.3])]
    panels = [Panel("by & by", [1, 4, 16], lines, linear=True), Panel("memory", [1, 4, 16], lines, limit=100)]
    write_svg(tmp_path / "chart.svg", panels)
    root = ET.parse(tmp_path / "chart.svg").getroot()
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 12


def test_a_slow_line_carries_everything_no_quicker_than_it_may(tmp_path: Path) -> None:
    sent = bytes(range(256)) * 4096
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                got = b""
                while piece := connection.recv(1 << 16):
                    got += piece
                connection.sendall(got)

        answering = threading.Thread(target=echo, daemon=True)
        answering.start()
        store = ObjectStore(f"127.0.0.1:{server.getsockname()[1]}", "", "")
        with slow_line(store, milliseconds=40, megabytes=10, log=tmp_path / "line.log") as address:
            host, _, port = address.partition(":")
            started = time.monotonic()
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                got = b""
                while piece := connection.recv(1 << 16):
                    got += piece
            took = time.monotonic() - started
        answering.join(10)
    assert got == sent
    assert took > 2 * len(sent) / 10e6  # there and back, one after the other
