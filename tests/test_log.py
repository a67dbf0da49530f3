"""Lines that machines can read, and that never show a secret."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backupd import log


@pytest.fixture(autouse=True)
def fresh_secrets_and_handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_secrets", set())
    monkeypatch.setattr(log, "_pattern", None)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("backupd").setLevel(logging.NOTSET)
    logging.captureWarnings(False)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure("json", stream=stream)
    yield stream


speaker = logging.getLogger("backupd.test")


def only(stream: io.StringIO) -> dict[str, str]:
    text = stream.getvalue()
    assert text.count("\n") == 1, text
    line = json.loads(text)
    assert isinstance(line, dict)
    return line


def test_a_line_is_one_json_object_with_time_level_logger_and_message(lines: io.StringIO) -> None:
    speaker.warning("%d files\nvanished", 3)
    line = only(lines)
    assert line["message"] == "3 files\nvanished"
    assert (line["level"], line["logger"]) == ("warning", "backupd.test")
    assert line["time"].endswith("Z") and line["time"][10] == "T"


def test_an_exception_is_one_field_of_its_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("bad\nthing")
    except ValueError:
        speaker.exception("it failed")
    line = only(lines)
    assert line["message"] == "it failed"
    assert "Traceback" in line["exception"] and "ValueError: bad\nthing" in line["exception"]


def test_lines_of_a_run_carry_its_fields_and_others_do_not(lines: io.StringIO) -> None:
    with log.run_context(run="r1", job="backup", source="orders"):
        speaker.info("in")
    speaker.info("out")
    first, second = (json.loads(text) for text in lines.getvalue().splitlines())
    assert (first["run"], first["job"], first["source"]) == ("r1", "backup", "orders")
    assert "run" not in second


def test_the_fields_of_a_run_follow_its_work_into_other_threads(lines: io.StringIO) -> None:
    with log.run_context(run="r1"):
        carried = log.carry(speaker.info)
    threads = [threading.Thread(target=carried, args=("%s", n)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [json.loads(text)["run"] for text in lines.getvalue().splitlines()] == ["r1"] * 3


def test_a_wrong_format_string_loses_no_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "%d files", ("seven",), None)
    assert "seven" in json.loads(log.JsonFormatter().format(record))["message"]


def test_names_that_are_not_utf8_can_be_logged(lines: io.StringIO) -> None:
    speaker.info("skipped %s", "caf\udce9")
    assert only(lines)["message"] == "skipped caf\udce9"
    lines.getvalue().encode("utf-8")


class Unprintable:
    def __repr__(self) -> str:
        return "Unprintable(password='s3cr3t-value')"


def test_a_secret_is_masked_in_message_argument_exception_and_context(lines: io.StringIO) -> None:
    log.hide("s3cr3t-value")
    with log.run_context(source="s3cr3t-value"):
        try:
            raise RuntimeError("postgresql://u:s3cr3t-value@h/db")
        except RuntimeError:
            speaker.exception("url %s of %r and s3cr3t-value", "x:s3cr3t-value@h", Unprintable())
    assert "s3cr3t" not in lines.getvalue()
    assert only(lines)["message"].count("***") == 3


@pytest.mark.parametrize("style", ["json", "plain"])
@example(secret="a/b?c@d e")
@given(secret=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=4, max_size=30))
def test_no_secret_passes_whatever_it_is_made_of(style: str, secret: str) -> None:
    if not secret.strip() or set(secret.strip()) <= set("*") or secret.strip() in "url  postgresql://u:@h/db":
        return
    log.hide(secret)
    formatter = log.JsonFormatter() if style == "json" else log.PlainFormatter()
    import urllib.parse

    for form in (secret, repr(secret), urllib.parse.quote(secret, safe=""), json.dumps(secret)):
        record = logging.LogRecord("x", logging.INFO, "", 0, "[[%s]]", (form,), None)
        text = formatter.format(record)
        message = json.loads(text)["message"] if style == "json" else text
        inside = message[message.index("[[") + 2 : message.rindex("]]")]
        assert secret.strip() not in inside.replace("***", ""), (form, inside)
        assert "***" in inside


def test_of_two_secrets_the_longer_is_masked_whole() -> None:
    log.hide("pass")
    log.hide("password-of-orders")
    assert log.mask("password-of-orders pass") == "*** ***"


def test_a_very_short_secret_is_masked_as_a_word_only() -> None:
    log.hide("a")
    assert log.mask("a bad archive: a") == "*** bad archive: ***"


def test_nothing_is_masked_for_an_empty_secret() -> None:
    log.hide("")
    log.hide(None)
    log.hide(" \n")
    assert log.mask("all of this") == "all of this"


def test_plain_lines_are_for_people() -> None:
    stream = io.StringIO()
    log.configure("plain", stream=stream)
    with log.run_context(run="r1", job="backup", source="orders"):
        speaker.error("no room left")
    assert stream.getvalue().endswith("Z [backup orders] error: no room left\n")


def test_auto_is_json_where_nobody_looks() -> None:
    stream = io.StringIO()
    log.configure("auto", stream=stream)
    speaker.info("x")
    assert only(stream)["message"] == "x"


def test_libraries_are_heard_from_warning_on_and_python_warnings_are_lines(lines: io.StringIO) -> None:
    logging.getLogger("botocore.auth").info("signature")
    assert lines.getvalue() == ""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert only(lines)["logger"] == "py.warnings"


def test_debug_never_opens_the_wire_logs_of_libraries() -> None:
    stream = io.StringIO()
    log.configure("json", level="debug", stream=stream)
    logging.getLogger("botocore.auth").debug("signature")
    speaker.debug("mine")
    assert only(stream)["message"] == "mine"


def test_it_costs_nothing_to_start() -> None:
    code = (
        "import sys, backupd.log; print([m for m in sys.modules if m in ('rich', 'apscheduler', 'zoneinfo')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
