"""A backupd that tells the stages of its work, and ends or waits at one of them.

    python stages.py serve ...    with, in the environment,
    STAGES_TRACE=file   each stage is a line of this file, written before the next begins
    STAGES_KILL=n       the process kills itself (SIGKILL) when it reaches the n-th stage
    STAGES_HOLD=name    it waits at the first stage of this name until STAGES_TRACE + ".go" exists

Everything else is backupd itself; a stage is a place in it, not a replacement of it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backupd import catalog
from backupd.drivers import volume
from backupd.model import RunStatus
from backupd.stores import local

TRACE = Path(os.environ["STAGES_TRACE"])
KILL = int(os.environ.get("STAGES_KILL", "-1"))
HOLD = os.environ.get("STAGES_HOLD", "")

_lock = threading.Lock()
_count = 0


def stage(name: str) -> None:
    """Called where the work passes."""
    global _count
    with _lock:
        number, _count = _count, _count + 1
        with TRACE.open("a") as file:
            file.write(name + "\n")
        if number == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
    if name == HOLD:
        while not TRACE.with_name(TRACE.name + ".go").exists():
            time.sleep(0.02)


def around(owner: Any, name: str, before: Callable[..., str], after: Callable[..., str]) -> None:
    """Stages before and after every call of a function."""
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        if text := before(*args):
            stage(text)
        result = inner(*args, **kwargs)
        if text := after(*args):
            stage(text)
        return result

    setattr(owner, name, outer)


def _what(path: Path) -> str:
    """`packs`, `points` or `leases`."""
    return next((part for part in path.parts if part in ("packs", "points", "leases")), "head")


def install() -> None:
    around(volume.VolumeDriver, "capture", lambda *_: "capture", lambda *_: "")
    around(local.LocalStore, "lease", lambda *_: "lease asked", lambda *_: "")
    around(
        local, "_publish", lambda _, path: f"{_what(path)} written", lambda _, path: f"{_what(path)} named"
    )

    def recording(_self: Any, run: Any) -> str:
        return "" if run.job != "backup" else f"record {run.status.value}"

    def recorded(_self: Any, run: Any) -> str:
        running = run.job == "backup" and run.status is RunStatus.RUNNING
        return "recorded running" if running else ""

    around(catalog.Catalog, "record", recording, recorded)


if __name__ == "__main__":
    from backupd.cli import main

    install()
    main()
