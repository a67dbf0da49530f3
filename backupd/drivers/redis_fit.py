"""Whether a server can take what a recovery point of Redis holds: known before anything is changed. Pure.

A server that meets in a dump what it does not know ends itself, and one that is a replica then has thrown away what it
held. So it is asked first: for its version, and for the modules that keep types of their own (JSON, graphs, filters).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from backupd.drivers.rdb import RdbSummary
from backupd.drivers.redis_expiry import version
from backupd.model import Json

_NAME = re.compile(r"^module:name=([^,\r\n]+)", re.MULTILINE)
_PROVIDERS: dict[str, frozenset[str]] = {
    "ReJSON-RL": frozenset({"ReJSON", "json"}),
    "MBbloom--": frozenset({"bf"}),
    "MBbloomCF": frozenset({"bf"}),
    "CMSk-TYPE": frozenset({"bf"}),
    "TopK-TYPE": frozenset({"bf"}),
    "TDIS-TYPE": frozenset({"bf"}),
    "TSDB-TYPE": frozenset({"timeseries"}),
    "graphdata": frozenset({"graph"}),
    "vectorset": frozenset({"vectorset"}),
}
"""Types of values, and the modules of which any one brings it. A server tells the names of its modules, and not which
types they have: for a type that is not here all modules of the source are wanted."""


def modules(info: str) -> list[str]:
    """Their names, by INFO modules."""
    return sorted(set(_NAME.findall(info)))


def format_of(summary: RdbSummary) -> dict[str, Json]:
    """What a recovery point says of its dump, so that it is known who can read it."""
    types: list[Json] = [*sorted(summary.modules)]
    return {"rdb_version": summary.version, **({"module_types": types} if types else {})}


def unreadable(about: Mapping[str, str], point: Mapping[str, Json]) -> str:
    """Why a server cannot read a dump, by the versions; empty where nothing is known against it.

    A server reads what is older than itself. Redis and Valkey went apart with the formats 12 and 80.
    """
    valkey = "valkey_version" in about
    own = about.get("valkey_version") or about.get("redis_version", "")
    was, theirs = str(point.get("version") or ""), point.get("server") == "valkey"
    number = point.get("rdb_version")
    format_ = number if isinstance(number, int) else 0
    foreign = 12 <= format_ < 80 if valkey else format_ >= 80
    if foreign or (valkey == theirs and version(was) > version(own)):
        maker, reader = "Valkey" if theirs else "Redis", "Valkey" if valkey else "Redis"
        return f"a dump of {maker} {was} cannot be read by {reader} {own}"
    return ""


def without_modules(loaded: Collection[str], point: Mapping[str, Json]) -> str:
    """Why a server cannot read the values that modules put into a dump; empty where it can."""
    types, source = _names(point.get("module_types")), _names(point.get("modules"))
    lacking: set[str] = set()
    for kind in types:
        wanted = _PROVIDERS.get(kind)
        if wanted is None:
            lacking |= set(source) - set(loaded)
        elif not wanted & set(loaded):
            lacking |= wanted & set(source) or {min(wanted)}
    if not lacking:
        return ""
    return f"the dump holds values of modules ({', '.join(types)}) and the server lacks {', '.join(sorted(lacking))}"


def _names(value: Json) -> list[str]:
    return [str(one) for one in value] if isinstance(value, Iterable) and not isinstance(value, str) else []
