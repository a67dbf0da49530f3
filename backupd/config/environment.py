"""A configuration without a file: two variables and what is mounted, as older backup containers had it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backupd.config.mistakes import ConfigInvalid, Mistake, check_names
from backupd.config.models import ENVIRONMENT, Config
from backupd.config.read import read
from backupd.config.values import Mistaken, check_schedule
from backupd.errors import UsageError


def from_environment(env: Mapping[str, str]) -> Config:
    """Two variables and a mount: every directory under `/backup` is a volume source, the repository is
    `/backups`, BACKUP_SCHEDULE is cron (weekday numbers too), RETENTION_DAYS what to keep.

    BACKUPD_BACKUP_ROOT and BACKUPD_REPOSITORY name other places. Raises ConfigInvalid, and UsageError where
    there is nothing to protect.
    """
    root = Path(env.get("BACKUPD_BACKUP_ROOT", "/backup"))
    mistakes: list[Mistake] = []
    tree: dict[str, Any] = {
        "repository": {"location": env.get("BACKUPD_REPOSITORY") or "/backups"},
        "defaults": {},
        "sources": {},
    }
    if zone := env.get("TZ", "").removeprefix(":"):
        tree["defaults"]["timezone"] = zone
    if text := env.get("BACKUP_SCHEDULE", "").strip().strip("\"'"):
        try:
            tree["defaults"]["schedule"] = check_schedule(text, weekday_numbers=True)
        except Mistaken as wrong:
            mistakes.append(Mistake("BACKUP_SCHEDULE", wrong.message, wrong.hint))
    if days := env.get("RETENTION_DAYS", "").strip():
        if days.isascii() and days.isdigit() and int(days) > 0:
            tree["defaults"]["retention"] = {"within": f"{days}d"}
        else:
            mistakes.append(
                Mistake("RETENTION_DAYS", f"{days!r} is not a number of days", 'for example "30"')
            )
    try:
        found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        found = []
        if not env.get("BACKUPD_REPOSITORY"):  # with it, enough to look into it and to restore
            raise UsageError(
                f"there is no configuration, and no {root} to read sources from",
                hint="`backupd init` writes a backupd.toml; or mount what to protect under /backup",
            ) from None
    else:
        if not found and not mistakes:
            raise UsageError(
                f"nothing is mounted under {root}", hint=f"mount each directory to protect as {root}/<name>"
            )
    for directory in found:
        tree["sources"][_slug(directory.name)] = {"driver": "volume", "path": str(directory)}
    mistakes += check_names(tree)
    in_tree: list[Mistake] = []
    config = read(tree, in_tree)
    names = {"defaults.timezone": "TZ", "repository": "BACKUPD_REPOSITORY"}
    mistakes += [Mistake(names.get(m.key, m.key), m.message, m.hint) for m in in_tree]
    if mistakes or config is None:
        raise ConfigInvalid(ENVIRONMENT, mistakes)
    return config.replace(origin=ENVIRONMENT)


def _slug(name: str) -> str:
    """A directory's name as a source name: characters that keys cannot carry become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64] or "data"
