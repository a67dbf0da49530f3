"""The peers: which there are, and how they come here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.pgdata import PgBackRest, programs
from benchmarks.tools import Backupd, Borg, Restic, TarZstd, Tool

_NO_SERVER = Path("/etc/postgresql-common/createcluster.d/backupd-benchmarks.conf")


def all_tools() -> list[Tool]:
    return [Backupd(), Restic(), Borg(), TarZstd(), PgBackRest()]


def install_peers() -> None:
    """From Debian, where they are not here and we may; what cannot be had is left out and said so."""
    packages = {"restic": "restic", "borg": "borgbackup", "zstd": "zstd", "pgbackrest": "pgbackrest"}
    missing = [package for program, package in packages.items() if not shutil.which(program)]
    if not programs():
        missing.append("postgresql")
    if not missing or os.geteuid() or not shutil.which("apt-get"):
        return
    if "postgresql" in missing:  # else its installation starts a server on the usual port
        _NO_SERVER.parent.mkdir(parents=True, exist_ok=True)
        _NO_SERVER.write_text("create_main_cluster = false\n")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=False, env=env)
    for package in missing:  # one by one: a release that lacks one has the others
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package],
            check=False, env=env, stdout=subprocess.DEVNULL,
        )  # fmt: skip
