"""A table of the file into its model. Every value is read by its kind; each mistake is noted, none is the last."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from backupd.config.mistakes import Mistake, dotted
from backupd.config.models import SOURCES, Config, Rate, Schedule, Source, SourceConfig, Zone
from backupd.config.secret import Secret
from backupd.config.table import REQUIRED, Key, Table, keys_of
from backupd.config.values import Mistaken, check_schedule, check_zone, closest, parse_duration, parse_rate
from backupd.retention import Policy

At = tuple[str, ...]
"""Where a value stands: the keys on the way to it."""


def read(tree: dict[str, Any], mistakes: list[Mistake]) -> Config | None:
    """The configuration in `tree`; None where there are mistakes, which are added to those known already."""
    config: Config | None = _Reader(mistakes).table(Config, tree, ())
    return config


class _Reader:
    """Of a key that is among `mistakes` already nothing more is said."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self._mistakes = mistakes
        self._known = {m.key for m in mistakes}
        self._wrong = 0

    def _note(self, at: At, message: str, hint: str = "") -> None:
        self._wrong += 1
        if dotted(at) not in self._known:
            self._mistakes.append(Mistake(dotted(at), message, hint))

    def table(self, model: type[Any], table: object, at: At) -> Any:
        """The model, or None where anything in the table is wrong."""
        if not isinstance(table, dict):
            self._note(at, "should be a table", f"write [{dotted(at)}], and its keys in the lines below")
            return None
        wrong_before, keys = self._wrong, keys_of(model)
        values: dict[str, Any] = {}
        try:
            if issubclass(model, Table):
                table = model.prepare(table)
        except Mistaken as wrong:
            self._note(at, wrong.message, wrong.hint)
        for name, value in table.items():
            if name in keys:
                values[name] = self._key(keys[name], value, (*at, name))
            else:
                self._note((*at, name), "unknown key", closest(name, keys) or f"there are {', '.join(keys)}")
        for name, key in keys.items():
            if name not in table and key.default is REQUIRED:
                self._note((*at, name), "is missing", "write it")
        return self._made(model, values, at) if self._wrong == wrong_before else None

    def _made(self, model: type[Any], values: dict[str, Any], at: At) -> Any:
        try:
            made = model(**values)
            if isinstance(made, Table):
                made.check()
        except Mistaken as wrong:
            self._note(at, wrong.message, wrong.hint)
        except ValueError as wrong:
            self._note(at, str(wrong))
        else:
            return made
        return None

    def _key(self, key: Key, value: object, at: At) -> Any:
        try:
            found = self._value(key.kind, value, at)
            _check_limits(found, key.least, key.most)
        except Mistaken as wrong:
            self._note(at, wrong.message, wrong.hint)
            return None
        return found

    def _value(self, kind: Any, value: object, at: At) -> Any:
        """By its kind: a table, named tables, a list of texts, a word of several, or what READERS can read."""
        if isinstance(kind, type) and issubclass(kind, Table | Policy):
            return self.table(kind, value, at)
        origin = get_origin(kind)
        if origin is Mapping:
            return self._named_tables(get_args(kind)[1], value, at)
        if origin is tuple:
            return self._texts(value, at)
        if origin is Literal:
            return _word(value, get_args(kind))
        return READERS[kind](value)

    def _named_tables(self, kind: Any, value: object, at: At) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise Mistaken("should be a table", f"write [{dotted(at)}.<name>] for each")
        one = self._source if kind == Source else lambda table, at: self.table(kind, table, at)
        return {name: one(table, (*at, name)) for name, table in value.items()}

    def _source(self, table: object, at: At) -> Any:
        """A source's driver says what else may stand in its table."""
        if not isinstance(table, dict):
            return self.table(SourceConfig, table, at)
        driver = table.get("driver")
        if isinstance(driver, str) and driver in SOURCES:
            return self.table(SOURCES[driver], table, at)
        message = "is missing" if driver is None else f'there is no driver "{driver}"'
        near = closest(driver, SOURCES) if isinstance(driver, str) else ""
        self._note((*at, "driver"), message, near or f"one of {', '.join(SOURCES)}")
        return None

    def _texts(self, value: object, at: At) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise Mistaken("should be a list", 'write ["one", "two"]')
        texts = []
        for number, item in enumerate(value):
            try:
                texts.append(_text(item))
            except Mistaken as wrong:
                self._note((*at, str(number)), wrong.message, wrong.hint)
                texts.append("")
        return tuple(texts)


# --- the kinds of values: each returns it or raises Mistaken, without showing it: it may be a secret ---

_TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Mistaken("should be a string", 'text stands in quotes: key = "value"')
    return value


def _boolean(value: object) -> bool:
    text = value.lower() if isinstance(value, str) else str(value) if isinstance(value, int) else ""
    if text.lower() not in _TRUTH:  # a text: it may come from the environment
        raise Mistaken("should be a boolean", "write true or false")
    return _TRUTH[text.lower()]


def _integer(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Mistaken("should be an integer", "write a whole number, without quotes")
    return value


def _number(value: object) -> float:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            value = None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise Mistaken("should be a number", "write it without quotes")
    return value


def _word(value: object, words: tuple[str, ...]) -> str:
    if value not in words:
        raise Mistaken("is none of those there are", f"one of {', '.join(map(repr, words))}")
    return str(value)


def _schedule(value: object) -> str:
    text = _text(value) or "never"
    return text if text == "never" else check_schedule(text)


def _duration(value: object) -> timedelta:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise Mistaken(f"{value!r} has no unit", f'write for example "{value}s" or "{value}d"')
    if not isinstance(value, str):
        raise Mistaken("is not a duration", 'write for example "60s", "15m", "12h" or "30d"')
    return parse_duration(value)


def _rate(value: object) -> int:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise Mistaken(f"{value!r} has no unit", f'write for example "{value}MB/s"')
    return parse_rate(_text(value))


def _check_limits(value: Any, least: float | None, most: float | None) -> None:
    size, of = (len(value), " item") if isinstance(value, tuple) else (value, "")
    if least is not None and not size >= least:
        more = f"have at least {least}{of}" if of else f"be greater than or equal to {least}"
        raise Mistaken(f"should {more}", "name one" if of else "")
    if most is not None and not size <= most:
        raise Mistaken(f"should be less than or equal to {most}")


READERS: Mapping[Any, Callable[[object], Any]] = {
    str: _text,
    bool: _boolean,
    int: _integer,
    float: _number,
    Path: lambda value: Path(_text(value)),
    Secret: lambda value: Secret(_text(value)),
    timedelta: _duration,
    Schedule: _schedule,
    Rate: _rate,
    Zone: lambda value: check_zone(_text(value)),
}
"""Kind -> what reads it."""
