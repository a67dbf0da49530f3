"""Drivers: how one kind of source is captured, restored and checked.

`DRIVERS` is the whole list of what backupd brings. Each module here that is named in it has a function
`from_config(source, engine)` which makes the driver from its configuration; it is imported only when a source
of its kind is used. Others add theirs by the entry point group `backupd.drivers`: the name is the kind, the
object a callable of the same two arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from backupd.errors import UsageError

if TYPE_CHECKING:
    from backupd.config.models import SourceConfig
    from backupd.model import Driver
    from backupd.sandbox.engine import Engine

Factory: TypeAlias = "Callable[[Any, Engine], Driver]"

DRIVERS: Mapping[str, str] = MappingProxyType(
    {
        "chroma": "backupd.drivers.chroma",
        "postgres": "backupd.drivers.postgres_logical",
        "redis": "backupd.drivers.redis",
        "volume": "backupd.drivers.volume",
    }
)
"""Kind -> module with a `from_config`."""

GROUP = "backupd.drivers"


def make_driver(config: SourceConfig, engine: Engine | None = None) -> Driver:
    """The driver for one source of the configuration. Nothing is connected to yet.

    Raises UsageError for a kind that nobody brings.
    """
    from backupd.sandbox.engine import Engine

    kind = str(getattr(config, "driver", ""))
    return _factory(kind)(config, engine if engine is not None else Engine())


def _factory(kind: str) -> Factory:
    if kind in DRIVERS:
        return cast("Factory", import_module(DRIVERS[kind]).from_config)
    from importlib.metadata import entry_points

    found = {point.name: point for point in entry_points(group=GROUP)}
    if kind in found:
        return cast("Factory", found[kind].load())
    raise UsageError(f"there is no driver {kind!r}", hint=f"one of {', '.join(sorted({*DRIVERS, *found}))}")
