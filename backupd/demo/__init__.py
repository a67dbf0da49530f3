"""The whole story on a throwaway stack: filled, backed up, changed, lost, and brought back to one instant.

The main steps are `backupd` itself, run as a user runs it. What it brought back is compared with pictures
taken before (picture.py), which know nothing of how a backup is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backupd.demo import orders, sessions, uploads, vectors
from backupd.demo.picture import Picture
from backupd.demo.stack import Services, Stack
from backupd.errors import BackupdError, Interrupted, RestoreFailed
from backupd.plan import format_instant

STACK = "productdemo"
KINDS = {"orders": "PostgreSQL", "sessions": "Redis", "vectors": "ChromaDB", "uploads": "a data directory"}

Say = Callable[[str], None]
"""Told of each step, a line at a time."""

CONFIGURATION = """\
state = "./state"

[repository]
location = "./repository"

{sources}
[stacks.{stack}]
sources = [{names}]
"""


@dataclass(slots=True)
class Demo:
    """One telling of the story. `say` is given every line; the commands write theirs beside it."""

    stack: Stack
    say: Say
    folder: Path
    _step: int = 0
    _took: dict[str, float] = field(default_factory=dict)

    def tell(self) -> None:
        """All of it. Raises RestoreFailed when what came back is not what was there."""
        begun = time.monotonic()
        self._title(f"Start a small ProductDemo stack, {self.stack.told}, and fill it")
        services = self.stack.start()
        for name, fill in _each(services, "fill").items():
            fill()
            self.say(f"   {name:9} {KINDS[name]}")
        self._configure()
        before = self._look(services)

        self._title("Back it up")
        self._backupd("backup", STACK)
        instant = _next_second()
        self.say(f"   Now it is {format_instant(instant)}: the instant we shall come back to.")

        self._title("A day goes by: orders change, sessions end, documents are replaced, files renamed")
        for change in _each(services, "change").values():
            change()
        after = self._look(services)
        self._assert_changed(before, after)

        self._title("Back it up again: what did not change is not stored again")
        self._backupd("backup", STACK)
        self._backupd("list")

        self._title("Lose it: every server and all data are gone")
        self.stack.lose()

        self._title(f"Bring it back as it was at {format_instant(instant)}")
        self._backupd("restore", STACK, "--at", format_instant(instant), *self.stack.restore_to())

        self._title("Compare what is there now with what was there then")
        back = self._look(self.stack.restored())
        self._compare(before, back)
        self._sum_up(instant, before, time.monotonic() - begun)

    # --- steps ---------------------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self._step += 1
        self.say(f"\n{self._step}. {text}")

    def _configure(self) -> None:
        names = ", ".join(f'"{name}"' for name in KINDS)
        text = CONFIGURATION.format(sources=self.stack.sources(), stack=STACK, names=names)
        (self.folder / "backupd.toml").write_text(text)
        self.say("\n   backupd.toml protects it:\n")
        for line in text.splitlines():
            self.say(f"   | {line}")
        self._backupd("init", "--quiet")

    def _look(self, services: Services) -> dict[str, Picture]:
        pictures: dict[str, Picture] = {name: look() for name, look in _each(services, "look").items()}
        for name, picture in pictures.items():
            self.say(f"   {name:9} holds {picture.summary}")
        return pictures

    def _assert_changed(self, before: dict[str, Picture], after: dict[str, Picture]) -> None:
        for name, picture in before.items():
            changed = picture.differences(after[name])
            if not changed:
                raise BackupdError(f"the demo did not change {name}, and would prove nothing")
            self.say(f"   {name:9} differs in {len(changed):,} of {len(picture.things):,} things")

    def _compare(self, before: dict[str, Picture], back: dict[str, Picture]) -> None:
        wrong: list[str] = []
        for name, picture in before.items():
            differences = picture.differences(back[name])
            if differences:
                wrong.append(f"{name} ({', '.join(differences[:5])}{', ...' * (len(differences) > 5)})")
            verdict = (
                f"DIFFERS in {len(differences):,}" if differences else f"all {len(picture.things):,} equal"
            )
            self.say(f"   {name:9} {verdict}")
        if wrong:
            raise RestoreFailed(f"what came back is not what was there: {'; '.join(wrong)}")

    def _sum_up(self, instant: datetime, before: dict[str, Picture], took: float) -> None:
        points: list[dict[str, Any]] = json.loads(self._ask("list", "--json"))
        first = {p["source"]: p for p in reversed(points)}  # the list is by source and time
        second = {p["source"]: p for p in points}
        self.say(f"\nExactly as it was at {format_instant(instant)}:\n")
        self.say(f"   {'':9} {'what':44} {'size':>9} {'stored':>9} {'then new':>9} {'older by':>9}")
        for name, picture in before.items():
            point = first[name]
            age = (instant - datetime.fromisoformat(point["instant"])).total_seconds()
            sizes = [_size(n) for n in (point["size"], point["stored"], second[name]["stored"])]
            row = " ".join(f"{text:>9}" for text in (*sizes, f"{age:.1f} s"))
            self.say(f"   {name:9} {picture.summary:44} {row}")
        backup, restore = self._took["backup"], self._took["restore"]
        stored = sum(f.stat().st_size for f in (self.folder / "repository").rglob("*") if f.is_file())
        size = sum(p["size"] for p in points)
        self.say(
            f"\n   Two backups of {_size(size)} in a repository of {_size(stored)}; the last took "
            f"{backup:.1f} s, the restore {restore:.1f} s, the whole demo {took:.0f} s."
        )

    # --- the commands ----------------------------------------------------------------------------------

    def _backupd(self, *arguments: str) -> None:
        """Run a command as a user does, with its output where ours goes."""
        self.say(f"\n   $ backupd {' '.join(arguments)}")
        begun = time.monotonic()
        ended = subprocess.run(self._argv(arguments), cwd=self.folder, env=self._env(), check=False)
        self._took[arguments[0]] = time.monotonic() - begun
        if ended.returncode == Interrupted.exit_code:
            raise Interrupted("the demo was told to stop")
        if ended.returncode != 0:
            raise BackupdError(
                f"`backupd {arguments[0]}` ended with {ended.returncode}", hint="what it said is above"
            )

    def _ask(self, *arguments: str) -> str:
        return subprocess.run(
            self._argv(arguments),
            cwd=self.folder,
            env=self._env(),
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def _argv(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "backupd", *arguments]

    def _env(self) -> dict[str, str]:
        outside = {k: v for k, v in os.environ.items() if not k.startswith("BACKUPD_")}
        return {**outside, **self.stack.environment}


def _each(services: Services, verb: str) -> dict[str, Callable[[], Any]]:
    """`fill`, `change` or `look` for each service, to be called."""
    return {
        "orders": lambda: getattr(orders, verb)(services.orders),
        "sessions": lambda: getattr(sessions, verb)(services.sessions),
        "vectors": lambda: getattr(vectors, verb)(services.vectors),
        "uploads": lambda: getattr(uploads, verb)(services.uploads),
    }


def _next_second() -> datetime:
    """The next whole second, waited for: an instant between two states that can be written down exactly."""
    now = time.time()
    instant = int(now) + 1
    time.sleep(instant - now + 0.05)
    return datetime.fromtimestamp(instant, UTC)


def _size(count: float) -> str:
    """Bytes for people: `1.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


@contextlib.contextmanager
def _workplace() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="backupd-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(make_stack: Callable[[Path], Stack], say: Say) -> None:
    """Tell the story on a stack made in a folder of its own. Whatever happens, nothing of it is left.

    Raises RestoreFailed when what came back differs, BackupdError for all else that goes wrong.
    """
    with _workplace() as folder:
        stack = make_stack(folder)
        try:
            Demo(stack, say, folder).tell()
        finally:
            stack.close()
        say("   Its containers, volumes and files are removed.")
