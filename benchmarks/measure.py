"""Run a program and see what it took: wall time, processor time, memory of it and of all it started."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.05  # seconds between looks at memory: 0.1 ms of work each
_PAGE = resource.getpagesize()


class ToolFailed(Exception):
    """A program that was measured ended badly: the whole benchmark is void."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run took."""

    seconds: float
    processor: float
    """Seconds of both cores, of the process and all it started."""
    largest: int
    """Bytes: the most memory one process of it had resident."""
    together: int
    """Bytes: the most that all its processes had resident at one look, shared pages counted in each."""


def run(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path, allowed: Sequence[int] = (0,)
) -> Taken:
    """Run one program to its end, from a cold start. Raises ToolFailed with its last words."""
    with log.open("wb") as out:
        os.sync()  # the writeback of whoever ran before is not this one's to wait for
        started = time.perf_counter()
        process = subprocess.Popen(argv, cwd=cwd, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        watch = _Watch(process.pid)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.ended.set()
        watch.join()
    if process.returncode not in allowed:
        last = log.read_bytes()[-2000:].decode(errors="replace")
        raise ToolFailed(f"{' '.join(argv)} ended with {process.returncode}:\n{last}")
    largest = usage.ru_maxrss * 1024
    return Taken(seconds, usage.ru_utime + usage.ru_stime, largest, max(largest, watch.most))


class _Watch(threading.Thread):
    """Sums up the memory of a process and its descendants, now and then."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.ended = threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self.ended.wait(_EVERY):
            self.most = max(self.most, _resident(self._pid))


def _resident(pid: int) -> int:
    """Bytes; 0 for what is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            child
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError, IndexError):
        return 0
    return pages * _PAGE + sum(_resident(int(child)) for child in children)
