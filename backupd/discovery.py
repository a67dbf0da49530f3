"""What runs here -> what to protect. Pure: containers as the engine describes them in, suggestions out.

The image's name suggests the driver; labels decide where they are given:
`backupd.enable=false` leaves a container out, `backupd.driver`, `backupd.name`, `backupd.schedule` say the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backupd.sandbox.engine import ContainerInfo

IMAGES = {
    "postgres": "postgres", "postgresql": "postgres", "postgresql-repmgr": "postgres", "postgis": "postgres",
    "pgvector": "postgres", "timescaledb": "postgres", "timescaledb-ha": "postgres",
    "redis": "redis", "redis-stack": "redis", "redis-stack-server": "redis", "valkey": "redis",
    "chroma": "chroma", "chromadb": "chroma",
}  # fmt: skip
"""The last part of an image's name -> its driver. Whole names: `postgres-exporter` is no server."""

_OURS = ("backupd.sandbox", "backupd.helper")
_ANONYMOUS = re.compile(r"[0-9a-f]{64}")
_LONGEST = 56  # of the 64 that a name may have; the rest tells doubles apart
_COMPOSE = "com.docker.compose."


@dataclass(frozen=True, slots=True)
class Found:
    """A source that could be protected."""

    name: str
    driver: str
    settings: Mapping[str, object] = field(default_factory=dict)
    """Keys of its table besides `driver`."""
    why: str = ""
    stack: str = ""
    """The compose project or Swarm stack it belongs to."""


def discover(containers: Iterable[ContainerInfo]) -> list[Found]:
    """Sources among running containers: databases by container, other named volumes once each."""
    seen = sorted((c for c in containers if _is_wanted(c)), key=lambda c: c.name)
    found: list[Found] = []
    covered: set[str] = set()
    for c in seen:
        driver = driver_of(c)
        if driver is not None and driver != "volume":
            covered |= {m.name for m in c.mounts}
            found.append(Found(_name_of(c), driver, _settings(c, driver), f"{c.image}", _stack_of(c)))
    for c in seen:
        for m in c.mounts:
            if (
                m.kind == "volume"
                and m.writable
                and m.name not in covered
                and not _ANONYMOUS.fullmatch(m.name)
            ):
                covered.add(m.name)
                why = f"mounted at {m.destination} in {c.name}"
                found.append(Found(_slug(m.name), "volume", {"volume": m.name}, why, _stack_of(c)))
    return _unique(found)


def driver_of(container: ContainerInfo) -> str | None:
    """The driver that its label names, else the one its image suggests."""
    if named := container.labels.get("backupd.driver"):
        return named
    return IMAGES.get(_base(container.image))


def _base(image: str) -> str:
    """`ghcr.io:443/x/postgres:16@sha256:...` is `postgres`."""
    return image.rpartition("/")[2].partition("@")[0].partition(":")[0]


def _is_wanted(c: ContainerInfo) -> bool:
    if c.labels.get("backupd.enable", "true").lower() in {"false", "0", "no"}:
        return False
    if any(label in c.labels for label in _OURS) or _base(c.image) == "backupd":
        return False
    return c.status == "running"


def _settings(c: ContainerInfo, driver: str) -> dict[str, object]:
    settings: dict[str, object] = {"container": c.name}
    if driver == "postgres" and c.env.get("POSTGRES_USER", "postgres") != "postgres":
        settings["user"] = c.env["POSTGRES_USER"]
    if "backupd.schedule" in c.labels:
        settings["schedule"] = c.labels["backupd.schedule"]
    return settings


def _name_of(c: ContainerInfo) -> str:
    return _slug(c.labels.get("backupd.name") or c.labels.get(f"{_COMPOSE}service") or c.name)


def _stack_of(c: ContainerInfo) -> str:
    return _slug(c.labels.get(f"{_COMPOSE}project") or c.labels.get("com.docker.stack.namespace") or "")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")


def _unique(found: Sequence[Found]) -> list[Found]:
    taken: set[str] = set()
    named = []
    for f in found:
        base = (f.name or f.driver)[:_LONGEST]
        name, number = base, 2
        while name.lower() in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name.lower())
        named.append(Found(name, f.driver, f.settings, f.why, f.stack))
    return named


# --- a starter file ----------------------------------------------------------------------------------

_HEAD = """\
# What backupd protects. `backupd check` tells whether all of it can be reached.
# Any value may come from the environment as "${NAME}", or from a file: password_file = "/run/secrets/x".

[repository]
location = %s        # a directory, or "s3://bucket/prefix"

[defaults]
schedule = "0 2 * * *"        # minute hour day month weekday; weekdays by name
timezone = "UTC"
retention = { last = 3, daily = 7, weekly = 4, monthly = 12 }
"""

_NOTHING = """
# Nothing was found that runs here. For example:
# [sources.orders]
# driver = "postgres"
# url = "postgresql://backup@postgres/orders"
# password_file = "/run/secrets/pg_password"
#
# [sources.uploads]
# driver = "volume"
# path = "/srv/uploads"
"""


def starter(found: Sequence[Found], location: str) -> str:
    """A backupd.toml that protects what was found. It holds no secret."""
    parts = [_HEAD % _toml(location)]
    if not found:
        parts.append(_NOTHING)
    for f in found:
        why = "".join(c if c.isprintable() else "?" for c in f.why)
        lines = [f"[sources.{_key(f.name)}]        # {why}", f"driver = {_toml(f.driver)}"]
        lines += [f"{key} = {_toml(value)}" for key, value in f.settings.items()]
        if f.driver == "redis":
            lines.append('# password_file = "/run/secrets/redis_password"')
        parts.append("\n" + "\n".join(lines) + "\n")
    for stack, members in _stacks(found).items():
        parts.append(f"\n[stacks.{_key(stack)}]\nsources = {_toml(members)}\n")
    return "".join(parts)


def _stacks(found: Sequence[Found]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for f in found:
        if f.stack:
            members.setdefault(f.stack[:_LONGEST], []).append(f.name)
    taken = {f.name.lower() for f in found}
    stacks = {}
    for stack, names in members.items():
        if len(names) > 1:
            name, number = stack, 1
            while name.lower() in taken:
                name, number = f"{stack}-stack{number if number > 1 else ''}", number + 1
            taken.add(name.lower())
            stacks[name] = names
    return stacks


def _toml(value: object) -> str:
    """A string or a list of them: JSON's escapes are TOML's too, save that it has none for DEL and pairs for
    what lies beyond 16 bits. `$` is doubled: it begins a reference."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F").replace("$", "$$")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
