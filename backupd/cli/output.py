"""How results look: tables and bars on a terminal, plain lines elsewhere, one JSON document with --json."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backupd.cli.options import Session
from backupd.config import Table
from backupd.log import mask
from backupd.model import Progress, Silence

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

_EVERY = 10.0  # seconds between two lines about the same work, where there is no terminal


def print_json(value: object) -> None:
    """The one document of --json. Times are RFC 3339 in UTC, spans seconds, sizes bytes."""
    print(mask(json.dumps(plain(value), indent=2, ensure_ascii=False)))


def plain(value: Any) -> Any:  # noqa: PLR0911  a table, read downward
    """Anything of ours as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Table):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, int | float | bool | None) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Aligned columns. `right` are the numbers of those set to the right. Never cut, so that `grep` finds."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print(printable("  ".join(cells).rstrip()))


def printable(text: str) -> str:
    """Text for a terminal: no control characters (a file's name may hold any), no lone surrogates."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
    return mask(shown).encode("utf-8", "backslashreplace").decode()


def size(count: float) -> str:
    """Bytes in powers of 1000: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} PB"


def seconds(span: float) -> str:
    """`0.4 s`, `12 s`, `3m 20s`."""
    if span < 60:
        return f"{span:.1f} s" if span < 10 else f"{span:.0f} s"
    from backupd.config.values import format_duration

    return format_duration(timedelta(seconds=span))


def age(then: datetime, now: datetime) -> str:
    """`3h 20m ago`, `in 2h`, `just now`."""
    from backupd.config.values import format_duration

    span = now - then
    if abs(span) < timedelta(seconds=1):
        return "just now"
    text = format_duration(timedelta(seconds=round(abs(span).total_seconds())))
    return f"{text} ago" if span > timedelta(0) else f"in {text}"


def note(session: Session, text: str) -> None:
    """A line for a person on standard error; not with --quiet."""
    if not session.quiet:
        sys.stdout.flush()  # both often go to one place: keep their order
        print(printable(text), file=sys.stderr, flush=True)


# --- progress ----------------------------------------------------------------------------------------

Watcher = Callable[[str, int], Progress]
"""Name of the work and its bytes in all (0: unknown) -> who to tell."""


@contextmanager
def watching(session: Session) -> Iterator[Watcher]:
    """Bars on a terminal, lines elsewhere, nothing with --quiet; on standard error, results stay clean."""
    if session.quiet:
        yield lambda _name, _total: Silence()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars() as bars:
            yield lambda name, total: _Bar(bars, name, total)
    else:
        lock = threading.Lock()
        yield lambda name, total: _Lines(name, total, lock)


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[name]}", style="bold"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", style="dim"),
        console=Console(stderr=True),
        transient=True,
    )


class _Bar:
    def __init__(self, bars: Bars, name: str, total: int) -> None:
        self._bars, self._name = bars, name
        self._task = bars.add_task("", total=total or None, name=name)

    def stage(self, text: str) -> None:
        self._bars.update(
            self._task, description=mask(text.removeprefix(f"{self._name}: ")).replace("[", "\\[")
        )

    def advance(self, size: int = 0, members: int = 0) -> None:  # noqa: ARG002  bytes are what is drawn
        self._bars.advance(self._task, size)


class _Lines:
    """A line for each stage, and one every ten seconds while bytes flow."""

    def __init__(self, name: str, total: int, lock: threading.Lock) -> None:
        self._name, self._total, self._lock = name, total, lock
        self._done = 0
        self._next = time.monotonic() + _EVERY

    def stage(self, text: str) -> None:
        self._print(text)

    def advance(self, size: int = 0, members: int = 0) -> None:  # noqa: ARG002
        with self._lock:
            self._done += size
            due = time.monotonic() >= self._next
        if due:
            of = f" of {_size(self._total)}" if self._total else ""
            self._print(f"{_size(self._done)}{of}")

    def _print(self, text: str) -> None:
        with self._lock:
            self._next = time.monotonic() + _EVERY
            print(
                printable(f"{self._name}: {text.removeprefix(self._name + ': ')}"),
                file=sys.stderr,
                flush=True,
            )


_size = size  # `advance` has a parameter of that name
