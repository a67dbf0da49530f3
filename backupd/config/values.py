"""The small languages inside a configuration: durations, schedules, names. Pure; each raises ValueError."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta

WEEKDAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * SUN",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("weekday", 0, 7, WEEKDAYS),
)
_UNITS = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_SIZES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Mistaken(ValueError):
    """A value that cannot be, and what to write instead."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def parse_duration(text: str) -> timedelta:
    """`90s`, `15m`, `1d12h`: milliseconds, seconds, minutes, hours, days, weeks. Raises Mistaken."""
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhdw])", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise Mistaken(f"{text!r} is not a duration", 'write for example "60s", "15m", "12h" or "30d"')
    try:
        return sum((float(number) * _UNITS[unit] for number, unit in parts), timedelta())
    except OverflowError:
        raise Mistaken(f"{text!r} is longer than can be counted", 'write for example "30d"') from None


def format_duration(span: timedelta) -> str:
    """The two largest units: `1d 4h`, `3m 20s`, `2.5s`, `850ms`."""
    seconds = span.total_seconds()
    sign, left = ("-" if seconds < 0 else ""), abs(seconds)
    if left < 1:
        return f"{sign}{left * 1000:.0f}ms" if left else "0s"
    if left < 9.95 and left % 1:
        return f"{sign}{left:.1f}s"
    whole, words = round(left), []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if whole >= size:
            words.append(f"{whole // size}{unit}")
            whole %= size
    return sign + " ".join(words[:2])


def parse_rate(text: str) -> int:
    """`256MB/s`, `64MiB`, `1.5GB/s`: bytes a second; `unlimited` is 0. Raises Mistaken."""
    compact = text.replace(" ", "").lower()
    if compact == "unlimited":
        return 0
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([kmg]i?b)(?:/s)?", compact)
    if not found or not float(found[1]):
        raise Mistaken(f"{text!r} is not a rate", 'write for example "100MB/s", or "unlimited"')
    return round(float(found[1]) * _SIZES[found[2]])


def check_name(name: str) -> str:
    """A source or stack name as it may stand in object keys and host names. Raises Mistaken."""
    if not _NAME.fullmatch(name):
        raise Mistaken(
            f"{name!r} cannot be a name",
            "up to 64 letters, digits, dots, dashes and underscores, a letter or a digit first",
        )
    return name


def closest(word: str, words: Iterable[str]) -> str:
    """`did you mean "x"?` or nothing."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f'did you mean "{found[0]}"?' if found else ""


def check_zone(name: str) -> str:
    """The name of a time zone. Raises Mistaken."""
    if name == "UTC":
        return name
    from zoneinfo import ZoneInfo, available_timezones

    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        hint = closest(name, available_timezones()) or 'write for example "UTC" or "Europe/Berlin"'
        raise Mistaken(f"{name!r} is not a time zone", hint) from None
    return name


def check_schedule(text: str, *, weekday_numbers: bool = False) -> str:
    """A five-field cron expression, or `@daily` and the like, as one the scheduler takes. Raises Mistaken.

    Weekdays are names: 1 is Monday to cron and Tuesday to some schedulers, and a backup on the wrong day
    shows only when it is missed. `weekday_numbers` takes numbers (0 and 7 are Sunday) and writes names.
    """
    expression = NICKNAMES.get(text.strip().lower(), text).upper().split()
    if len(expression) != len(_FIELDS):
        raise Mistaken(
            f"{text!r} has {len(expression)} fields; a schedule has five",
            'minute, hour, day of month, month, weekday: "0 2 * * *" is 02:00 every day',
        )
    for value, (field, low, high, names) in zip(expression, _FIELDS, strict=True):
        for term in value.split(","):
            _check_term(term, field, low, high, names)
    named = _name_weekdays(expression[4])
    if named != expression[4] and not weekday_numbers:
        fixed = " ".join([*expression[:4], named])
        raise Mistaken(f"{text!r} numbers its weekday", f'write the name: "{fixed}"')
    if _never(expression):
        raise Mistaken(f"{text!r} is a day that no month has", 'for the last day of a month write "L"')
    return " ".join([*expression[:4], named])


def _check_term(term: str, field: str, low: int, high: int, names: tuple[str, ...]) -> None:
    span, slash, step = term.partition("/")
    if slash and not (step.isascii() and step.isdigit() and int(step) > 0):
        raise Mistaken(f"{field} {term!r}: after / comes a number above 0", 'for example "*/15"')
    if span == "*" or (field == "day of month" and span in {"L", "LW"} and not slash):
        return
    if field == "weekday" and not slash:
        if re.fullmatch(r"[0-7]L", span):
            return
        span, sharp, nth = span.partition("#")
        if sharp and nth not in {"1", "2", "3", "4", "5"}:
            raise Mistaken(f"{field} {term!r}: after # comes 1 to 5", '"MON#1" is the first Monday')
    first, dash, last = span.partition("-")
    ends = [_number(v, field, low, high, names) for v in ((first, last) if dash else (first,))]
    if ends[-1] < ends[0]:
        raise Mistaken(f"{field} {term!r} runs backwards", f'write two: "{first}-{high},{low}-{last}"')


def _number(text: str, field: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text in names:
        return names.index(text) + (1 if names is MONTHS else 0)
    if text.isascii() and text.isdigit() and low <= int(text) <= high:
        return int(text)
    known = f"{names[0]} to {names[-1]}" if names else f"{low} to {high}"
    raise Mistaken(f"{field} {text!r} is not one", f"{field} goes from {known}")


def _name_weekdays(field: str) -> str:
    def name(match: re.Match[str]) -> str:
        return WEEKDAYS[int(match[0]) % 7]

    terms: list[str] = []
    for term in field.split(","):
        span, slash, step = term.partition("/")
        # What reaches 7 ends on the Sunday after Saturday; names only run forward, so its days are spelt out.
        if re.fullmatch(r"(?:[0-7]-)?7", span):
            days = range(int(span[0]), 8, int(step or 1))
            terms += dict.fromkeys(WEEKDAYS[d % 7] for d in days)
        elif span.endswith("L"):
            terms.append(term)
        else:
            head, sharp, nth = span.partition("#")
            terms.append(re.sub(r"\d", name, head) + sharp + nth + slash + step)
    return ",".join(terms)


def _never(fields: list[str]) -> bool:
    days, months, weekdays = fields[2:]
    if not (days.startswith("*") or weekdays.startswith("*")):
        return False  # as in cron, day of month or weekday is then enough
    first = min(
        0 if d[0] == "L" else 1 if d[0] == "*" else int(re.split("[-/]", d)[0]) for d in days.split(",")
    )
    longest = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    return all(first > longest[m - 1] for term in months.split(",") for m in _months(term))


def _months(term: str) -> range:
    span, slash, step = term.partition("/")
    if span == "*":
        return range(1, 13, int(step or 1))
    ends = [_number(v, "month", 1, 12, MONTHS) for v in span.split("-")]
    return range(ends[0], (12 if slash and len(ends) == 1 else ends[-1]) + 1, int(step or 1))
