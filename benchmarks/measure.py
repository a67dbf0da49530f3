"""Run a program and see what it took: wall time, processor time, memory of it and of all it started."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.05  # seconds between looks at memory: 0.1 ms of work each
_TOUCHED = 3 << 30


@dataclass(slots=True)
class Memory:
    """Whether memory is made ready before each run: some seconds, of no use where only is tried what works."""

    made_ready: bool = False


MEMORY = Memory()


class ToolFailed(Exception):
    """A program that was measured ended badly: the whole benchmark is void."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run took."""

    seconds: float
    processor: float
    """Seconds of all cores, of the process and all it started: steadier than `seconds` on a busy machine."""
    memory: int
    """Bytes: the most that its processes had resident, summed over those that lived at the same time."""
    read: int = 0
    """Bytes that it and all it waited for took in by read(2), files and pipes, whether from the disk or the page
    cache. 0 where the kernel does not tell."""


def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    allowed: Sequence[int] = (0,),
    touched: int = _TOUCHED,
) -> Taken:
    """Run one program to its end, from a cold start. Raises ToolFailed with its last words. `touched`: bytes of memory
    that are made ready for it."""
    with log.open("wb") as out:
        os.sync()  # the writeback of whoever ran before is not this one's to wait for
        _touch_memory(touched if MEMORY.made_ready else 0)
        started = time.perf_counter()
        process = subprocess.Popen(argv, cwd=cwd, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        watch = _Watch(process.pid)
        watch.start()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - started
        read = _read_by(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.ended.set()
        watch.join()
    if process.returncode not in allowed:
        last = log.read_bytes()[-2000:].decode(errors="replace")
        raise ToolFailed(f"{' '.join(argv)} ended with {process.returncode}:\n{last}")
    return Taken(seconds, usage.ru_utime + usage.ru_stime, watch.most, read)


def _touch_memory(size: int) -> None:
    """Have so much of what is free backed. A virtual machine gives free memory back to its host after seconds, and then
    the first use of a page costs five times as much (2.4 s a GB here): whoever filled the page cache first would pay
    for those who come after."""
    size = min(size, os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE)
    if size:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))


def _read_by(pid: int) -> int:
    """Of a process that has ended and was not waited for yet."""
    try:
        told = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return 0
    return int(told.partition("rchar:")[2].split(None, 1)[0])


class _Watch(threading.Thread):
    """Sums up the memory of a process and its descendants, now and then. Not ru_maxrss: that knows one process
    only, and on Linux counts what the parent had when it forked."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.ended = threading.Event()
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, _most_resident(self._pid))
            if self.ended.wait(_EVERY):
                return


def _most_resident(pid: int) -> int:
    """Bytes, high-water marks of a process and its children; 0 for what is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        kib = int(status.partition("VmHWM:")[2].split(None, 1)[0])
        children = [
            child
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError, IndexError):
        return 0
    return kib * 1024 + sum(_most_resident(int(child)) for child in children)
