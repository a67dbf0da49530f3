"""How a line is written: JSON, one object a line, or plain text on a terminal. No secret passes.

A value given to `hide` is replaced in messages, arguments, tracebacks and context, whoever logs it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from typing import ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

MASK = "***"

_SHORT = 4  # a shorter secret is masked as a whole word only: "a" anywhere would blot out every line
_context: ContextVar[dict[str, str]] = ContextVar("backupd_log_context", default={})  # noqa: B039 -- never changed
_secrets: set[str] = set()
_pattern: re.Pattern[str] | None = None
_secrets_lock = threading.Lock()


def hide(secret: str | None) -> None:
    """From now on, no line shows this value, nor its forms in a URL, a JSON text or a Python literal."""
    global _pattern  # noqa: PLW0603 -- one process, one set of secrets
    if not secret or not secret.strip():
        return
    forms = {
        secret,
        secret.strip(),  # read from a file with a line end
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote(secret),
        urllib.parse.quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    }
    with _secrets_lock:
        _secrets.update(forms)
        # longest first: a secret that begins with another must not leave its tail to be read
        words = (
            re.escape(s) if len(s) >= _SHORT else rf"(?<!\w){re.escape(s)}(?!\w)"
            for s in sorted(_secrets, key=len, reverse=True)
        )
        _pattern = re.compile("|".join(words))


def mask(text: str) -> str:
    """The text without any value given to `hide`."""
    return _pattern.sub(MASK, text) if _pattern is not None else text


@contextmanager
def run_context(**fields: str) -> Iterator[None]:
    """Lines logged inside carry these fields (`run`, `job`, `source`). Threads started inside do not, unless
    their function went through `carry`."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def carry(function: Callable[P, R]) -> Callable[P, R]:
    """The function, to be called in another thread, with the fields of the thread that called `carry`."""
    context = copy_context()

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return context.copy().run(
            function, *args, **kwargs
        )  # a copy: one context runs in one thread at a time

    return call


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "message", run, job, source, "exception"}`; time in UTC, milliseconds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record, "milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask(_message(record)),
            **{key: mask(value) for key, value in _context.get().items()},
        }
        trouble = _trouble(self, record)
        if trouble:
            line["exception"] = mask(trouble)
        return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


class PlainFormatter(logging.Formatter):
    """For people: time in UTC, level when it is not info, what, and which source."""

    def format(self, record: logging.LogRecord) -> str:
        context = _context.get()
        about = " ".join(context[key] for key in ("job", "source") if context.get(key))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{_time(record, 'seconds')} {f'[{about}] ' if about else ''}{level}{_message(record)}"
        trouble = _trouble(self, record)
        return mask(f"{text}\n{trouble}" if trouble else text)


def configure(style: str = "auto", *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every line to `stream` (standard error by default) and nowhere else. Call it once, at the start.

    `style` is `json`, `plain` or `auto`: plain on a terminal, JSON elsewhere. Libraries speak from WARNING on
    (from INFO at level DEBUG: what they say below holds headers and signatures).
    """
    stream = sys.stderr if stream is None else stream
    if style == "auto":
        style = "plain" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PlainFormatter() if style == "plain" else JsonFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(logging.INFO if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.getLogger("backupd").setLevel(number)
    logging.captureWarnings(True)


def _time(record: logging.LogRecord, precision: str) -> str:
    text = datetime.fromtimestamp(record.created, UTC).isoformat(timespec=precision)
    return text.replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # a wrong format string must not lose the line
        return f"{record.msg} {record.args!r}"


def _trouble(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    elif record.exc_text:
        parts.append(record.exc_text)
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)
