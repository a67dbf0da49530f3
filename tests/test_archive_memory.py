"""Memory stays flat: the peak of a run does not know how much data there is."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from engine import Engine

from backupd.model import Stream, Streams
from backupd.stores import LocalStore

PEAK = 200 << 20
"""Bytes; the goal, with the interpreter and all libraries."""
RESTORE_PEAK = 100 << 20
"""Of a restore, with the processes that write."""

# Not ru_maxrss: the kernel lets a process inherit its parent's, and pytest may have had more than all this.
PEAK_NOW = """
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
"""

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from engine import Engine
from backupd.model import Stream, Streams
from backupd.stores import LocalStore

size, root = int(sys.argv[1]), Path(sys.argv[2])
block = bytes(range(256)) * 2048

def dump():
    for number in range(size // len(block)):
        yield number.to_bytes(8, "big") + block[8:]

engine = Engine(LocalStore(root, create=True))
engine.write(Streams([Stream("a.dump", dump())]))
point = engine.write(Streams([Stream("a.dump", dump())]))
total = sum(len(chunk) for chunk in engine.archive(point).read("a.dump"))
print(json.dumps([total, point.stored, peak()]))
"""

TREE = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from engine import Engine
from backupd.stores import LocalStore

engine = Engine(LocalStore(Path(sys.argv[3]), create=True))
point = engine.write(Path(sys.argv[2]))
(Path(sys.argv[2]) / "0" / "0").write_text("changed")
point = engine.write(Path(sys.argv[2]))
engine.restore(point, Path(sys.argv[4]))
print(json.dumps([point.members, point.stored, peak()]))
"""

WRITTEN = """
import json, random, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from engine import Engine
from backupd.model import Stream, Streams
from backupd.stores import LocalStore

def dump(size, kept):
    for number in range(size >> 20):
        yield random.Random(number if number // 8 % 3 < kept else number + 10**6).randbytes(1 << 20)

engine = Engine(LocalStore(Path(sys.argv[2]), create=True))
for kept in (3, 1):
    point = engine.write(Streams([Stream("a.dump", dump(int(sys.argv[1]), kept))]))
print(json.dumps([point.size, point.stored, peak()]))
"""

PRUNED = """
import json, sys
from datetime import UTC, datetime
from pathlib import Path
from backupd.model import Silence
from backupd.prune import prune
from backupd.repository import Repository
from backupd.retention import Policy
from backupd.stores import LocalStore
from backupd.verify import verify

repository = Repository.open(LocalStore(Path(sys.argv[1])))
policy = Policy(last=1)
pruned = prune(repository, dict(source=policy, tree=policy), clock=lambda: datetime.now(UTC), progress=Silence())
verified = verify(repository, sources=None, data_percent=100, progress=Silence())
assert not verified.problems
print(json.dumps([verified.bytes_read, pruned.bytes_rewritten, peak()]))
"""

RESTORED = """
import json, sys
from pathlib import Path
from backupd.archive import open_archive
from backupd.archive.extract_apart import ExtractApart
from backupd.repository import Repository
from backupd.stores import LocalStore

theirs, plain = dict(), ExtractApart.written

def watched(self):
    status = Path("/proc", str(self.pid), "status").read_text()
    theirs[self.pid] = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return plain(self)

ExtractApart.written = watched
repository = Repository.open(LocalStore(Path(sys.argv[1])))
(point,) = repository.points()
open_archive(repository, point).extract(Path(sys.argv[2]))
print(json.dumps([len(theirs), max(theirs.values()), peak() + sum(theirs.values())]))
"""


def measure(script: str, *argv: object) -> tuple[int, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK_NOW + script.format(tests=str(Path(__file__).parent)), *map(str, argv)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    total, stored, peak = json.loads(done.stdout)
    return total, stored, peak


def test_the_peak_is_the_same_for_five_times_the_data(tmp_path: Path) -> None:
    total, _, small = measure(SCRIPT, 128 << 20, tmp_path / "small")
    assert total == 128 << 20
    total, stored, large = measure(SCRIPT, 640 << 20, tmp_path / "large")
    assert total == 640 << 20
    assert stored < 1 << 20  # the second dump is the first one again
    assert large < PEAK
    assert large < small + (40 << 20)


def test_the_peak_hardly_grows_with_the_number_of_files(tmp_path: Path) -> None:
    peaks = []
    for name, directories in (("few", 10), ("many", 120)):
        for directory in range(directories):
            (tmp_path / name / str(directory)).mkdir(parents=True)
            for number in range(100):
                (tmp_path / name / str(directory) / str(number)).write_bytes(
                    b"%d" % (directory * 100 + number)
                )
        members, _, peak = measure(
            TREE, directories, tmp_path / name, tmp_path / f"r-{name}", tmp_path / f"o-{name}"
        )
        assert members == directories * 101 + 1
        peaks.append(peak)
    few, many = peaks
    assert many < PEAK
    assert many < few + (60 << 20)


def test_repacking_and_verifying_take_no_more_memory_for_four_times_the_data(tmp_path: Path) -> None:
    peaks = []
    for size in (192 << 20, 576 << 20):
        measure(WRITTEN, size, tmp_path / str(size))
        read, rewritten, peak = measure(PRUNED, tmp_path / str(size))
        assert read > size
        assert size / 6 < rewritten < size / 2
        peaks.append(peak)
    small, large = peaks
    assert large < PEAK
    assert large < small + (40 << 20)


def test_a_restore_and_its_processes_take_no_more_memory_for_four_times_the_data(tmp_path: Path) -> None:
    peaks = []
    for size in (96 << 20, 384 << 20):
        engine = Engine(LocalStore(tmp_path / f"r-{size}", create=True))
        engine.write(Streams([Stream(f"{number}", blocks(number, size // 3)) for number in range(3)]))
        count, one, peak = measure(RESTORED, tmp_path / f"r-{size}", tmp_path / f"o-{size}")
        assert count == 2
        assert one < 32 << 20
        peaks.append(peak)
    small, large = peaks
    assert large < small + (20 << 20)
    assert large < RESTORE_PEAK


def blocks(seed: int, size: int) -> Iterator[bytes]:
    for number in range(size >> 20):
        yield random.Random(seed * 1000 + number).randbytes(1 << 19) * 2
