"""A table of the file as a class: each annotation is a key, and its type says what may stand there.

What dataclasses do, less what a configuration does not need: they write and compile each class's methods anew, which
for these nine took 6 ms of every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, NamedTuple, Self, Union, dataclass_transform, get_args, get_origin, get_type_hints

INNER = ("name", "origin")
"""Fields that are no keys: set by `load`."""
REQUIRED: Any = object()
"""The default of a key that must be given."""


class Key(NamedTuple):
    """What a table says of a key. `least` and `most` are the limits of a number, or of a list's length."""

    default: Any
    about: str = ""
    least: float | None = None
    most: float | None = None
    kind: Any = None
    """Its type, without None."""


def key(default: Any, about: str, *, least: float | None = None, most: float | None = None) -> Any:
    """A key with more to say than its default."""
    return Key(default, about, least, most)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Table:
    """Made from keywords; nothing changes afterwards."""

    def __init__(self, **values: Any) -> None:
        known = _fields_of(type(self))
        if unknown := values.keys() - known.keys():
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}")
        for name, field in known.items():
            vars(self)[name] = values.get(name, field.default)
            if vars(self)[name] is REQUIRED:
                raise TypeError(f"{type(self).__name__} needs {name}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def replace(self, **changes: Any) -> Self:
        """The same table but for these."""
        return type(self)(**{**vars(self), **changes})

    @classmethod
    def prepare(cls, table: dict[str, Any]) -> dict[str, Any]:
        """The table as it is to be read. Raises Mistaken."""
        return table

    def check(self) -> None:
        """What only the table as a whole tells. Raises Mistaken."""


def keys_of(model: type[Any]) -> dict[str, Key]:
    """The keys that may stand in a table."""
    return {name: field for name, field in _fields_of(model).items() if name not in INNER}


_known: dict[type[Any], Mapping[str, Key]] = {}


def _fields_of(model: type[Any]) -> Mapping[str, Key]:
    if model in _known:
        return _known[model]
    fields = {}
    for name, kind in get_type_hints(model, include_extras=True).items():
        default = getattr(model, name, REQUIRED)
        field = default if isinstance(default, Key) else Key(default)
        fields[name] = field._replace(kind=_present(kind))
    _known[model] = fields
    return fields


def _present(kind: Any) -> Any:
    """Without None: TOML has no word for it, the key is simply not there."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    return parts[0] if get_origin(kind) in (Union, UnionType) and len(parts) == 1 else kind
