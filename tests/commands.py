"""Runs the command line as a user does: `Home` in a process of its own, `InsideHome` in this one, which saves
the start-up and is otherwise the same to its user."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True, slots=True)
class Ended:
    """What a user sees of a command that ended."""

    code: int
    out: str
    err: str
    raw: bytes = field(repr=False, default=b"")

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """What follows the last `backupd: `, without its hint."""
        lines = [line for line in self.err.splitlines() if line.startswith("backupd: ")]
        return lines[-1].removeprefix("backupd: ") if lines else ""

    @property
    def hint(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("hint: ")]
        return lines[-1].removeprefix("hint: ") if lines else ""


@dataclass(frozen=True, slots=True)
class Home:
    """A directory to work in, with a history of its own and a clean environment."""

    path: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def configure(self, text: str) -> None:
        (self.path / "backupd.toml").write_text(text)

    def environment(self) -> dict[str, str]:
        kept = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH", "LANG")
        return {
            **{key: os.environ[key] for key in kept if key in os.environ},
            "BACKUPD_STATE": str(self.path / "state"),
            "BACKUPD_BACKUP_ROOT": str(self.path / "nothing-mounted"),
            **self.env,
        }

    def run(self, *argv: str, before: Sequence[str] = (), timeout: float = 120) -> Ended:
        """Run `backupd ARGV`; `before` is put in front of the program, as `nice` is."""
        ended = subprocess.run(
            [*before, sys.executable, "-m", "backupd", *argv],
            cwd=self.path, env=self.environment(), capture_output=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        out, err = (text.decode(errors="surrogateescape") for text in (ended.stdout, ended.stderr))
        assert "Traceback" not in err, err
        return Ended(ended.returncode, out, err, ended.stdout)

    def ok(self, *argv: str) -> Ended:
        """Run it; it must end with 0."""
        ended = self.run(*argv)
        assert ended.code == 0, f"backupd {' '.join(argv)}: {ended.code}\n{ended.out}{ended.err}"
        return ended

    def refused(self, *argv: str, code: int, before: Sequence[str] = ()) -> Ended:
        """Run it; it must end with this code, one line that says what happened, and a hint."""
        ended = self.run(*argv, before=before)
        said = f"backupd {' '.join(argv)}: {ended.code}\n{ended.out}{ended.err}"
        assert ended.code == code, said
        assert ended.message, said
        assert ended.hint, said
        return ended


class InsideHome(Home):
    """As `Home`, without a process for each command."""

    def run(self, *argv: str, before: Sequence[str] = (), timeout: float = 120) -> Ended:
        if before:
            return Home.run(self, *argv, before=before, timeout=timeout)
        from backupd.cli import run

        raw, raw_err = io.BytesIO(), io.BytesIO()
        out = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
        err = io.TextIOWrapper(raw_err, encoding="utf-8", write_through=True)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with (
                mock.patch.dict(os.environ, self.environment(), clear=True),
                mock.patch.multiple("backupd.log", _secrets=set(), _pattern=None),  # of other tests
                contextlib.chdir(self.path),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                code = run(list(argv))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        text = raw.getvalue().decode(errors="surrogateescape")
        return Ended(code, text, raw_err.getvalue().decode(errors="surrogateescape"), raw.getvalue())


def recording_config(source: str, driver: str, url: str) -> str:
    """Of an agent that records one server; the port that it listens at is still to be filled in, as `{free}`."""
    return f"""
[repository]
location = "repo"
[sources.{source}]
driver = "{driver}"
url = "{url}"
mode = "pitr"
schedule = "0 2 * * *"
log_interval = "300ms"
[serve]
listen = "127.0.0.1:{{free}}"
prune_schedule = "never"
verify_schedule = "never"
"""
