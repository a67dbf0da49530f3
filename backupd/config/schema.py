"""The JSON Schema of the file, for editors: made from the models, which say what is read."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from backupd.config.models import SOURCES, Config, Rate, Schedule, Source, Zone
from backupd.config.secret import Secret
from backupd.config.table import REQUIRED, Key, Table, keys_of
from backupd.config.values import NICKNAMES, format_duration
from backupd.retention import ALL, RULES, Policy

_TEXT = {"type": "string"}
_KINDS: Mapping[Any, dict[str, Any]] = {
    str: _TEXT,
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    Path: {**_TEXT, "format": "path"},
    Secret: {**_TEXT, "format": "password", "writeOnly": True},
    timedelta: {**_TEXT, "description": "A number with ms, s, m, h, d or w: 60s, 15m, 30d."},
    Schedule: {
        **_TEXT,
        "description": f"Five fields of cron with weekday names, one of {', '.join(NICKNAMES)}, or never.",
    },
    Rate: {**_TEXT, "description": "Bytes a second with kB, MB, GB, kiB, MiB or GiB: 100MB/s; or unlimited."},
    Zone: {**_TEXT, "description": "A time zone: UTC, Europe/Berlin."},
    Policy: {
        "type": "object",
        "description": "What prune keeps. Every rule adds; -1 is no limit; no rule removes nothing.",
        "properties": {
            **{rule: {"type": "integer", "minimum": ALL} for rule in RULES},
            "within": {**_TEXT, "description": "All this close to the newest point: 30d."},
            "pitr": {**_TEXT, "description": "Every instant this far back, where a log is recorded: 7d."},
            "timezone": {**_TEXT, "description": "Where a day begins; else the source's."},
        },
        "additionalProperties": False,
    },
}
_FILE = {"_file$": {**_TEXT, "description": "A file that holds the value, such as a secret."}}
"""Beside every text."""


def json_schema() -> dict[str, Any]:
    """Of the whole file."""
    tables: dict[str, dict[str, Any]] = {}
    whole = _table(Config, tables)
    return {"$defs": dict(sorted(tables.items())), **whole, "title": "backupd.toml"}


def _table(model: type[Any], tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A table; the tables below it are put into `tables` by name."""
    properties, required = {}, []
    for name, key in keys_of(model).items():
        properties[name] = {**_kind(key.kind, tables), **_limits(key)}
        about = [key.about, properties[name].get("description")]
        if any(about):
            properties[name]["description"] = " ".join(filter(None, about))
        # Which driver it is cannot be left out, though a model knows its own.
        if name == "driver" or key.default is REQUIRED:
            required.append(name)
    table: dict[str, Any] = {
        "type": "object",
        "title": model.__name__,
        "description": (model.__doc__ or "").split("\n\n", maxsplit=1)[0],
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        table["required"] = required
    if "'string'" in str(list(properties.values())):
        table["patternProperties"] = _FILE
    return table


def _kind(kind: Any, tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What may stand at a key."""
    if kind == Source:
        mapping = {driver: _kind(model, tables)["$ref"] for driver, model in SOURCES.items()}
        return {
            "oneOf": [{"$ref": place} for place in mapping.values()],
            "discriminator": {"propertyName": "driver", "mapping": mapping},
        }
    if kind in _KINDS:
        return dict(_KINDS[kind])
    if isinstance(kind, type) and issubclass(kind, Table):
        if kind.__name__ not in tables:
            tables[kind.__name__] = _table(kind, tables)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {**_TEXT, "const": parts[0]} if len(parts) == 1 else {**_TEXT, "enum": list(parts)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _kind(parts[1], tables)}
    return {"type": "array", "items": _TEXT}


def _limits(key: Key) -> dict[str, Any]:
    """What a key says besides its kind: its default and its limits."""
    about: dict[str, Any] = {}
    if isinstance(key.default, timedelta):
        about["default"] = format_duration(key.default)
    elif isinstance(key.default, str | int | float | tuple):
        about["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    least, most = ("minItems", "maxItems") if get_origin(key.kind) is tuple else ("minimum", "maximum")
    return about | {word: at for word, at in ((least, key.least), (most, key.most)) if at is not None}
