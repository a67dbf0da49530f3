"""A file, or the environment, into a Config; every mistake at once, each with its key and its fix."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from backupd.config.environment import from_environment
from backupd.config.mistakes import ConfigInvalid, Mistake, check_names, cross_check, dotted
from backupd.config.models import Config, DefaultsConfig, Source
from backupd.config.read import read
from backupd.config.values import closest
from backupd.errors import UsageError

NAMES = ("backupd.toml", "/etc/backupd/backupd.toml")
"""Where a configuration is looked for when none is named."""

_REFERENCE = re.compile(r"\$(\$|\{([^}]*)\})")
_NEVER = "never"
_LOG_LOCAL, _LOG_S3 = timedelta(seconds=1), timedelta(seconds=10)  # each put costs there


def load(path: Path | None, env: Mapping[str, str], *, location: str = "") -> Config:
    """The configuration in `path`; without one, the first of NAMES there is, and else what `env` says.
    `location` names another repository than it does, with the same options.

    Raises ConfigInvalid with every mistake, UsageError where the file cannot be read.
    """
    if path is None:
        path = find(env)
    if location and "://" not in location:
        location = str(Path(location).absolute())
    if path is None:
        env = {**env, "BACKUPD_REPOSITORY": location} if location else env
        return _settle(from_environment(env), Path.cwd(), env)
    return parse(_read(path), origin=str(path), base=path.absolute().parent, env=env, location=location)


def find(env: Mapping[str, str]) -> Path | None:
    """The file `$BACKUPD_CONFIG` names, else the first of NAMES that exists."""
    if named := env.get("BACKUPD_CONFIG"):
        return Path(named)
    return next((Path(name) for name in NAMES if Path(name).is_file()), None)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise UsageError(
            f"there is no configuration {path}", hint="`backupd init` writes one; --config names another"
        ) from None
    except UnicodeDecodeError as wrong:
        raise UsageError(f"{path} is not UTF-8 text: {wrong.reason}", hint="save it as UTF-8") from None
    except OSError as wrong:
        raise UsageError(
            f"{path} cannot be read: {wrong.strerror}", hint="name a file that this user may read"
        ) from None


def parse(text: str, *, origin: str, base: Path, env: Mapping[str, str], location: str = "") -> Config:
    """A configuration from its text; relative paths count from `base`. Raises ConfigInvalid."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as wrong:
        message = str(wrong)
        found = Mistake("", message[0].lower() + message[1:], _toml_hint(message))
        raise ConfigInvalid(origin, [found]) from None
    mistakes: list[Mistake] = []
    if location and isinstance(tree.setdefault("repository", {}), dict):
        tree["repository"]["location"] = location
    _substitute(tree, (), env, base, mistakes)
    mistakes += check_names(tree)
    config = read(tree, mistakes)
    mistakes += cross_check(tree)
    if mistakes or config is None:
        raise ConfigInvalid(origin, mistakes)
    return _settle(config.replace(origin=origin), base, env)


def _toml_hint(message: str) -> str:
    if "twice" in message or "overwrite" in message:
        return "each source and each key is written once; give the second one another name"
    if "Invalid value" in message:
        return 'text stands in quotes: key = "value"'
    return "see https://toml.io for how the file is written"


# --- ${NAME} and *_file ---------------------------------------------------------------------------


def _substitute(
    tree: MutableMapping[str, Any],
    at: tuple[str, ...],
    env: Mapping[str, str],
    base: Path,
    mistakes: list[Mistake],
) -> None:
    for key, value in list(tree.items()):
        where = (*at, key)
        tree[key] = _replace(value, where, env, base, mistakes)
        if key.endswith("_file") and isinstance(tree[key], str):
            _take_file(tree, where, base, mistakes)


def _replace(
    value: Any, at: tuple[str, ...], env: Mapping[str, str], base: Path, mistakes: list[Mistake]
) -> Any:
    if isinstance(value, dict):
        _substitute(value, at, env, base, mistakes)
    elif isinstance(value, list):
        return [_replace(v, (*at, str(n)), env, base, mistakes) for n, v in enumerate(value)]
    elif isinstance(value, str):

        def fill(match: re.Match[str]) -> str:
            if match[1] == "$":
                return "$"
            if match[2] not in env:
                mistakes.append(
                    Mistake(
                        dotted(at),
                        f"${{{match[2]}}} is not set",
                        closest(match[2], env) or f"set {match[2]}, or write $$ for a dollar sign",
                    )
                )
                return match[0]
            return env[match[2]]

        return _REFERENCE.sub(fill, value)
    return value


def _take_file(
    tree: MutableMapping[str, Any], at: tuple[str, ...], base: Path, mistakes: list[Mistake]
) -> None:
    """`password_file = "/run/secrets/x"` is `password` with the file's content, trimmed."""
    key = at[-1].removesuffix("_file")
    path = base / tree.pop(at[-1])
    if key in tree:
        mistakes.append(Mistake(dotted(at), f"{key} and {at[-1]} are both given", "keep one of them"))
        return
    try:
        tree[key] = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        mistakes.append(Mistake(dotted(at), f"{path} is not text", "name a file that holds the value"))
    except OSError as wrong:
        hint = "does the secret exist, and may this user read it?"
        mistakes.append(Mistake(dotted(at), f"{path} cannot be read: {wrong.strerror}", hint))
    else:
        if not tree[key]:
            mistakes.append(Mistake(dotted(at), f"{path} is empty", "write the value into it"))
            return
        return
    tree[key] = "?"  # so that the absent value is not reported as well


# --- defaults and paths ---------------------------------------------------------------------------


def _settle(config: Config, base: Path, env: Mapping[str, str]) -> Config:
    """Defaults filled in, paths absolute, `never` as None."""
    repository = config.repository
    location = repository.location.removeprefix("file://")
    if not repository.is_s3:
        location = str(base / _home(location))
    serve = config.serve
    state = config.state or (Path(env["BACKUPD_STATE"]) if env.get("BACKUPD_STATE") else None)
    return config.replace(
        repository=repository.replace(location=location, ca_bundle=_absolute(repository.ca_bundle, base)),
        sources={
            name: _settle_source(name, s, config.defaults, base, _LOG_S3 if repository.is_s3 else _LOG_LOCAL)
            for name, s in config.sources.items()
        },
        serve=serve.replace(
            prune_schedule=_unless_never(serve.prune_schedule),
            verify_schedule=_unless_never(serve.verify_schedule),
        ),
        state=_absolute(state, base),
    )


def _settle_source(
    name: str, source: Source, defaults: DefaultsConfig, base: Path, log_interval: timedelta
) -> Source:
    zone = source.timezone or defaults.timezone
    policy = source.retention if source.retention is not None else defaults.retention
    if not policy.timezone:
        policy = replace(policy, timezone=zone)
    settled: dict[str, Any] = {
        k: _absolute(getattr(source, k), base) for k in ("path", "staging") if hasattr(source, k)
    }
    if source.recorded_every is not None:
        settled["log_interval"] = getattr(source, "log_interval", None) or log_interval
    return source.replace(
        name=name,
        schedule=_unless_never(source.schedule or defaults.schedule),
        timezone=zone,
        retention=policy,
        **settled,
    )


def _absolute(path: Path | None, base: Path) -> Path | None:
    return None if path is None else base / _home(str(path))


def _home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  Path's own raises where there is no such user


def _unless_never(schedule: str | None) -> str | None:
    return None if schedule == _NEVER else schedule
