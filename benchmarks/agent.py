"""An agent that records a source while something is measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.containers import wait_for
from benchmarks.measure import ToolFailed
from benchmarks.tools import backupd_argv, clean_env

_CONFIG = """
[repository]
location = "{repository}"
[serve]
listen = "{listen}"
prune_schedule = "never"
verify_schedule = "never"
[sources.{source}]
mode = "pitr"
{settings}
"""


class Agent:
    """One in a directory of its own, with a new repository."""

    def __init__(self, home: Path, source: str, settings: str) -> None:
        """`settings`: of the source, lines of TOML."""
        self.repository = home / "repository"
        self._home, self._source = home, source
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._listen = f"127.0.0.1:{free.getsockname()[1]}"
        config = home / "backupd.toml"
        config.write_text(
            _CONFIG.format(repository=self.repository, listen=self._listen, source=source, settings=settings)
        )
        self.env = clean_env(home, BACKUPD_CONFIG=str(config), XDG_STATE_HOME=str(home))
        subprocess.run([*backupd_argv(), "-q", "init"], cwd=home, env=self.env, check=True)

    @contextmanager
    def serving(self, ready: Callable[[Mapping[str, Any]], bool] = lambda _recorder: True) -> Iterator[int]:
        """Its process; it records and has made its base. `ready` is asked about the recorder's state besides."""
        log = self._home / "serve.log"
        with log.open("ab") as out:
            agent = subprocess.Popen(
                [*backupd_argv(), "serve"], cwd=self._home, env=self.env, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            wait_for(lambda: self._records(agent, log, ready), "the agent", timeout=600)
            yield agent.pid
        finally:
            agent.terminate()
            agent.wait()

    def _records(
        self, agent: subprocess.Popen[bytes], log: Path, ready: Callable[[Mapping[str, Any]], bool]
    ) -> bool:
        if agent.poll() is not None:
            raise ToolFailed(log.read_text()[-2000:])
        try:
            with urllib.request.urlopen(f"http://{self._listen}/status", timeout=5) as answer:
                told = json.load(answer)
        except OSError:
            return False
        recorder = told["recorders"][self._source]
        made = any(job["job"] == "backup" and job["last_ok"] and not job["doing"] for job in told["jobs"])
        return ready(recorder) and made and recorder["state"] == "recording"


def processor_seconds(pid: int) -> float:
    """What a process has used so far, of all cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_anew(pid: int) -> None:
    """Forget how much memory a process had at most, up to now (clear_refs(5), proc(5))."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def most_resident(pid: int) -> int:
    """Bytes that a process had resident at most."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split(None, 1)[0]) * 1024
