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

IMAGES = (
    (re.compile(r"(^|[/-])(postgres|postgresql|postgis|pgvector|timescaledb)([-_:@]|$)"), "postgres"),
    (re.compile(r"(^|/)(redis|valkey|redis-stack-server|redis-stack)([-_:@]|$)"), "redis"),
    (re.compile(r"(^|/)chroma(db)?([:@]|$)"), "chroma"),
)
"""Image names, without the registry's own host, that tell which driver."""

_OURS = ("backupd.sandbox", "backupd.helper")
_ANONYMOUS = re.compile(r"[0-9a-f]{64}")
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
    # a registry's host may hold any of the names: only what follows it counts
    host, slash, rest = container.image.partition("/")
    image = rest if slash and ("." in host or ":" in host or host == "localhost") else container.image
    return next((driver for pattern, driver in IMAGES if pattern.search(image)), None)


def _is_wanted(c: ContainerInfo) -> bool:
    if c.labels.get("backupd.enable", "true").lower() in {"false", "0", "no"}:
        return False
    if any(label in c.labels for label in _OURS) or re.search(r"(^|/)backupd([:@]|$)", c.image):
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
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:64]


def _unique(found: Sequence[Found]) -> list[Found]:
    taken: set[str] = set()
    named = []
    for f in found:
        name, number = f.name or f.driver, 2
        while name.lower() in taken:
            name, number = f"{f.name}-{number}", number + 1
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
        lines = [f"[sources.{_key(f.name)}]        # {f.why}", f"driver = {_toml(f.driver)}"]
        lines += [f"{key} = {_toml(value)}" for key, value in f.settings.items()]
        if f.driver == "redis":
            lines.append('# password_file = "/run/secrets/redis_password"')
        parts.append("\n" + "\n".join(lines) + "\n")
    for stack, members in _stacks(found).items():
        parts.append(f"\n[stacks.{_key(stack)}]\nsources = {_toml(members)}\n")
    return "".join(parts)


def _stacks(found: Sequence[Found]) -> dict[str, list[str]]:
    stacks: dict[str, list[str]] = {}
    for f in found:
        if f.stack:
            stacks.setdefault(f.stack, []).append(f.name)
    names = {f.name.lower() for f in found}
    return {s if s.lower() not in names else f"{s}-stack": m for s, m in stacks.items() if len(m) > 1}


def _toml(value: object) -> str:
    """A string or a list of them: JSON's escapes are TOML's too; `$` is doubled, it begins a reference."""
    return json.dumps(value).replace("$", "$$")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
