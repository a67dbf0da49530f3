"""The tools compared: how each makes a repository, backs up, restores."""
# ruff: noqa: ARG002  not every tool needs all it is told

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from backupd.codec import DEFAULT_LEVEL
from benchmarks.corpus import tree_size


def backupd_argv() -> list[str]:
    """The command of the environment that runs the benchmark."""
    return [str(Path(sys.executable).with_name("backupd"))]


@dataclass(slots=True)
class Bench:
    """One tool's place for one round: its repository, its own cache, its restored tree."""

    base: Path
    tree: Path
    runs: int = 0

    @property
    def repository(self) -> Path:
        return self.base / "repository"

    @property
    def restored(self) -> Path:
        return self.base / "restored"

    def size(self) -> int:
        return tree_size(self.repository)


class Tool(Protocol):
    """A way to back up a tree. Commands are argv lists, each run as a process of its own."""

    name: str
    note: str

    def version(self) -> str:
        """What it is, or "" where it is not here."""

    def env(self, bench: Bench) -> dict[str, str]: ...
    def init(self, bench: Bench) -> list[str]: ...
    def backup(self, bench: Bench, number: int) -> list[str]: ...
    def restore(self, bench: Bench) -> list[str]: ...

    def found(self, bench: Bench) -> Path:
        """Where the tree is after `restore`."""


def first_line(argv: Sequence[str]) -> str:
    """What a program says of its version; "" where it is not here."""
    if not shutil.which(argv[0]):
        return ""
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    return said.splitlines()[0]


def clean_env(base: Path, **more: str) -> dict[str, str]:
    """Nothing of this machine's user: no configuration, no cache of an earlier run."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(base),
        "TMPDIR": str(base),
        "LC_ALL": "C.UTF-8",
        **{name: os.environ[name] for name in ("DOCKER_HOST",) if name in os.environ},
        **more,
    }


@dataclass(slots=True)
class Backupd:
    """The real command line, with a configuration file of one volume."""

    name: str = "backupd"
    note: str = f"zstd {DEFAULT_LEVEL}, no encryption; every blob named by BLAKE3 and compared on restore"
    argv: list[str] = field(default_factory=backupd_argv)

    def version(self) -> str:
        return first_line([*self.argv, "--version"])

    def env(self, bench: Bench) -> dict[str, str]:
        return clean_env(
            bench.base, BACKUPD_CONFIG=str(bench.base / "backupd.toml"), XDG_STATE_HOME=str(bench.base)
        )

    def init(self, bench: Bench) -> list[str]:
        (bench.base / "backupd.toml").write_text(
            f'[repository]\nlocation = "{bench.repository}"\n'
            f'[sources.tree]\ndriver = "volume"\npath = "{bench.tree}"\n'
        )
        return [*self.argv, "-q", "init"]

    def backup(self, bench: Bench, number: int) -> list[str]:
        return [*self.argv, "-q", "backup", "tree"]

    def restore(self, bench: Bench) -> list[str]:
        return [*self.argv, "-q", "restore", "--at", "latest", "--to", f"dir:{bench.restored}", "tree"]

    def found(self, bench: Bench) -> Path:
        inside = bench.restored / "tree"
        return inside if inside.is_dir() else bench.restored


@dataclass(slots=True)
class Restic:
    """Encryption cannot be switched off; compression as it comes (zstd, about level 1)."""

    name: str = "restic"
    note: str = "its defaults: always encrypted (AES-256-CTR + Poly1305), compression auto"

    def version(self) -> str:
        return first_line(["restic", "version"])

    def env(self, bench: Bench) -> dict[str, str]:
        return clean_env(
            bench.base,
            RESTIC_REPOSITORY=str(bench.repository),
            RESTIC_PASSWORD="benchmark",
            RESTIC_CACHE_DIR=str(bench.base / "cache"),
        )

    def init(self, bench: Bench) -> list[str]:
        return ["restic", "-q", "init"]

    def backup(self, bench: Bench, number: int) -> list[str]:
        return ["restic", "-q", "backup", "."]

    def restore(self, bench: Bench) -> list[str]:
        return ["restic", "-q", "restore", "latest", "--target", str(bench.restored)]

    def found(self, bench: Bench) -> Path:
        return bench.restored


@dataclass(slots=True)
class Borg:
    """Without encryption, compression as ours."""

    name: str = "borg"
    note: str = f"--encryption none, --compression zstd,{DEFAULT_LEVEL}"

    def version(self) -> str:
        return first_line(["borg", "--version"])

    def env(self, bench: Bench) -> dict[str, str]:
        return clean_env(
            bench.base,
            BORG_REPO=str(bench.repository),
            BORG_BASE_DIR=str(bench.base),
            BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes",
        )

    def init(self, bench: Bench) -> list[str]:
        return ["borg", "init", "--encryption", "none"]

    def backup(self, bench: Bench, number: int) -> list[str]:
        return ["borg", "create", "--compression", f"zstd,{DEFAULT_LEVEL}", f"::run{number}", "."]

    def restore(self, bench: Bench) -> list[str]:
        script = 'cd "$1" && borg extract "::$(borg list --short --last 1)"'
        bench.restored.mkdir()
        return ["sh", "-c", script, "restore", str(bench.restored)]

    def found(self, bench: Bench) -> Path:
        return bench.restored


@dataclass(slots=True)
class TarZstd:
    """GNU tar with its incremental snapshots, piped through zstd on all cores. No digests, no deduplication."""

    name: str = "tar|zstd"
    note: str = (
        f"tar --listed-incremental | zstd -{DEFAULT_LEVEL} -T0 > file; nothing is checked on the way back"
    )

    def version(self) -> str:
        tar, zstd = first_line(["tar", "--version"]), first_line(["zstd", "--version"])
        number = re.search(r"v[\d.]+", zstd)
        return f"{tar}, zstd {number[0] if number else ''}" if tar and zstd else ""

    def env(self, bench: Bench) -> dict[str, str]:
        return clean_env(bench.base)

    def init(self, bench: Bench) -> list[str]:
        return ["mkdir", str(bench.repository)]

    def backup(self, bench: Bench, number: int) -> list[str]:
        snapshot = bench.base / "snapshot"
        script = (
            'set -o pipefail; tar --create --file - --listed-incremental="$1" . | zstd -q "-$2" -T0 > "$3"'
        )
        out = bench.repository / f"{number:04d}.tar.zst"
        return ["bash", "-c", script, "backup", str(snapshot), str(DEFAULT_LEVEL), str(out)]

    def restore(self, bench: Bench) -> list[str]:
        script = (
            'set -o pipefail; for f in "$1"/*.tar.zst; do '
            'zstd -q -d -c "$f" | tar --extract --file - --listed-incremental=/dev/null --directory "$2" '
            "|| exit 1; done"
        )
        bench.restored.mkdir()
        return ["bash", "-c", script, "restore", str(bench.repository), str(bench.restored)]

    def found(self, bench: Bench) -> Path:
        return bench.restored
